"""prepare(): who gets which quantizer, and what it says about models and data that it cannot take."""

from __future__ import annotations

import contextlib
import copy
import itertools

import pytest
import timm.layers
import torch
from torch import nn
from torch.nn import functional as F

import fxquant as fq
from fxquant import Rule, cost
from fxquant.errors import (
    ConstantTensorError,
    EmptyDataError,
    FxQuantError,
    NonFiniteError,
    RuleError,
    SpecError,
    TraceError,
    UnknownNameError,
)
from fxquant.estimators import ESTIMATORS, Estimator
from fxquant.layers import QATConv2d, QATLayer, QATLinear
from fxquant.prepare import calibrate
from fxquant.qconfig import EdgeFakeQuantize
from tests.conftest import say_of_vnni
from tests.models import TinyMobile, TinyResidual, settle
from tests.test_trace import Branching

ALL4 = (Rule("*", 4, 4),)


def images(count: int = 8) -> torch.Tensor:
    return torch.randn(count, 3, 16, 16)


def tiny(model=TinyResidual) -> nn.Module:
    return settle(model(), images())


def edges(model: nn.Module) -> dict[str, EdgeFakeQuantize]:
    return {name: m for name, m in model.named_modules() if isinstance(m, EdgeFakeQuantize)}


# ---- what a prepared model looks like --------------------------------------------------------------------


def test_conv_bn_relu_become_one_layer_with_quantizers_of_its_own():
    model = tiny()
    prepared = fq.prepare(model, ALL4, calibration=[images()])
    layers = {name: m for name, m in prepared.named_modules() if isinstance(m, QATLayer)}
    assert list(layers) == ["stem", "conv1", "conv2", "shortcut", "head"]
    assert {name: (m.bn is not None, m.relu) for name, m in layers.items()} == {
        "stem": (True, True),  # an in-place ReLU
        "conv1": (True, True),  # an Identity stands between the two
        "conv2": (True, False),
        "shortcut": (False, False),
        "head": (False, False),
    }
    assert isinstance(layers["head"], QATLinear)
    assert isinstance(layers["stem"], QATConv2d)
    assert torch.equal(layers["conv2"].bn.running_var, model.bn2.running_var)
    assert torch.equal(layers["conv2"].weight, model.conv2.weight)
    quantizers = [q for m in layers.values() for q in (m.input_fake_quant, m.weight_fake_quant)]
    assert len({id(q) for q in quantizers}) == 10
    assert all(q.whole_bits == 4 for q in quantizers)
    # images and what hardly any ReLU precedes are two-sided, what a ReLU precedes is one-sided
    schemes = {name: m.input_fake_quant.grid_scheme for name, m in layers.items()}
    assert schemes == dict.fromkeys(layers, "one_sided") | {"stem": "affine"}


@pytest.mark.parametrize(
    ("backend", "addends"),
    [(name, ["conv2_edge", "shortcut_edge"]) for name in ("fbgemm", "qnnpack", "onnxruntime")]
    # their kernels add before they round: what the layer that comes last gives goes in as it is
    + [(name, ["conv2_edge", "shortcut"]) for name in ("x86", "onednn")],
)
def test_edges_stand_around_the_addition_alone_at_8_bits(backend, addends):
    prepared = fq.prepare(tiny(), ALL4, calibration=[images()], backend=backend)
    assert set(edges(prepared)) == {"conv2_edge", "shortcut_edge", "relu_2_edge"} & {*addends, "relu_2_edge"}
    assert all(edge.whole_bits == 8 for edge in edges(prepared).values())
    called = [n.target for n in prepared.graph.nodes if n.op == "call_module"]
    after = ["shortcut_edge"] if "shortcut_edge" in addends else []
    assert called == ["stem", "pool", "conv1", "conv2", "conv2_edge", "shortcut", *after, "relu_2_edge", "head"]
    (add,) = [n for n in prepared.graph.nodes if n.name == "add"]
    assert [a.target for a in add.args] == addends


