"""Rules, budgets and backends: what they match, and what they say when they cannot be honoured."""

from __future__ import annotations

import math

import pytest

from fxquant import Budget, FxQuantError, Rule
from fxquant.errors import RuleError, SpecError, UnknownNameError, did_you_mean
from fxquant.spec import BACKENDS, check_options, exactly, get_backend, resolve_rules

LAYERS = ["conv1", "layer1.0.conv1", "layer1.0.conv2", "layer2.0.conv1", "fc"]


def got(*rules: Rule, layers=LAYERS) -> dict[str, int | None]:
    """Weight width by layer."""
    return {name: rule and rule.weight_bits for name, rule in resolve_rules(list(rules), list(layers)).items()}


# ---- which rule a layer gets -----------------------------------------------------------------------------


def test_the_first_rule_that_matches_wins():
    assert got(Rule("conv1", 7, 7), Rule("layer1.*", 3, 3), Rule("*", 4, 4)) == {
        "conv1": 7, "layer1.0.conv1": 3, "layer1.0.conv2": 3, "layer2.0.conv1": 4, "fc": 4,
    }  # fmt: skip
    assert set(got(Rule("*", 4, 4)).values()) == {4}


def test_a_layer_without_a_rule_stays_float():
    assert got(Rule("fc", 8, 8)) == dict.fromkeys(LAYERS[:-1]) | {"fc": 8}


def test_first_and_last_are_positions_in_the_graph():
    assert got(Rule("first|last", 8, 8), Rule("*", 2, 2)) == dict.fromkeys(LAYERS, 2) | {"conv1": 8, "fc": 8}
    assert got(Rule("first", 8, 8), Rule("last", 7, 7), Rule("*", 2, 2)) == dict.fromkeys(LAYERS, 2) | {
        "conv1": 8, "fc": 7,
    }  # fmt: skip


@pytest.mark.parametrize("name", ["last", "first", "a*", "b[0]", "c|d", "re:x", "fc"])
def test_a_pattern_for_one_layer_matches_no_other(name):
    """Not by its place, and not by a glob in its name."""
    layers = ["stem", "first", "last", "a*", "ab", "b[0]", "b0", "c|d", "c", "re:x", "x", "fc"]
    assert got(Rule(exactly(name), 3, 3), Rule("*", 8, 8), layers=layers) == dict.fromkeys(layers, 8) | {name: 3}


@pytest.mark.parametrize("position", ["first", "last", "first|last", "last|first"])
def test_an_only_layer_is_both_first_and_last(position):
    assert got(Rule(position, 8, 8), layers=["fc"]) == {"fc": 8}


def test_globs_have_alternatives_and_match_whole_names():
    assert got(Rule("conv1|layer*.conv2", 3, 3), Rule("*", 8, 8)) == {
        "conv1": 3, "layer1.0.conv1": 8, "layer1.0.conv2": 3, "layer2.0.conv1": 8, "fc": 8,
    }  # fmt: skip
    assert got(Rule("layer[12].0.conv1", 3, 3), Rule("*", 8, 8))["layer1.0.conv2"] == 8
    with pytest.raises(RuleError):
        got(Rule("FC", 3, 3))


def test_regular_expressions_match_whole_names():
    assert got(Rule(r"re:layer\d\.0\.conv1", 3, 3), Rule("*", 8, 8)) == {
        "conv1": 8, "layer1.0.conv1": 3, "layer1.0.conv2": 8, "layer2.0.conv1": 3, "fc": 8,
    }  # fmt: skip
    with pytest.raises(RuleError):
        got(Rule("re:conv", 3, 3))
    with pytest.raises(SpecError, match=r"rule 're:\(': not a regular expression \("):
        Rule("re:(", 4, 4)


def test_a_rule_that_matches_nothing_names_the_nearest_layers():
    with pytest.raises(RuleError, match=r"rule 'layer1\.0\.conv3' matches no quantizable layer .* did you mean 'layer"):
        got(Rule("layer1.0.conv3", 4, 4), Rule("*", 8, 8))
    with pytest.raises(RuleError, match=r"'zzz' matches no .* known: conv1, layer1\.0\.conv1, .*fc"):
        got(Rule("*", 8, 8), Rule("zzz", 4, 4))


