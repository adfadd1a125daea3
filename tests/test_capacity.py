"""Capacity against what theory says of Gaussian and uniform signals, and on layers worked out by hand."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fxquant as fq
from fxquant.capacity import FLOAT_BITS, _channels_last, edge_name, gaussian_capacity, measure_capacity
from fxquant.errors import EmptyDataError, SpecError
from fxquant.estimators import Estimator
from tests.models import TinyMobile, TinyResidual, settle


class OneLayer(nn.Module):
    """The image is the quantized tensor: a 1x1 convolution reads it."""

    def __init__(self, channels: int = 1):
        super().__init__()
        self.conv = nn.Conv2d(channels, 2, 1, bias=False)

    def forward(self, x):
        return self.conv(x)


def of_image(x: torch.Tensor, bits: int, low: float, high: float):
    """Capacity of images quantized at ``bits`` on the range [low, high]."""
    model = fq.prepare(OneLayer(x.shape[1]), [fq.Rule("*", 8, bits, "lsq", init="minmax")], calibration=[x])
    with torch.no_grad():
        model.conv.input_fake_quant.set_range(torch.tensor([low]), torch.tensor([high]))
    return measure_capacity(model, [x])["conv.input"]


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6, 8])
def test_a_uniform_signal_over_the_whole_range(bits):
    """Cells at the two ends are half as wide: noise is step²/12 in all of them alike."""
    found = of_image(torch.rand(16, 1, 128, 128), bits, 0.0, 1.0)
    levels = 2**bits - 1
    assert found.signal == pytest.approx(1 / 12, rel=0.01)
    assert found.noise == found.rounding == pytest.approx(1 / 12 / levels**2, rel=0.01)
    assert found.clipping == 0
    assert found.bits_per_element == pytest.approx(0.5 * math.log2(1 + levels**2), abs=0.01)
    assert found.total == found.bits_per_element * 128 * 128


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_a_gaussian_signal_inside_of_a_wide_range(bits):
    found = of_image(torch.randn(16, 1, 128, 128) * 3, bits, -18.0, 18.0)
    step = 36 / (2**bits - 1)
    expected = 0.5 * math.log2(1 + 12 * 9 / step**2)
    assert found.clipping < 1e-4 * found.noise
    assert found.bits_per_element == pytest.approx(expected, abs=0.02)


def test_a_gaussian_signal_that_is_clipped():
    """At ±t sigma, clipping costs 2·((1 + t²)·Q(t) - t·phi(t)) of the power."""
    t, bits = 1.5, 8
    found = of_image(torch.randn(16, 1, 128, 128), bits, -t, t)
    tail, density = 0.5 * math.erfc(t / math.sqrt(2)), math.exp(-t * t / 2) / math.sqrt(2 * math.pi)
    assert found.clipping == pytest.approx(2 * ((1 + t * t) * tail - t * density), rel=0.03)
    assert found.noise == pytest.approx(found.rounding + found.clipping)
    assert found.bits_per_element == pytest.approx(0.5 * math.log2(1 + 1 / found.noise), abs=0.01)


def test_channels_are_parallel_and_a_dead_one_carries_nothing():
    x = torch.rand(8, 1, 64, 64)
    alone = of_image(x, 4, 0.0, 1.0)
    beside_zeros = of_image(torch.cat([x, torch.zeros_like(x)], 1), 4, 0.0, 1.0)
    assert beside_zeros.elements == 2 * alone.elements
    assert beside_zeros.total == pytest.approx(alone.total)
    beside_ones = of_image(torch.cat([x, torch.ones_like(x)], 1), 4, 0.0, 1.0)
    assert beside_ones.total == pytest.approx(alone.total)


def test_no_element_carries_more_than_its_width():
    codes = torch.randint(0, 4, (8, 1, 32, 32)) / 3.0
    assert of_image(codes, 2, 0.0, 1.0).bits_per_element == 2.0
    limit = gaussian_capacity(torch.tensor([1.0], dtype=torch.float64), torch.zeros(1, dtype=torch.float64), FLOAT_BITS)
    assert limit == FLOAT_BITS


def test_noise_of_a_weight_counts_at_the_output_of_its_layer():
    torch.manual_seed(0)
    x = torch.rand(16, 1, 32, 32) - 0.3
    model = fq.prepare(OneLayer(), [fq.Rule("*", 3, 8, "lsq", init="minmax", per_channel=False)], calibration=[x])
    with torch.no_grad():
        model.conv.weight.copy_(torch.tensor([1.0, 0.4]).reshape(2, 1, 1, 1))
        model.conv.weight_fake_quant.set_range(torch.tensor([-1.0]), torch.tensor([1.0]))
    found = measure_capacity(model, [x])["conv.weight"]
    # 1 is on the grid of thirds; 0.4 becomes 1/3: of that channel's output a sixth is noise.
    entered = model.conv.input_fake_quant.eval_forward(x).detach().double()
    ratio = float(entered.var(correction=0) / entered.square().mean()) * (0.4 / (0.4 - 1 / 3)) ** 2
    assert found.elements == 2 * 32 * 32
    assert found.bits_per_element == pytest.approx((FLOAT_BITS + 0.5 * math.log2(1 + ratio)) / 2, abs=1e-4)


@pytest.fixture(scope="module")
def residual():
    x = torch.randn(8, 3, 16, 16)
    rules = [fq.Rule("first|last", 8, 8), fq.Rule("*", 3, 3)]
    return fq.prepare(settle(TinyResidual(), x), rules, calibration=[x]), x


def test_every_quantized_tensor_of_a_network_is_there(residual):
    model, x = residual
    found = measure_capacity(model, [x, x])
    expected = {f"{n}.weight" for n in ("stem", "conv1", "conv2", "shortcut", "head")}
    expected |= {f"{n}.input" for n in ("stem", "conv1", "conv2", "shortcut", "head")}
    shared = {f"{n}.input" for n in ("head",) if model.get_submodule(n).input_is_quantized}
    assert expected - shared <= found.keys()
    assert all(t.kind == "edge" for name, t in found.items() if name not in expected)
    assert found["conv1.input"].elements == 8 * 8 * 8
    assert found["conv1.weight"].elements == 16 * 4 * 4
    assert all(0 < t.bits_per_element <= (FLOAT_BITS if t.kind == "weight" else t.bits) for t in found.values())
    once = measure_capacity(model, [x])
    assert all(found[n].bits_per_element == pytest.approx(once[n].bits_per_element, rel=1e-6) for n in found)


def test_measuring_changes_nothing(residual):
    model, x = residual
    model.train()
    before = copy.deepcopy(model.state_dict())
    measure_capacity(model, [x])
    assert model.training
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_frozen_model_has_the_same_capacities(residual):
    model, x = copy.deepcopy(residual[0]), residual[1]
    fq.freeze(model, calibration=())
    frozen, free = measure_capacity(model, [x]), measure_capacity(residual[0], [x])
    assert frozen.keys() == free.keys()
    assert all(frozen[n].bits_per_element == pytest.approx(free[n].bits_per_element, abs=0.05) for n in free)


@pytest.mark.parametrize("estimator", ["nipq", "gdnsq"])
def test_widths_that_are_being_learned(estimator):
    x = torch.randn(8, 3, 16, 16)
    model = fq.prepare(settle(TinyMobile(), x), [fq.Rule("*", (2, 8), (2, 8), estimator)], calibration=[x])
    assert all(t.bits_per_element > 0 for t in measure_capacity(model, [x]).values())


def test_what_cannot_be_measured_says_so(residual):
    with pytest.raises(EmptyDataError, match="yielded no batch"):
        measure_capacity(residual[0], [])
    bare = fq.prepare(OneLayer(), [fq.Rule("*", 4, 4)], example_inputs=torch.rand(2, 1, 8, 8))
    with pytest.raises(SpecError, match="no range has been set yet"):
        measure_capacity(bare, [torch.rand(2, 1, 8, 8)])


def test_a_layer_that_is_called_at_two_sizes_carries_the_elements_of_both():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x):
            return self.conv(F.max_pool2d(self.conv(x), 2)).mean((2, 3))

    x = torch.randn(4, 3, 16, 16)
    found = fq.analyze(fq.prepare(Twice(), [fq.Rule("*", 4, 4)], calibration=[x])).capacities["conv.input"]
    assert found.elements == 3 * (16 * 16 + 8 * 8) // 2  # of a call: the cut counts each


def test_channels_that_are_the_last_axis_are_found():
    """[N, H, W, C] between two linear layers, as in Swin, whose channels have powers far apart."""

    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.mix = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 8)
            self.head = nn.Linear(8, 5)
            self.mix.weight.data *= 10.0 ** -torch.arange(8.0)[:, None]

        def forward(self, x):
            x = self.stem(x).permute(0, 2, 3, 1)
            return self.head((x + self.mix(x)).permute(0, 3, 1, 2).mean((2, 3)))

    x = torch.randn(8, 3, 16, 16)
    model = fq.prepare(Tokens(), [fq.Rule("*", 8, 8)], calibration=[x], backend="onnxruntime")
    modules = dict(model.named_modules(remove_duplicate=False))
    last = {
        edge_name(node): _channels_last(node.args[0], modules)
        for node in model.graph.nodes
        if node.op == "call_module" and isinstance(modules[node.target], Estimator)
    }
    assert last
    assert last["mix_edge"]
    narrow = fq.analyze(model).capacities["mix_edge"]
    assert narrow.bits_per_element < 3  # most channels lie below a step; over all of them there would be 6 bits


def test_more_bits_carry_more():
    x = F.relu(torch.randn(8, 3, 16, 16))
    totals = []
    for bits in (2, 3, 4, 6, 8):
        torch.manual_seed(1)
        model = fq.prepare(settle(TinyResidual(), x), [fq.Rule("*", bits, bits)], calibration=[x])
        totals.append({n: t.total for n, t in measure_capacity(model, [x]).items()})
    for fewer, more in itertools.pairwise(totals):
        assert all(fewer[n] < more[n] for n in ("conv1.input", "conv1.weight", "conv2.weight", "head.weight"))