def test_a_concatenation_shares_one_quantizer():
    prepared = fq.prepare(tiny(TinyMobile), ALL4, calibration=[images()])
    assert set(edges(prepared)) == {"hardswish_edge"}
    (cat,) = [n for n in prepared.graph.nodes if n.name == "cat"]
    assert {a.target for a in cat.args[0]} | {u.target for u in cat.users} == {"hardswish_edge"}
    assert prepared.depthwise.groups == 8
    assert prepared.pointwise.input_fake_quant.grid_scheme == "one_sided"
    assert prepared.depthwise.input_fake_quant.grid_scheme == "affine"  # hardswish reaches below 0


def test_a_model_without_arithmetic_has_no_edges():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(196, 5))
    prepared = fq.prepare(model, ALL4, calibration=[images()])
    assert edges(prepared) == {}
    assert sum(isinstance(m, Estimator) for m in prepared.modules()) == 4


@pytest.mark.parametrize("bits", [6, 8])
def test_residual_bits(bits):
    prepared = fq.prepare(tiny(), ALL4, calibration=[images()], residual_bits=bits)
    assert {e.whole_bits for e in edges(prepared).values()} == {bits}
    fq.freeze(prepared)
    reference = fq.convert(prepared)
    assert reference.relu_2_edge_quantize.quant_max == 2**bits - 1
    assert fq.verify(prepared, reference, [images()]).reference_equals_fake_quant


def test_rules_reach_their_layers(with_vnni):
    rules = [
        Rule("first|last", 8, 8, "ste"),
        Rule("shortcut", 3, 5, "pege", per_channel=False),
        Rule(r"re:conv\d", (2, 6), 2, "nipq"),
    ]
    prepared = fq.prepare(tiny(), rules, calibration=[images()])
    seen = {
        name: (m.weight_fake_quant.name, m.weight_fake_quant.bits, m.input_fake_quant.bits)
        for name, m in prepared.named_modules()
        if isinstance(m, QATLayer)
    }
    assert seen == {
        "stem": ("ste", 8, 8),
        "conv1": ("nipq", (2, 6), 2),
        "conv2": ("nipq", (2, 6), 2),
        "shortcut": ("pege", 3, 5),
        "head": ("ste", 8, 8),
    }
    assert prepared.shortcut.weight_fake_quant.channels == 1
    assert prepared.conv1.weight_fake_quant.channels == 16
    assert {n: r.pattern for n, r in prepared.meta["fxquant"].rules.items()} == {
        "stem": "first|last",
        "head": "first|last",
        "shortcut": "shortcut",
        "conv1": r"re:conv\d",
        "conv2": r"re:conv\d",
    }
    assert {e.whole_bits for e in edges(prepared).values()} == {8}


@pytest.mark.parametrize("kept", ["conv1", "stem", "head", "shortcut"])
@pytest.mark.parametrize("by", ["rule", "no rule"])
def test_a_layer_kept_float_is_plain_and_the_rest_converts_exactly(kept, by):
    x = images()
    others = "|".join({"stem", "conv1", "conv2", "shortcut", "head"} - {kept})
    rules = [Rule(kept, None, None), *ALL4] if by == "rule" else [Rule(others, 4, 4)]
    prepared = fq.prepare(settle(TinyResidual(), x), rules, calibration=[x])
    kind = nn.Linear if kept == "head" else nn.Conv2d
    assert any(type(m) is kind for m in prepared.modules())
    assert sum(isinstance(m, QATLayer) for m in prepared.modules()) == 4
    F.cross_entropy(prepared.train()(x), torch.arange(8) % 5).backward()
    widths = fq.freeze(prepared)
    assert kept not in widths
    assert kept not in prepared.meta["fxquant"].costs
    reference = fq.convert(prepared)
    with torch.no_grad():
        assert torch.equal(prepared(x), reference(x))
    assert fq.verify(prepared, reference, [images()]).reference_equals_fake_quant


