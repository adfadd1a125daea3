"""Allocation: within budget and near it, constraints kept, as good as any other choice, and a table that reads back."""

from __future__ import annotations

import itertools
import tomllib

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fxquant as fq
from fxquant import Budget, Rule, cost
from fxquant.allocate import require_allocatable
from fxquant.errors import RuleError, SpecError, UnknownNameError
from fxquant.recipe import parse_recipe
from fxquant.sensitivity import Sensitivity
from tests.models import TinyMobile, TinyResidual, settle, smooth_images

pytestmark = pytest.mark.usefixtures("with_vnni_throughout")

LAYERS = ("stem", "conv1", "conv2", "shortcut", "head")
FREE = ("conv1", "conv2", "shortcut")


@pytest.fixture(scope="module")
def images():
    return smooth_images(32)


@pytest.fixture(scope="module")
def model(images):
    torch.manual_seed(0)
    rules = [Rule("first|last", 8, 8), Rule("*", 3, 3, "pege")]
    return fq.prepare(settle(TinyResidual(), images), rules, calibration=[images])


def uniform(model, name: str) -> float:
    """What the model's own widths spend of a bound."""
    layers, costs = cost.qat_layers(model), model.meta["fxquant"].costs
    if name == "weight_bytes":
        return cost.ideal_weight_bytes(model)
    return float(getattr(cost, name)(layers, costs).double())


@pytest.mark.parametrize("sensitivity", ["fisher", "loss", "capacity"])
@pytest.mark.parametrize(
    "names",
    [("bops",), ("weight_bytes",), ("mean_weight_bits", "mean_activation_bits"), ("bops", "weight_bytes")],
)
def test_as_good_as_uniform_widths_at_the_same_price(model, images, sensitivity, names):
    budget = Budget(**{name: uniform(model, name) for name in names})
    found = fq.allocate(model, budget, sensitivity)
    again = fq.prepare(settle(TinyResidual(), images), found.rules, calibration=[images])
    for name in names:
        used, limit = found.spent[name]
        assert used <= limit
        assert uniform(again, name) == pytest.approx(used, rel=1e-6)
    assert max(used / limit for used, limit in found.spent.values()) > 0.9  # three layers: bits are coarse
    assert {n: found.widths[n] for n in ("stem", "head")} == {"stem": (8, 8), "head": (8, 8)}
    assert all(2 <= bits <= 8 for name in FREE for bits in found.widths[name])
    assert {n: (r.weight_bits, r.activation_bits) for n, r in again.meta["fxquant"].rules.items()} == found.widths
    assert {r.estimator for r in found.rules if r.pattern in FREE} == {"pege"}


def known(values) -> Sensitivity:
    """``values[tensor]`` at 2 bits, a quarter of it with each further bit."""
    return Sensitivity("fisher", {t: {b: v * 4.0 ** (2 - b) for b in range(2, 9)} for t, v in values.items()})


TENSORS = {f"{n}.{k}": 1.0 for n in FREE for k in ("weight", "input")}


def test_bits_go_where_they_are_felt(model):
    budget = Budget(mean_weight_bits=3.2)
    found = fq.allocate(model, budget, known(TENSORS | {"conv1.weight": 1e4}), tie_readers=False)
    assert found.widths["conv1"][0] > max(found.widths["conv2"][0], 3)
    best = min(
        sum(4.0 ** (2 - b) * (1e4 if i == 0 else 1) for i, b in enumerate(bits))
        for bits in itertools.product(range(2, 9), repeat=3)
        if _mean_weight_bits(model, dict(zip(FREE, bits, strict=True))) <= 3.2
    )
    ours = sum(4.0 ** (2 - found.widths[n][0]) * (1e4 if n == "conv1" else 1) for n in FREE)
    assert ours == pytest.approx(best, rel=1e-3)


def _mean_weight_bits(model, bits: dict[str, int]) -> float:
    costs = model.meta["fxquant"].costs
    total = sum(c.weights for c in costs.values())
    return sum(bits.get(n, 8) * c.weights for n, c in costs.items()) / total


