"""The minimum cut against brute force on small random graphs, and on networks whose bottleneck is known by hand."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import fxquant as fq
from fxquant import Rule
from fxquant.mincut import SINK, SOURCE, Arc, graph_arcs, minimum_cut, successive_cuts
from tests.models import TinyResidual, settle


def brute_force(arcs: list[Arc], capacities: dict[str, float]) -> float:
    """The smallest capacity over all sets of vertices that hold the source and not the sink."""
    inner = sorted({v for a in arcs for v in (a.tail, a.head)} - {SOURCE, SINK})
    best = math.inf
    for size in range(len(inner) + 1):
        for chosen in itertools.combinations(inner, size):
            before = {SOURCE, *chosen}
            crossing = [a for a in arcs if a.tail in before and a.head not in before]
            best = min(best, sum(math.inf if a.tensor is None else capacities[a.tensor] for a in crossing))
    return best


@st.composite
def networks(draw) -> tuple[list[Arc], dict[str, float]]:
    """Directed acyclic networks of up to 7 inner vertices; a third of the arcs unlimited."""
    vertices = [SOURCE, *(f"v{i}" for i in range(draw(st.integers(0, 7)))), SINK]
    arcs, capacities = [], {}
    for i, j in itertools.combinations(range(len(vertices)), 2):
        if draw(st.integers(0, 2)) == 0:
            continue
        tensor = f"t{i}_{j}" if draw(st.integers(0, 2)) else None
        arcs.append(Arc(vertices[i], vertices[j], tensor))
        if tensor:
            capacities[tensor] = draw(st.integers(0, 40)) / 8
    return arcs, capacities


@given(networks())
def test_minimum_cut_is_that_of_brute_force(network):
    arcs, capacities = network
    cut = minimum_cut(arcs, capacities)
    assert cut.bits == pytest.approx(brute_force(arcs, capacities))
    if math.isfinite(cut.bits):
        assert cut.bits == sum(capacities[t] for t in cut.tensors)
        rest = [a for a in arcs if a.tensor not in cut.tensors]
        reached, todo = {SOURCE}, [SOURCE]
        while todo:
            tail = todo.pop()
            todo += (new := {a.head for a in rest if a.tail == tail} - reached)
            reached |= new
        assert SINK not in reached


@given(networks(), st.integers(0, 40))
def test_more_capacity_never_lowers_the_cut(network, more):
    arcs, capacities = network
    before = minimum_cut(arcs, capacities).bits
    for tensor in capacities:
        assert minimum_cut(arcs, capacities | {tensor: capacities[tensor] + more}).bits >= before


@given(networks())
def test_successive_cuts_rise_towards_the_image(network):
    values = [cut.bits for cut in successive_cuts(*network)]
    assert values[0] == minimum_cut(*network).bits
    assert all(a < b for a, b in itertools.pairwise(values))


def prepared(model: nn.Module, **options):
    x = torch.randn(4, 3, 16, 16)
    return fq.prepare(settle(model, x), [fq.Rule("*", 4, 4)], calibration=[x], **options)


class Chain(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))

    def forward(self, x):
        return self.c(F.relu(self.b(F.relu(self.a(x)))))


def test_the_smallest_tensor_of_a_chain_throttles_it():
    capacities = {f"{n}.{k}": 10.0 * (1 + i) for i, n in enumerate("cab") for k in ("input", "weight")} | {
        "b.weight": 3
    }
    cut = minimum_cut(graph_arcs(prepared(Chain()), capacities), capacities)
    assert (cut.bits, cut.tensors, cut.layers) == (3, ("b.weight",), ("b",))


def test_a_residual_branch_carries_beside_its_shortcut():
    model = prepared(TinyResidual())
    capacities = {
        f"{n}.{k}": 100.0 for n in ("stem", "conv1", "conv2", "shortcut", "head") for k in ("input", "weight")
    }
    capacities |= {"conv2.input": 5.0, "shortcut.weight": 7.0}
    arcs = graph_arcs(model, capacities)
    cut = minimum_cut(arcs, capacities)
    assert (cut.bits, set(cut.tensors)) == (12.0, {"conv2.input", "shortcut.weight"})
    assert minimum_cut(arcs, capacities | {"stem.input": 11.0}).tensors == ("stem.input",)
    # A branch that carries nothing leaves what the shortcut carries.
    assert minimum_cut(arcs, capacities | {"conv2.input": 0.0}).bits == 7.0


class Parallel(nn.Module):
    """Two branches from one stem, concatenated."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.left, self.right = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = F.relu(self.stem(x))
        return self.head(torch.cat([self.left(x), self.right(x)], 1).mean((2, 3)))


def test_the_parts_of_a_concatenation_add_up():
    model = prepared(Parallel())
    names = ("stem", "left", "right", "head")
    wide = {f"{n}.{k}": 100.0 for n in names for k in ("input", "weight")}
    arcs = graph_arcs(model, wide)

    def cut(**narrow: float):
        found = minimum_cut(arcs, wide | {name.replace("_", "."): bits for name, bits in narrow.items()})
        return found.bits, set(found.tensors)

    assert cut(left_weight=3.0, right_input=5.0) == (8.0, {"left.weight", "right.input"})
    assert cut(left_weight=0.0, right_input=5.0) == (5.0, {"left.weight", "right.input"})
    assert cut(left_weight=3.0, right_input=0.0) == (3.0, {"left.weight", "right.input"})
    assert cut(left_weight=3.0, right_input=5.0, head_input=7.0) == (7.0, {"head.input"})


def test_without_quantized_tensors_nothing_limits():
    model = prepared(Chain())
    cut = minimum_cut(graph_arcs(model, ()), {})
    assert (cut.bits, cut.tensors) == (math.inf, ())
    assert [c.bits for c in successive_cuts(graph_arcs(model, ()), {})] == [math.inf]


def test_a_learned_width_a_hair_below_8_bits_is_8_bits(with_vnni):
    """GDNSQ comes to its target from both sides; the classifier's few outputs would be the cut of low widths."""
    images = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    rules = [Rule("first|last", 8, 8, "gdnsq"), Rule("*", 2, 2, "gdnsq", options={"initial_bits": 8})]
    model = fq.prepare(settle(TinyResidual(), images), rules, calibration=[images])
    quantizer = model.get_submodule("head").weight_fake_quant
    with torch.no_grad():
        quantizer.log2_scale += quantizer.bit_width() - 7.99
    found = fq.analyze(model)
    assert 7.9 < found.capacities["head.weight"].bits < 8
    assert "head.weight" in found.cuts[0].tensors
    assert "head.weight" not in found.layer_cut.tensors


def test_a_width_is_full_that_is_as_wide_as_the_kernels_take(without_vnni):
    images = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    rules = [Rule("first|last", 8, 8), Rule("*", 2, 2)]
    model = fq.prepare(settle(TinyResidual(), images), rules, calibration=[images])
    found = fq.analyze(model)
    assert (found.capacities["head.weight"].bits, found.capacities["head.weight"].widest) == (7, 7)
    assert found.capacities["conv1.weight"].widest == 7
    assert found.capacities["conv1.input"].widest == 8
    assert "head.weight" in found.cuts[0].tensors
    assert not {"head.weight", "head.input"} & set(found.layer_cut.tensors)