@pytest.mark.parametrize("estimator", sorted(ESTIMATORS))
def test_all_parameters_exist_with_stable_names(estimator):
    x = images()
    prepared = fq.prepare(settle(TinyResidual(), x), [Rule("*", 4, 4, estimator)], calibration=[x]).train()
    before = {name: (id(p), p.shape) for name, p in prepared.named_parameters()}
    state = list(prepared.state_dict())
    grouped = [id(p) for group in fq.param_groups(prepared, lr=0.1) for p in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(p) for p in prepared.parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(fq.param_groups(prepared, lr=0.01))
    F.cross_entropy(prepared(x), torch.arange(8) % 5).backward()
    missing = [name for name, p in prepared.named_parameters() if p.requires_grad and p.grad is None]
    assert missing == []
    optimizer.step()
    assert before == {name: (id(p), p.shape) for name, p in prepared.named_parameters()}
    assert state == list(prepared.state_dict())
    # the same for another prepare of the same model: what a checkpoint relies on
    again = fq.prepare(settle(TinyResidual(), x), [Rule("*", 4, 4, estimator)], example_inputs=(x,))
    assert state == list(again.state_dict())


def test_ranges_of_a_prepared_model_come_from_the_calibration_data():
    x = images(16)
    rules = [Rule("*", 8, 8, init="minmax")]
    prepared = fq.prepare(settle(TinyResidual(), x), rules, calibration=[(x[:8], "labels"), (x[8:], "labels")])
    low, high = (end.detach() for end in prepared.stem.input_fake_quant.range())
    step = float(prepared.stem.input_fake_quant.calculate_qparams()[0])
    assert abs(float(low) - float(x.min())) <= step
    assert abs(float(high) - float(x.max())) <= step


def test_calibration_runs_in_float_and_leaves_batch_norm_alone():
    x = images()
    model = settle(TinyResidual(), x).train()
    prepared = fq.prepare(model, ALL4, calibration=[x])
    assert prepared.training
    assert torch.equal(prepared.stem.bn.running_mean, model.bn.running_mean)
    assert int(prepared.stem.bn.num_batches_tracked) == int(model.bn.num_batches_tracked)
    # Float ranges: those of conv2's input do not depend on the widths before it.
    wide = fq.prepare(model, [Rule("conv2", 4, 4), Rule("*", 8, 8)], calibration=[x])
    narrow = fq.prepare(model, [Rule("conv2", 4, 4), Rule("*", 2, 2)], calibration=[x])
    assert torch.equal(wide.conv2.input_fake_quant.scale(), narrow.conv2.input_fake_quant.scale())


def test_calibrating_again_on_two_sided_data_lets_the_zero_point_learn():
    x = images()
    prepared = fq.prepare(settle(TinyResidual(), x), ALL4, calibration=[x.abs()])
    entry = prepared.stem.input_fake_quant
    assert entry.grid_scheme == "one_sided"
    assert not entry.zero_fraction.requires_grad
    calibrate(prepared, [x])
    assert entry.grid_scheme == "affine"
    assert entry.zero_fraction.requires_grad


def test_prepare_without_data_waits_for_a_range():
    x = images()
    prepared = fq.prepare(settle(TinyResidual(), x), ALL4, example_inputs=(x[:1],))
    with pytest.raises(SpecError, match=r"stem\.input_fake_quant: no range has been set yet\. Run a calibration batch"):
        fq.freeze(prepared)
    calibrate(prepared, [x])
    assert set(fq.freeze(prepared).values()) == {(4, 4)}


# ---- what is refused, and what is left behind ------------------------------------------------------------


def refused(kind: type[FxQuantError], words: str, model: nn.Module, rules=ALL4, **arguments) -> None:
    """prepare() raises ``kind`` with ``words``, and the model is as before."""
    arguments.setdefault("calibration", [images()])
    state = copy.deepcopy(model.state_dict())
    modes = [m.training for m in model.modules()]
    attributes = [set(vars(m)) for m in model.modules()]
    with pytest.raises(kind, match=words):
        fq.prepare(model, rules, **arguments)
    after = model.state_dict()
    assert list(after) == list(state)
    assert all(torch.equal(after[n].nan_to_num(7), t.nan_to_num(7)) for n, t in state.items())
    assert modes == [m.training for m in model.modules()]
    assert attributes == [set(vars(m)) for m in model.modules()]
    assert not any(m._forward_hooks for m in model.modules())


def test_no_rule_is_refused():
    refused(SpecError, r"no rule was given, so no layer would be quantized; Rule\('\*', 4, 4\) quantizes", tiny(), [])


def test_a_rule_that_matches_nothing_is_refused():
    words = r"rule 'conv3' matches no quantizable layer .* of this model; did you mean 'conv[12]' or 'conv[12]'"
    refused(RuleError, words, tiny(), [Rule("conv3", 8, 8), *ALL4])


def test_an_unknown_backend_is_refused():
    refused(UnknownNameError, r"unknown backend 'qnpack': did you mean 'qnnpack'\?", tiny(), backend="qnpack")


def test_a_residual_width_outside_1_to_8_is_refused():
    refused(SpecError, r"residual_bits=9 was asked for; widths are whole numbers", tiny(), residual_bits=9)


def test_data_or_example_inputs_are_needed():
    refused(SpecError, r"needs calibration data or example_inputs", tiny(), calibration=None)


def test_a_model_without_layers_is_refused():
    refused(SpecError, r"Sequential has no Conv2d or Linear layer to quantize", nn.Sequential(nn.ReLU()))


def test_a_model_that_cannot_be_captured_is_refused():
    class Root(TinyResidual):
        def forward(self, x):
            return super().forward(x) if x.mean() > 9 else super().forward(-x)

    refused(
        TraceError, r"Root cannot be captured as a graph, at .*test_prepare\.py:\d+: return .* if x\.mean\(\)", Root()
    )


def test_a_submodule_that_cannot_be_captured_stays_float():
    x = images()
    with pytest.warns(UserWarning, match=r"kept in float, as one call: submodule 'block\.1' .* if x\.sum\(\) > 0"):
        model = fq.prepare(Branching(), [Rule("*", 4, 4)], calibration=[x])
    (reason,) = model.meta["fxquant"].opaque.values()
    assert "if x.sum() > 0" in reason
    fq.freeze(model)
    assert torch.equal(model(x), fq.convert(model)(x))


def test_a_model_that_returns_a_tuple_is_refused():
    class Pair(TinyResidual):
        def forward(self, x):
            return super().forward(x), x

    refused(TraceError, r"the model returns a tuple; fxquant prepares models that return one tensor", Pair())


@pytest.mark.parametrize("empty", [[], iter(())])
def test_an_empty_loader_is_refused(empty):
    refused(EmptyDataError, r"the calibration data yielded no batch; .* mind drop_last", tiny(), calibration=empty)


def test_an_iterator_that_can_be_read_once_is_kept():
    """The first batch traces, all of them calibrate, and freeze reads them again."""
    model = fq.prepare(TinyResidual(), [Rule("*", 4, 4)], calibration=iter([images(), images()]))
    assert len(list(model.meta["fxquant"].calibration)) == 2
    fq.freeze(model)
    assert copy.deepcopy(model).meta["fxquant"].calibration is model.meta["fxquant"].calibration


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_no_numbers_are_refused_with_the_layer(value):
    model = tiny()
    model.conv2.weight.data[3, 1, 0] = value
    refused(NonFiniteError, r"the weight of layer 'conv2' holds 3 NaN or infinite values; load a sound", model)


@pytest.mark.parametrize("value", [0.0, 0.25])
def test_a_weight_that_is_constant_is_refused_with_the_layer(value):
    model = tiny()
    nn.init.constant_(model.shortcut.weight, value)
    refused(
        ConstantTensorError, rf"the weight of layer 'shortcut' is {value:g} everywhere, .* keep the layer float", model
    )
    assert fq.prepare(model, [Rule("shortcut", None, None), *ALL4], calibration=[images()]) is not None


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_images_that_are_no_numbers_are_refused_with_the_layer(value):
    x = images()
    bad = x.clone()
    bad[0, 0, 0, :2] = value
    words = r"stem\.input_fake_quant: 2 of 6144 values are NaN or infinite; a range cannot be set from them"
    refused(NonFiniteError, words, settle(TinyResidual(), x), calibration=[x, bad])


def test_activations_that_overflow_are_refused_with_the_layer():
    model = tiny()
    model.bn1.weight.data.fill_(3.4e38)
    refused(NonFiniteError, r"conv2\.input_fake_quant: \d+ of \d+ values are NaN or infinite; .*learning rate", model)


def test_activations_that_are_constant_are_refused_with_the_layer():
    model = tiny()
    model.bn1.bias.data.fill_(-100)  # nothing gets through the ReLU
    refused(ConstantTensorError, r"the input of layer 'conv2': all values seen are 0, so there is no range", model)
    rules = [Rule("conv2", None, None), *ALL4]
    constant = [torch.full((8, 3, 16, 16), 0.5)]
    words = r"the input of layer 'stem': all values seen are 0\.5, so there is no range"
    refused(ConstantTensorError, words, tiny(), rules, calibration=constant)


def test_the_rule_that_messages_recommend_is_one_that_exists():
    """A layer stays float with both widths None; with one of them, Rule itself refuses."""
    advice = r"Rule\(name, None, None\)|weight_bits=None, activation_bits=None"
    model = tiny()
    nn.init.zeros_(model.shortcut.weight)
    refused(ConstantTensorError, advice, model)
    refused(ConstantTensorError, advice, tiny(), calibration=[images() * 0])


def test_stochastic_depth_that_capture_turns_off_is_said():
    drop = nn.Sequential(nn.Conv2d(3, 4, 3), timm.layers.DropPath(0.1), nn.Dropout(0.2), nn.Flatten())
    with pytest.warns(
        UserWarning, match=r"module '1': what is computed in training alone .* is off in the prepared graph"
    ):
        prepared = fq.prepare(drop, ALL4, calibration=[images()])
    assert any(isinstance(m, nn.Dropout) for m in prepared.modules())  # which drops on in training
    drop[1].drop_prob = 0.0
    fq.prepare(drop, ALL4, calibration=[images()])


def test_padding_that_integer_kernels_lack_is_made_in_float_before_the_layer():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"), nn.Flatten())
    prepared = fq.prepare(model, ALL4, calibration=[images()])
    layer = prepared.get_submodule("1")
    assert isinstance(layer, QATConv2d)
    assert (layer.padding_mode, layer.padding) == ("zeros", (0, 0))
    assert "1.weight" in prepared.state_dict()


def test_calibration_stops_after_its_batches():
    x = images()
    prepared = fq.prepare(settle(TinyResidual(), x), ALL4, example_inputs=(x,))
    calibrate(prepared, itertools.repeat(x), max_batches=2)  # an endless loader
    assert prepared.stem.input_fake_quant._initialized


# ---- what an engine would compute wrongly ------------------------------------------------------------------


def mobile() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(), nn.Flatten(), nn.Linear(800, 5)
    )