def test_ties(model):
    uneven = known(TENSORS | {"conv1.input": 1e3, "conv2.weight": 1e3})
    budget = Budget(bops=uniform(model, "bops"))
    free = fq.allocate(model, budget, uneven, tie_readers=False).widths
    assert free["conv1"][1] != free["shortcut"][1]
    # conv1 and shortcut read one tensor.
    read = fq.allocate(model, budget, uneven).widths
    assert read["conv1"][1] == read["shortcut"][1]
    tied = fq.allocate(
        model, budget, uneven, tied=[["conv1.weight", "conv2.weight"], ["conv2.weight", "shortcut.weight"]]
    )
    assert len({tied.widths[n][0] for n in FREE}) == 1
    both_sides = fq.allocate(model, budget, uneven, tied=[["conv2.weight", "conv2.input"]])
    assert len(set(both_sides.widths["conv2"])) == 1
    assert both_sides.widths["conv2"][0] > 2
    with pytest.raises(UnknownNameError, match=r"unknown tensor to tie 'conv1.weights': did you mean 'conv1.weight'"):
        fq.allocate(model, budget, uneven, tied=[["conv1.weights", "conv2.weight"]])


def test_the_widths_a_backend_runs(images):
    """fbgemm's depthwise kernel is wrong where both operands have 8 bits."""
    model = fq.prepare(settle(TinyMobile(), images), [Rule("*", 4, 4)], calibration=[images], backend="fbgemm")
    tensors = {f"{n}.{k}": 1.0 for n in cost.qat_layers(model) for k in ("weight", "input")}
    found = fq.allocate(model, Budget(mean_weight_bits=8), known(tensors), fixed=None, tie_readers=False)
    assert found.widths["depthwise"] in ((8, 7), (7, 8))
    assert {found.widths[n] for n in ("stem", "pointwise", "head")} == {(8, 8)}


def test_an_interval_of_a_rule_narrows_the_candidates(images):
    rules = [Rule("conv1", (3, 5), (2, 4), "nipq"), Rule("*", 8, 8)]
    model = fq.prepare(settle(TinyResidual(), images), rules, calibration=[images])
    generous = fq.allocate(
        model, Budget(mean_weight_bits=8), known(TENSORS), fixed="first|last|conv2|shortcut", tie_readers=False
    )
    assert generous.widths["conv1"] == (5, 4)
    tight = fq.allocate(
        model,
        Budget(bops=1e9),
        known(TENSORS),
        weight_bits=(2, 3),
        activation_bits=(4, 4),
        fixed="first|last",
        tie_readers=False,
    )
    assert tight.widths == {"stem": (8, 8), "head": (8, 8), "conv1": (3, 4), "conv2": (3, 4), "shortcut": (3, 4)}
    with pytest.raises(
        SpecError, match=r"layer 'conv1': no width is left of weight_bits=\(6, 8\).*the rule's \(\(3, 5\)"
    ):
        fq.allocate(model, Budget(bops=1e9), known(TENSORS), weight_bits=(6, 8))