# ---- what a rule refuses ---------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [0, 9, -1, 2.5, 16, True, math.nan, math.inf, "four", "4"])
@pytest.mark.parametrize("field", ["weight_bits", "activation_bits"])
def test_a_width_outside_1_to_8_is_refused(field, bits):
    with pytest.raises(SpecError, match=rf"{field}={bits!r} was asked for; widths are whole numbers .* from 1 to 8"):
        Rule("*", **{field: bits})


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 7, 8, 4.0])
def test_all_whole_widths_are_taken(bits):
    rule = Rule("*", bits, bits)
    assert (rule.weight_bits, rule.activation_bits) == (bits, bits)
    assert type(rule.weight_bits) is int


@pytest.mark.parametrize(
    ("bits", "words"),
    [
        ((8, 2), r"weight_bits=\(8, 2\) was asked for; the lowest width must be below the highest"),
        ((4, 4), r"the lowest width must be below the highest"),
        ((2, 4, 8), r"an interval of widths is a pair \(lowest, highest\)"),
        ((0, 8), r"weight_bits=0 was asked for; widths are whole numbers"),
        ((2, 9), r"weight_bits=9 was asked for; widths are whole numbers"),
    ],
)
def test_a_learned_width_is_an_interval(bits, words):
    with pytest.raises(SpecError, match=words):
        Rule("*", bits, 8, "nipq")
    assert Rule("*", [2, 8], 8, "nipq").weight_bits == (2, 8)


@pytest.mark.parametrize("estimator", ["lsq", "ste", "ewgs", "pege"])
def test_an_estimator_that_cannot_learn_widths_says_which_can(estimator):
    with pytest.raises(SpecError, match=rf"bits=\(2, 8\) asks the estimator '{estimator}' .* use 'nipq' or 'gdnsq'"):
        Rule("*", 8, (2, 8), estimator)


@pytest.mark.parametrize(("weight", "activation"), [(None, 4), (4, None)])
def test_integer_kernels_need_both_widths(weight, activation):
    words = rf"rule 'conv1': weight_bits={weight} with activation_bits={activation}; integer kernels need both"
    with pytest.raises(SpecError, match=words):
        Rule("conv1", weight, activation)
    assert Rule("conv1", None, None).keeps_float
    assert not Rule("conv1", 4, 4).keeps_float


def test_unknown_names_come_with_the_nearest():
    with pytest.raises(UnknownNameError, match=r"unknown estimator 'nipk': did you mean 'nipq'\? \(known: ewgs, gdn"):
        Rule("*", 4, 4, "nipk")
    with pytest.raises(UnknownNameError, match=r"unknown range initialisation 'max': did you mean 'minmax'\?"):
        Rule("*", 4, 4, init="max")
    with pytest.raises(
        UnknownNameError, match=r"unknown option of the estimator 'pege' 'kapa': did you mean 'kappa'\?"
    ):
        Rule("*", 4, 4, "pege", options={"kapa": 1})
    with pytest.raises(UnknownNameError, match=r"unknown backend 'oneddn': did you mean 'onednn'\?"):
        get_backend("oneddn")
    check_options("pege", {"kappa": 1.0, "percentile": 99.0})


def test_options_that_cannot_be_honoured_are_refused_at_construction():
    with pytest.raises(SpecError, match=r"delta=-1 was asked for; it must be at least 0"):
        Rule("*", 4, 4, "ewgs", options={"delta": -1})
    with pytest.raises(SpecError, match=r"percentile=0 was asked for"):
        Rule("*", 4, 4, options={"percentile": 0})


# ---- budget, backends ------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", ["mean_weight_bits", "mean_activation_bits", "bops", "weight_bytes"])
@pytest.mark.parametrize("value", [0, -1, math.nan])
def test_a_budget_is_above_zero(field, value):
    with pytest.raises(SpecError, match=rf"budget {field}={value!r} was asked for; it must be above 0"):
        Budget(**{field: value})
    assert Budget(**{field: 0.5})
    assert not Budget()


def test_backends_have_a_bound_on_agreement():
    assert set(BACKENDS) == {"x86", "onednn", "inductor", "fbgemm", "qnnpack", "onnxruntime", "openvino"}
    assert all(get_backend(name).name == name and 90 < spec.agreement <= 100 for name, spec in BACKENDS.items())


def test_errors_are_of_one_family():
    for kind in (SpecError, RuleError, UnknownNameError):
        assert issubclass(kind, FxQuantError)
        assert issubclass(kind, ValueError)
    assert did_you_mean("x", [f"layer{i}" for i in range(60)]).endswith(", ...")