def widths(prepared) -> list[tuple[int, int]]:
    layers = cost.qat_layers(prepared).values()
    return [(layer.weight_fake_quant.whole_bits, layer.input_fake_quant.whole_bits) for layer in layers]


def test_a_depthwise_convolution_at_full_8_bits_is_reduced_for_fbgemm(with_vnni):
    x = torch.randn(4, 3, 12, 12)
    with pytest.warns(UserWarning, match=r"layer '2': activation_bits=8 becomes 7 at most: fbgemm's depthwise kernels"):
        prepared = fq.prepare(mobile(), [fq.Rule("*", 8, 8)], calibration=[x], backend="fbgemm")
    assert widths(prepared) == [(8, 8), (8, 7), (8, 8)]
    assert prepared.meta["fxquant"].rules["2"].activation_bits == 7
    fq.freeze(prepared)
    lowered = fq.lower(fq.convert(prepared))
    reasons = [entry.reason for entry in lowered.meta["fxquant_lowered"]]
    assert all("without VNNI" in reason for reason in reasons if reason)  # of the others, on a CPU that has none


@pytest.mark.parametrize(("backend", "bits"), [("x86", 8), ("onednn", 8), ("fbgemm", 7), ("qnnpack", 8)])
def test_widths_that_fit_the_engine_are_left_alone(with_vnni, backend, bits):
    x = torch.randn(4, 3, 12, 12)
    prepared = fq.prepare(mobile(), [fq.Rule("*", bits, 8)], calibration=[x], backend=backend)
    assert widths(prepared) == [(bits, 8)] * 3