class Narrow(nn.Module):
    """A chain whose middle tensor is small: the bottleneck at any width."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.b = nn.Conv2d(8, 2, 3, stride=2, padding=1)
        self.c = nn.Conv2d(2, 16, 3, padding=1)
        self.d = nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        x = F.relu(self.a(x))
        x = F.relu(self.d(F.relu(self.c(F.relu(self.b(x))))))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


def test_capacity_raises_the_minimum_cut(images):
    torch.manual_seed(0)
    rules = [Rule("first|last", 8, 8), Rule("*", 3, 3)]
    model = fq.prepare(Narrow().eval(), rules, calibration=[images])
    budget = Budget(bops=uniform(model, "bops"))
    found = fq.allocate(model, budget, "capacity")
    # c reads 2 x 8 x 8 values, b writes them; everything else has at least four times as many.
    assert found.widths["c"][1] > 3
    assert found.widths["b"][0] > 3
    fisher = fq.allocate(model, budget, "fisher")
    assert found.predicted > 0
    assert fisher.widths != found.widths


def test_the_table_is_a_recipe_that_can_be_edited(model):
    found = fq.allocate(model, Budget(bops=uniform(model, "bops")), known(TENSORS))
    text = found.to_toml("pege")
    assert text.startswith("# sensitivity fisher, ")
    assert "bops" in text.splitlines()[0]
    values = tomllib.loads(text)
    base = {"name": "x", "model": {"name": "resnet18"}, "data": {"name": "digits"}, "train": {"epochs": 1}}
    chosen_anew = {"allocation": {"sensitivity": "fisher"}, "budget": {"bops": 1}}
    recipe = parse_recipe({**base, "quantization": {"estimator": "pege"}, **chosen_anew, **values}, "x")
    assert recipe.built_rules() == found.rules
    assert recipe.allocation is None
    assert [row.get("estimator") for row in values["rules"]] == ["lsq", None, None, None, "lsq"]


def test_rules_keep_their_options(images):
    rules = [
        Rule("head", None, None),
        Rule("*", 4, 4, "ewgs", per_channel=False, init="minmax", options={"delta": 0.5}),
    ]
    model = fq.prepare(settle(TinyResidual(), images), rules, calibration=[images])
    found = fq.allocate(
        model, Budget(mean_weight_bits=3), known(TENSORS | {"stem.weight": 1, "stem.input": 1}), fixed=None
    )
    by_name = {rule.pattern: rule for rule in found.rules}
    assert by_name["head"].keeps_float
    assert (by_name["conv1"].per_channel, by_name["conv1"].init, by_name["conv1"].options) == (
        False,
        "minmax",
        {"delta": 0.5},
    )
    values = tomllib.loads(found.to_toml())
    assert "options" not in tomllib.loads(found.to_toml("ewgs", {"delta": 0.5}))["rules"][0]
    base = {"name": "x", "model": {"name": "resnet18"}, "data": {"name": "digits"}, "train": {"epochs": 1}}
    assert parse_recipe({**base, **values}, "x").built_rules() == found.rules


def test_rules_without_the_options_of_their_recipe_say_so(images):
    quantization = {"estimator": "ewgs", "options": {"delta": 0.3}}
    rules = [Rule("stem", 4, 4, "ewgs"), Rule("*", 4, 4, "ewgs", options={"delta": 0.3})]
    model = fq.prepare(settle(TinyResidual(), images), rules, calibration=[images])
    found = fq.allocate(model, Budget(mean_weight_bits=3), known(TENSORS | {"stem.weight": 1, "stem.input": 1}))
    table = tomllib.loads(found.to_toml("ewgs", quantization["options"]))
    assert [rule.get("options") for rule in table["rules"] if rule["pattern"] in ("stem", "conv1")] == [{}, None]
    base = {"name": "x", "model": {"name": "resnet18"}, "data": {"name": "digits"}, "train": {"epochs": 1}}
    assert parse_recipe({**base, "quantization": quantization, **table}, "x").built_rules() == found.rules


@pytest.mark.parametrize("sensitivity", ["fisher", "loss", "capacity"])
@pytest.mark.parametrize("given", [{"fixed": "*"}, {"weight_bits": (3, 3), "activation_bits": (3, 3)}])
def test_where_nothing_is_free_the_widths_are_those_given(model, sensitivity, given):
    found = fq.allocate(model, Budget(mean_weight_bits=8), sensitivity, **given)
    assert {found.widths[name] for name in FREE} == {(3, 3)}


def test_a_width_that_was_not_measured_does_not_count_as_free(model):
    few = Sensitivity("fisher", {t: {b: 4.0**-b for b in (4, 6, 8)} for t in TENSORS})
    with pytest.raises(
        SpecError, match=r"'fisher' says nothing of 'conv1.weight' at 2, 3, 5, 7 bits; measure it at all"
    ):
        fq.allocate(model, Budget(mean_weight_bits=8), few)
    assert fq.allocate(model, Budget(mean_weight_bits=8), known(TENSORS)).predicted > 0


def test_what_cannot_be_allocated_says_so(model, images):
    for widths in (4, (), (4.5, 6), (5, 4)):
        with pytest.raises(SpecError, match=r"weight_bits=|bits=4\.0"):
            fq.allocate(model, Budget(mean_weight_bits=8), known(TENSORS), weight_bits=widths)
    with pytest.raises(SpecError, match=r"budget bops=inf was asked for; it must be above 0 and finite"):
        Budget(bops=float("inf"))
    with pytest.raises(SpecError, match=r"allocate was given a Budget without a bound; give one"):
        fq.allocate(model, Budget(), "fisher")
    with pytest.raises(SpecError, match=r"budget bops=1000 was asked for, but the lowest widths .* take \d"):
        fq.allocate(model, Budget(bops=1000), "fisher")
    with pytest.raises(UnknownNameError, match="unknown sensitivity 'fischer'"):
        fq.allocate(model, Budget(mean_weight_bits=4), "fischer")
    with pytest.raises(RuleError, match=r"rule 'convv' of the rule 'first|convv' matches no quantizable layer"):
        fq.allocate(model, Budget(mean_weight_bits=4), "fisher", fixed="first|convv")
    bare = fq.prepare(settle(TinyResidual(), images), [Rule("*", 4, 4)], example_inputs=images[:2])
    with pytest.raises(SpecError, match=r"sensitivity 'fisher' is measured on images; give allocate batches"):
        fq.allocate(bare, Budget(mean_weight_bits=4))
    float_alone = fq.prepare(settle(TinyResidual(), images), [Rule("*", None, None)], calibration=[images])
    for ask in (fq.allocate, require_allocatable):
        with pytest.raises(SpecError, match=r"every layer stays float by its rule; give a rule bits"):
            ask(float_alone, Budget(mean_weight_bits=4))
