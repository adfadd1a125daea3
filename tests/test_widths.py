"""Whole widths inside a hard budget, for any learned widths and any budget."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fxquant as fq
from fxquant import Budget, cost
from fxquant.errors import SpecError
from fxquant.widths import fix_widths, layer_widths
from tests.models import TinyResidual, settle

pytestmark = pytest.mark.usefixtures("with_vnni_throughout")

LOWEST, HIGHEST = 2, 8
LAYERS = ("stem", "conv1", "conv2", "shortcut", "head")


def build(rules) -> nn.Module:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 16, 16)
    return fq.prepare(settle(TinyResidual(), x), rules, calibration=[x])


@pytest.fixture(scope="module")
def learning() -> nn.Module:
    return build([fq.Rule("*", (LOWEST, HIGHEST), (LOWEST, HIGHEST), "nipq")])


def with_widths(model: nn.Module, widths: list[float]) -> nn.Module:
    """A copy whose quantizers have learned ``widths``: weights, then inputs, in the order of LAYERS."""
    model = copy.deepcopy(model)
    quantizers = [model.get_submodule(n).weight_fake_quant for n in LAYERS]
    quantizers += [model.get_submodule(n).input_fake_quant for n in LAYERS]
    for quantizer, width in zip(quantizers, widths, strict=True):
        share = (width - LOWEST) / (HIGHEST - LOWEST)
        quantizer.raw_width.data.fill_(math.log(share / (1 - share)))
        assert float(quantizer.bit_width().detach()) == pytest.approx(width, abs=1e-4)
    return model


def spent(model: nn.Module, widths: dict[str, tuple[int, int]]) -> dict[str, float]:
    """What whole widths cost, worked out from the sizes alone."""
    costs = model.meta["fxquant"].costs
    return {
        "mean_weight_bits": sum(widths[n][0] * costs[n].weights for n in widths)
        / sum(c.weights for c in costs.values()),
        "mean_activation_bits": sum(widths[n][1] * costs[n].inputs for n in widths)
        / sum(c.inputs for c in costs.values()),
        "bops": sum(widths[n][0] * widths[n][1] * costs[n].macs for n in widths),
        "weight_bytes": UNPACKED + sum(math.ceil(widths[n][0] * costs[n].weights / 8) for n in widths),
    }


def allowed(model: nn.Module, widths: dict[str, tuple[int, int]], budget: Budget) -> bool:
    return all(
        getattr(budget, name) is None or value <= getattr(budget, name) * (1 + 1e-9)
        for name, value in spent(model, widths).items()
    )


WIDTHS = st.lists(st.floats(LOWEST + 0.01, HIGHEST - 0.01), min_size=10, max_size=10)
MEAN = st.none() | st.floats(1.5, 8.5)
FULL_BOPS = 64 * (16 * 16 * 8 * 27 + 4 * 4 * 16 * (72 + 144 + 8) + 80)
WEIGHTS = 8 * 27 + 16 * (72 + 144 + 8) + 5 * 16
UNPACKED = 8 * (8 + 16 + 16 + 16 + 5)  # scale and bias of each output channel
SHARE = st.none() | st.floats(0.03, 1.1)
BUDGETS = st.builds(
    Budget,
    MEAN,
    MEAN,
    SHARE.map(lambda share: share and share * FULL_BOPS),
    SHARE.map(lambda share: share and UNPACKED + share * WEIGHTS),
)


@given(widths=WIDTHS, budget=BUDGETS)
def test_no_budget_is_ever_exceeded_and_no_width_leaves_its_interval(learning, widths, budget):
    model = with_widths(learning, widths)
    lowest = dict.fromkeys(LAYERS, (LOWEST, LOWEST))
    if not allowed(model, lowest, budget):
        with pytest.raises(SpecError, match=r"was asked for, but the lowest widths that the rules allow .* take"):
            fix_widths(model, budget)
        assert all(model.get_submodule(n).weight_fake_quant.learns_width for n in LAYERS)
        return
    whole = fix_widths(model, budget)
    assert list(whole) == list(LAYERS)
    assert allowed(model, whole, budget)
    assert all(type(b) is int and LOWEST <= b <= HIGHEST for pair in whole.values() for b in pair)
    assert {n: layer_widths(model.get_submodule(n)) for n in LAYERS} == whole
    layers, costs = cost.qat_layers(model), model.meta["fxquant"].costs
    assert float(cost.bops(layers, costs)) == pytest.approx(spent(model, whole)["bops"], rel=1e-6)
    assert cost.ideal_weight_bytes(model) == spent(model, whole)["weight_bytes"]


@given(widths=WIDTHS, budget=BUDGETS)
def test_no_width_rises_above_what_was_learned(learning, widths, budget):
    """Each ends at most at its learned width rounded up: what the budget leaves goes to no one who did not ask."""
    model = with_widths(learning, widths)
    if not allowed(model, dict.fromkeys(LAYERS, (LOWEST, LOWEST)), budget):
        return
    whole = fix_widths(model, budget)
    got = [whole[n][0] for n in LAYERS] + [whole[n][1] for n in LAYERS]
    assert all(bits <= math.ceil(width - 1e-4) for bits, width in zip(got, widths, strict=True))


@given(widths=WIDTHS, budget=BUDGETS)
def test_no_bit_is_taken_that_the_budget_could_have_left(learning, widths, budget):
    model = with_widths(learning, widths)
    if not allowed(model, dict.fromkeys(LAYERS, (LOWEST, LOWEST)), budget):
        return
    whole = fix_widths(model, budget)
    for index, name in enumerate(LAYERS):
        for kind in (0, 1):
            if whole[name][kind] >= math.floor(widths[index + 5 * kind]):
                continue
            wider = whole | {name: tuple(b + (k == kind) for k, b in enumerate(whole[name]))}
            assert not allowed(model, wider, budget), (name, kind)


def test_without_a_budget_widths_are_rounded_up(learning):
    widths = [2.1, 3.0, 4.5, 6.99, 7.2, 2.5, 3.5, 4.01, 5.0, 7.9]
    whole = fix_widths(with_widths(learning, widths))
    assert whole == {"stem": (3, 3), "conv1": (3, 4), "conv2": (5, 5), "shortcut": (7, 5), "head": (8, 8)}


def test_a_quantizer_that_is_frozen_alone_rounds_alike(learning):
    """As in a model that torch.ao prepared, where no one else fixes widths."""
    widths = [2.1, 3.0, 4.5, 6.99, 7.2, 2.5, 3.5, 4.01, 5.0, 7.9]
    model, twin = with_widths(learning, widths), with_widths(learning, widths)
    whole = fix_widths(twin)
    for name in LAYERS:
        quantizers = model.get_submodule(name).weight_fake_quant, model.get_submodule(name).input_fake_quant
        for quantizer in quantizers:
            quantizer.freeze()
        assert tuple(quantizer.whole_bits for quantizer in quantizers) == whole[name]


def test_a_budget_on_weights_leaves_activations_as_they_were_learned(learning):
    whole = fix_widths(with_widths(learning, [7.5] * 5 + [3.5] * 5), Budget(mean_weight_bits=4))
    assert {a for _, a in whole.values()} == {4}
    assert spent(learning, whole)["mean_weight_bits"] <= 4


def test_a_budget_with_room_to_spare_changes_nothing(learning):
    widths = [3.5] * 10
    generous = Budget(mean_weight_bits=8, mean_activation_bits=8, bops=FULL_BOPS)
    assert fix_widths(with_widths(learning, widths), generous) == fix_widths(with_widths(learning, widths))


def test_widths_that_are_whole_already_count_but_do_not_move():
    model = build([fq.Rule("first|last", 8, 8, "lsq"), fq.Rule("*", (2, 8), (2, 8), "nipq")])
    whole = fix_widths(model, Budget(mean_weight_bits=3))
    assert whole["stem"] == whole["head"] == (8, 8)
    assert spent(model, whole)["mean_weight_bits"] <= 3
    with pytest.raises(SpecError, match=r"budget mean_weight_bits=2\.1 was asked for"):
        fix_widths(model, Budget(mean_weight_bits=2.1))
    fixed = build([fq.Rule("*", 4, 4)])
    with pytest.raises(SpecError, match=r"budget bops=1000 .* take \d.*; raise the budget, or lower the rules"):
        fix_widths(fixed, Budget(bops=1000))
    assert set(fix_widths(fixed, Budget(mean_weight_bits=4, mean_activation_bits=4)).values()) == {(4, 4)}


def test_fixing_twice_is_fixing_once(learning):
    model = with_widths(learning, [5.5] * 10)
    budget = Budget(mean_weight_bits=4, mean_activation_bits=4)
    whole = fix_widths(model, budget)
    assert fix_widths(model, budget) == whole
    assert fix_widths(model) == whole


def test_the_range_stays_when_the_width_becomes_whole(learning):
    model = with_widths(learning, [5.4] * 10)
    quantizer = model.conv1.input_fake_quant
    alpha = quantizer.alpha().detach().clone()
    fix_widths(model)
    assert quantizer.whole_bits == 6
    assert torch.allclose(quantizer.alpha(), alpha, rtol=1e-5)
    assert torch.allclose(quantizer.scale(), alpha / 63, rtol=1e-5)
    assert not quantizer.noise