@pytest.mark.parametrize("backend", ["x86", "onednn", "fbgemm", "onnxruntime", "openvino"])
def test_without_vnni_weights_have_7_bits_at_most(without_vnni, backend):
    x = torch.randn(4, 3, 12, 12)
    with pytest.warns(UserWarning, match=r"weight_bits=8 becomes 7 at most: without VNNI instructions") as caught:
        prepared = fq.prepare(mobile(), [fq.Rule("*", 8, 8)], calibration=[x], backend=backend)
    assert [str(warning.message).split(":")[0] for warning in caught] == ["layers '0', '2', '5'"]
    assert widths(prepared) == [(7, 8)] * 3
    with pytest.warns(UserWarning, match=r"weight_bits=\(2, 8\) becomes 7 at most"):
        learned = fq.prepare(mobile(), [fq.Rule("*", (2, 8), 8, "nipq")], calibration=[x], backend=backend)
    assert {layer.weight_fake_quant.bits for layer in cost.qat_layers(learned).values()} == {(2, 7)}


def test_the_cpu_a_model_is_for_need_not_be_the_one_at_hand(monkeypatch):
    x = torch.randn(4, 3, 12, 12)
    for vnni, bits in ((True, 8), (False, 7)):
        say_of_vnni(monkeypatch, not vnni, "fxquant.prepare")
        with contextlib.nullcontext() if vnni else pytest.warns(UserWarning, match="weight_bits=8 becomes 7 at most"):
            prepared = fq.prepare(mobile(), [fq.Rule("*", 8, 8)], calibration=[x], vnni=vnni)
        assert widths(prepared) == [(bits, 8)] * 3
        capacities = fq.analyze(prepared).capacities.values()
        assert {tensor.widest for tensor in capacities if tensor.kind == "weight"} == {bits}


def test_without_vnni_qnnpack_and_narrow_weights_are_left_alone(without_vnni):
    x = torch.randn(4, 3, 12, 12)
    assert widths(fq.prepare(mobile(), [fq.Rule("*", 8, 8)], calibration=[x], backend="qnnpack")) == [(8, 8)] * 3
    assert widths(fq.prepare(mobile(), [fq.Rule("*", 4, 8)], calibration=[x], backend="x86")) == [(4, 8)] * 3


def test_a_layer_that_reads_an_edge_of_its_own_width_shares_its_quantizer():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Conv2d(i, 8, 3, padding=1) for i in (3, 8, 8))

        def forward(self, x):
            x = F.relu(self.a(x))
            return (self.c(F.relu(self.b(x) + x)) + x).mean((2, 3))

    x = torch.randn(4, 3, 12, 12)
    wide = fq.prepare(Block(), [fq.Rule("*", 8, 8)], calibration=[x])
    assert wide.b.input_fake_quant is wide.get_submodule("a_edge")
    assert wide.c.input_fake_quant is wide.get_submodule("relu_1_edge")
    narrow = fq.prepare(Block(), [fq.Rule("*", 4, 4)], calibration=[x])
    assert narrow.b.input_fake_quant is not narrow.get_submodule("a_edge")
    wide(x).sum().backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in wide.parameters())
    for prepared in (wide, narrow):
        fq.freeze(prepared)
        reference = fq.convert(prepared)
        assert fq.verify(prepared, reference, [x, 3 * x]).reference_equals_fake_quant
    assert not hasattr(fq.convert(wide), "b_quantize")  # reads the codes of the edge
    assert hasattr(fq.convert(narrow), "b_quantize")


# ---- layers called more than once ------------------------------------------------------------------------


class Twice(nn.Module):
    """A layer called twice, with something of its own behind each call."""

    def __init__(self, first: nn.Module, second: nn.Module):
        super().__init__()
        self.stem, self.shared, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 3)
        self.first, self.second = first, second
        for norm in (first, second):
            if isinstance(norm, nn.BatchNorm2d):
                norm.running_mean.normal_()
                norm.running_var.uniform_(0.5, 2)

    def forward(self, x):
        x = self.first(self.shared(self.stem(x)))
        return self.head((x * self.second(self.shared(x))).mean((2, 3)))


@pytest.mark.parametrize(("first", "second"), [
    (nn.BatchNorm2d(4), nn.BatchNorm2d(4)), (nn.BatchNorm2d(4), nn.Identity()), (nn.Identity(), nn.BatchNorm2d(4)),
    (nn.ReLU(), nn.Identity()), (nn.Identity(), nn.ReLU6()),
])  # fmt: skip
def test_calls_of_one_layer_that_would_fuse_in_different_ways_are_refused(first, second):
    """torch.ao gives all calls what is behind one of them: another network."""
    x = 3 * torch.randn(4, 3, 10, 10)
    with pytest.raises(TraceError, match=r"layer 'shared' called more than once, .* a layer of its own \(by up to"):
        fq.prepare(Twice(first, second), [Rule("*", 8, 8)], calibration=[x])


@pytest.mark.parametrize("behind", [nn.Identity(), nn.ReLU(), nn.BatchNorm2d(4)])
def test_calls_of_one_layer_that_fuse_alike_are_prepared(behind):
    x = torch.randn(4, 3, 10, 10)
    model = Twice(behind, behind).eval()
    prepared = fq.prepare(model, [Rule("*", 8, 8)], calibration=[x])
    assert (prepared(x) - model(x)).abs().max() < 0.1 * model(x).abs().max()


@pytest.mark.parametrize("layers", [1, 2])
def test_transformer_layers_of_torch_are_quantized_and_their_attention_stays_float(layers):
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Conv2d(3, 16, 4, 4), nn.Linear(16, 5)
            layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
            self.encoder = layer if layers == 1 else nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)

        def forward(self, x):
            return self.head(self.encoder(self.embed(x).flatten(2).transpose(1, 2)).mean(1))

    x = torch.randn(4, 3, 16, 16)
    prepared = fq.prepare(Tokens(), ALL4, calibration=[x])
    names = [name for name in prepared.meta["fxquant"].rules if "linear" in name]
    assert len(names) == 2 * layers
    prepared.train()(x).sum().backward()
    fq.freeze(prepared)
    reference = fq.convert(prepared)
    assert fq.verify(prepared, reference, [x]).reference_equals_fake_quant
    assert sum(isinstance(m, nn.MultiheadAttention) for m in reference.modules()) == layers


def test_layers_inside_of_a_module_that_is_one_call_stay_as_they_are():
    class Attends(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.head = nn.MultiheadAttention(16, 2, batch_first=True), nn.Linear(16, 5)

        def forward(self, x):
            tokens = x.flatten(2).transpose(1, 2)
            return self.head(self.attention(tokens, tokens, tokens, need_weights=False)[0].mean(1))

    prepared = fq.prepare(Attends(), ALL4, example_inputs=(torch.randn(2, 16, 3, 3),))
    assert [name for name, module in prepared.named_modules() if isinstance(module, QATLayer)] == ["head"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_parameters_of_another_type_are_refused(dtype):
    words = rf"is {dtype}, while quantizers compute in torch's default, torch.float32; call model.to\(torch.float32\)"
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()).to(dtype)
    with pytest.raises(SpecError, match=words):
        fq.prepare(model, ALL4, calibration=[images().to(dtype)])
