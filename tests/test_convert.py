"""The reference graph: bit for bit the frozen model, and the integers it says it is."""

from __future__ import annotations

import copy
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fxquant as fq
from fxquant.data import load_data
from fxquant.errors import NotFrozenError, SpecError
from fxquant.estimators import ESTIMATORS
from fxquant.integer import IntegerConv2d, IntegerLinear, Quantize
from fxquant.layers import QATLayer
from fxquant.lower.native import Recorder
from tests.interpreter import interpret
from tests.models import TinyMobile, TinyResidual, settle

MODELS = (TinyResidual, TinyMobile)
# All widths for lsq, the telling ones for the others.
ESTIMATOR_WIDTHS = [(e, b) for e in sorted(ESTIMATORS) for b in (range(1, 9) if e == "lsq" else (1, 2, 4, 8))]


def images(count: int = 8) -> torch.Tensor:
    return torch.randn(count, 3, 16, 16)


def trained(model: nn.Module, rules, x: torch.Tensor, steps: int = 2) -> nn.Module:
    """Prepared, and trained for a few steps with BatchNorms whose gammas are negative, zero and next to zero."""
    prepared = fq.prepare(settle(model, x), rules, calibration=[x]).train()
    set_gammas(prepared)
    optimizer = torch.optim.SGD(fq.param_groups(prepared, lr=0.02), momentum=0.9)
    labels = torch.arange(len(x)) % 5
    for _ in range(steps):
        loss = F.cross_entropy(prepared(x), labels)
        assert torch.isfinite(loss)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    set_gammas(prepared)  # the steps moved them
    return prepared


def set_gammas(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.affine:
            with torch.no_grad():
                module.weight[:5] = torch.tensor([-0.7, 0.0, 1e-20, -1e-20, -1e-4])


def integers(model: nn.Module, rules, x: torch.Tensor):
    """(frozen, reference) of a briefly trained model."""
    frozen = trained(model, rules, x)
    fq.freeze(frozen)
    return frozen, fq.convert(frozen)


def recorded(graph, x: torch.Tensor) -> Recorder:
    with torch.no_grad():
        recorder = Recorder(graph)
        recorder.run(x)
    return recorder


# ---- bit for bit -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize(("estimator", "bits"), ESTIMATOR_WIDTHS)
def test_reference_equals_the_frozen_model(model, per_channel, estimator, bits):
    x = images()
    frozen, reference = integers(model(), [fq.Rule("*", bits, bits, estimator, per_channel)], x)
    held_out = 2 * images(16)  # beyond the calibrated range as well
    with torch.no_grad():
        want, got = frozen(held_out), reference(held_out)
    assert torch.isfinite(want).all()
    assert torch.equal(want, got)
    report = fq.verify(frozen, reference, [held_out])
    assert report.reference_equals_fake_quant
    assert report.different_tensors == {}
    for layer in (m for m in reference.modules() if isinstance(m, (IntegerConv2d, IntegerLinear))):
        assert layer.weight.abs().max() <= max(2 ** (bits - 1) - 1, 1)


@pytest.mark.parametrize("estimator", ["nipq", "gdnsq"])
@pytest.mark.parametrize("model", MODELS)
def test_learned_widths_convert_exactly(model, estimator):
    frozen, reference = integers(model(), [fq.Rule("*", (2, 8), (2, 8), estimator)], images())
    assert fq.verify(frozen, reference, [images()]).reference_equals_fake_quant


class Odd(nn.Module):
    """Dilation, unequal strides and paddings, groups, a two-sided input that is padded, a layer used twice."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 8, (3, 5), stride=(2, 1), padding=(1, 2))
        self.b = nn.Conv2d(8, 8, 3, dilation=2, padding=2, groups=4)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.a(x)
        x = torch.relu(self.b(torch.relu(self.b(x))))
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("bits", [1, 3, 8])
def test_unusual_geometry_and_a_layer_used_twice(bits):
    x = images()
    frozen, reference = integers(Odd(), [fq.Rule("*", bits, bits)], x)
    assert fq.verify(frozen, reference, [images()]).reference_equals_fake_quant
    assert_codes_equal(reference, images())


@pytest.mark.parametrize("options", [{"affine": False}, {"track_running_stats": False}, {"momentum": None}], ids=str)
@pytest.mark.parametrize("relu", [nn.Identity, nn.ReLU, nn.ReLU6])
def test_batch_norms_of_every_kind(options, relu):
    """One without gamma and beta is folded, one that has nothing but the batch's own statistics stays as it is."""
    norm = nn.BatchNorm2d(8, **options)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), norm, relu(), nn.Conv2d(8, 5, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    frozen, reference = integers(model, [fq.Rule("*", 4, 4)], images())
    assert fq.verify(frozen, reference, [images()]).reference_equals_fake_quant
    called = [type(m).__name__ for m in reference.modules() if isinstance(m, nn.BatchNorm2d)]
    assert called == ([] if norm.track_running_stats else ["BatchStatisticsNorm2d"])


class SameNames(nn.Module):
    """``block.conv`` and ``block_conv`` are different layers."""

    def __init__(self):
        super().__init__()
        self.block = nn.Sequential()
        self.block.add_module("conv", nn.Conv2d(3, 4, 3))
        self.block_conv = nn.Conv2d(4, 4, 3)
        self.head = nn.Linear(4, 5)

    def forward(self, x):
        return self.head(torch.relu(self.block_conv(torch.relu(self.block.conv(x)))).mean((2, 3)))


def test_layer_names_that_differ_in_a_dot_only():
    frozen, reference = integers(SameNames(), [fq.Rule("*", 4, 4)], images())
    x = images()
    with torch.no_grad():
        assert torch.equal(frozen(x), reference(x))


def test_sums_beyond_the_integers_of_float32(with_vnni):
    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3 * 16 * 16, 5)

        def forward(self, x):
            return self.fc(x.flatten(1))

    model = Wide()
    nn.init.uniform_(model.fc.weight, 0.9, 1.0)
    x = images().abs() + 1
    prepared = fq.prepare(model, [fq.Rule("*", 8, 8, init="minmax")], calibration=[x])
    fq.freeze(prepared)
    reference = fq.convert(prepared)
    x = x + 100  # every code at its top: sums of 768 * 255 * 127
    assert reference.fc_integer.sum_dtype() == torch.float64
    deployed = interpret(reference, x)
    assert np.abs(deployed.values["fc_integer"]).max() > 2**24
    assert_codes_equal(reference, x)


def test_a_model_partly_in_float_converts_exactly():
    rules = [fq.Rule("conv1", None, None), fq.Rule("*", 4, 4)]
    frozen, reference = integers(TinyResidual(), rules, images())
    assert not hasattr(reference, "conv1_integer")
    assert fq.verify(frozen, reference, [images()]).reference_equals_fake_quant


# ---- integers --------------------------------------------------------------------------------------------


def assert_codes_equal(reference, x: torch.Tensor) -> None:
    """Codes and sums equal to the interpreter's, everywhere; logits to a few units in the last place of float32."""
    actual, truth = recorded(reference, x).values, interpret(reference, x)
    checked = 0
    for name, value in truth.values.items():
        if value.dtype == np.int64:
            assert np.array_equal(actual[name].numpy(), value), name
            checked += 1
    assert checked >= 2
    logits = actual[next(n for n in reference.graph.nodes if n.op == "output").args[0].name].numpy()
    np.testing.assert_allclose(logits, truth.output, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("model", MODELS)
def test_codes_are_those_of_an_independent_interpreter(model, bits):
    _, reference = integers(model(), [fq.Rule("*", bits, bits)], images())
    assert_codes_equal(reference, images(64))


def test_codes_of_a_trained_network_are_those_of_an_independent_interpreter(digits_run):
    outcome, _ = digits_run
    assert_codes_equal(outcome.reference, load_data("digits", 16).test_images[:200])


def assert_only_ties_differ(reference, x: torch.Tensor) -> None:
    """Real arithmetic gives the same codes, but for values within 1e-3 of the middle between two codes.

    The deployed requantization rounds to float32 twice or thrice, each time by at most 2^-24 of a value that is at
    most some hundred steps where it is not clamped: 1e-4 steps. Only what lies that near to a tie can go either way.
    """
    deployed = interpret(reference, x)
    real = interpret(reference, x, deployed=deployed)
    assert real.unrounded
    for name, exact in real.unrounded.items():
        low, high = reference.get_submodule(_target(reference, name)).bounds.tolist()
        kept = (exact > low - 1) & (exact < high + 1)
        assert kept.any(), name
        assert np.abs(exact - deployed.unrounded[name])[kept].max() < 1e-3, name
        differ = np.clip(np.rint(exact), low, high) != deployed.values[name]
        to_tie = np.abs(np.abs(exact - np.floor(exact)) - 0.5)
        assert (to_tie[differ] < 1e-3).all(), name
        assert differ.mean() < 1e-3, name


def _target(graph, name: str) -> str:
    return next(node.target for node in graph.graph.nodes if node.name == name)


@pytest.mark.parametrize("bits", [2, 8])
@pytest.mark.parametrize("model", MODELS)
def test_float32_requantization_strays_from_real_arithmetic_at_ties_only(model, bits):
    _, reference = integers(model(), [fq.Rule("*", bits, bits)], images())
    assert_only_ties_differ(reference, images(64))


def test_float32_requantization_of_a_trained_network_strays_at_ties_only(digits_run):
    outcome, _ = digits_run
    assert_only_ties_differ(outcome.reference, load_data("digits", 16).test_images[:200])


@pytest.mark.parametrize("model", MODELS)
def test_dtypes_are_plain_integers_and_codes_stay_inside_their_width(model):
    bits = 3
    _, reference = integers(model(), [fq.Rule("*", bits, bits)], images())
    values = recorded(reference, 3 * images(32)).values
    modules = dict(reference.named_modules())
    seen = {"quantize": 0, "layer": 0}
    for node in reference.graph.nodes:
        module = modules.get(node.target) if node.op == "call_module" else None
        if isinstance(module, Quantize):
            codes = values[node.name]
            assert codes.dtype == torch.uint8
            top = 255 if "edge" in node.target else 2**bits - 1
            assert (module.quant_min, module.quant_max) == (0, top)
            assert 0 <= int(module.zero_point) <= top
            assert codes.max() <= top
            assert codes.unique().numel() > 1
            seen["quantize"] += 1
        elif isinstance(module, (IntegerConv2d, IntegerLinear)):
            assert (module.weight.dtype, module.bias.dtype) == (torch.int8, torch.int32)
            assert values[node.name].dtype == torch.int32
            seen["layer"] += 1
    assert seen["layer"] == sum(isinstance(m, (nn.Conv2d, nn.Linear)) for m in model().modules())
    assert seen["quantize"] > seen["layer"]  # edges too


@pytest.mark.parametrize("model", MODELS)
def test_an_image_gets_the_same_result_alone_and_in_a_batch(model):
    frozen, reference = integers(model(), [fq.Rule("*", 4, 4)], images())
    x = images(16)
    with torch.no_grad():
        whole = reference(x)
        for index in (0, 7, 15):
            assert torch.equal(reference(x[index : index + 1]), whole[index : index + 1])
            assert torch.equal(frozen(x[index : index + 1]), whole[index : index + 1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_images_of_another_type_become_the_same_integers(dtype):
    x = images(64)
    frozen = trained(TinyResidual(), [fq.Rule("*", 4, 4)], x[:8])
    fq.freeze(frozen)
    reference = fq.convert(frozen)
    with torch.no_grad():
        assert torch.equal(reference(x.to(dtype)), frozen(x.to(dtype)))
        assert torch.equal(reference(x.to(dtype)), reference(x.to(dtype).float()))


# ---- who is changed --------------------------------------------------------------------------------------


def test_convert_asks_for_freeze_first():
    x = images()
    prepared = fq.prepare(settle(TinyResidual(), x), [fq.Rule("*", 4, 4)], calibration=[x])
    with pytest.raises(NotFrozenError, match=r"while quantizers still train; call fxquant\.freeze"):
        fq.convert(prepared)
    with pytest.raises(NotFrozenError, match=r"call fxquant\.freeze first"):
        prepared.stem.integer_parameters()


def test_convert_and_freeze_take_only_what_prepare_made():
    model = TinyResidual()
    with pytest.raises(SpecError, match=r"TinyResidual was not made by fxquant\.prepare"):
        fq.convert(model)
    with pytest.raises(SpecError, match=r"TinyResidual was not made by fxquant\.prepare"):
        fq.freeze(model)


def test_convert_leaves_the_frozen_model_as_it_is():
    x = images()
    frozen = trained(TinyResidual(), [fq.Rule("*", 4, 4)], x)
    fq.freeze(frozen)
    frozen.train()
    state = {k: v.clone() for k, v in frozen.state_dict().items()}
    nodes = [(node.name, node.target) for node in frozen.graph.nodes]
    reference = fq.convert(frozen)
    with torch.no_grad():
        for tensor in reference.state_dict().values():
            tensor.zero_()  # nothing is shared with it
    after = frozen.state_dict()
    assert list(after) == list(state)
    assert all(torch.equal(after[name], tensor) for name, tensor in state.items())
    assert nodes == [(node.name, node.target) for node in frozen.graph.nodes]
    assert frozen.training
    assert all(torch.equal(m.integer_form().layer.bias, m.integer_parameters()[2]) for m in _layers(frozen))


def _layers(model: nn.Module) -> list[QATLayer]:
    return [m for m in model.modules() if isinstance(m, QATLayer)]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("model", MODELS)
def test_the_float_model_is_left_as_it_is(model, training):
    x = images()
    original = settle(model(), x).train(training)
    state = copy.deepcopy(original.state_dict())
    modes = {name: m.training for name, m in original.named_modules()}
    prepared = fq.prepare(original, [fq.Rule("*", 4, 4)], calibration=[x])
    assert prepared.training is training
    F.cross_entropy(prepared.train()(x), torch.arange(len(x)) % 5).backward()
    fq.freeze(prepared)
    fq.convert(prepared)
    assert list(original.state_dict()) == list(state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in original.state_dict().items())
    assert modes == {name: m.training for name, m in original.named_modules()}
    assert not any(hasattr(m, "qconfig") for m in original.modules())
    assert all(p.grad is None and p.requires_grad for p in original.parameters())
    assert all(m.inplace for m in original.modules() if isinstance(m, nn.ReLU))


class Named(nn.Module):
    """Two layers and an activation, under names that fxquant gives to what it makes of the first one."""

    def __init__(self, name: str, other: nn.Module):
        super().__init__()
        self.c, self.fc = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 5)
        self.add_module(name, other)
        self.other = name

    def forward(self, x):
        x = self.c(x)
        return self.fc((x + getattr(self, self.other)(x)).mean((2, 3)))


@pytest.mark.parametrize(
    ("name", "other"),
    [
        *((f"c_{part}", nn.PReLU) for part in ("quantize", "integer", "rescale")),
        ("c_edge", lambda: nn.Conv2d(8, 8, 1)),
        ("add_edge", lambda: nn.Conv2d(8, 8, 1)),
        ("c_rescale_", nn.PReLU),
    ],
)
def test_a_users_module_may_have_the_name_of_one_of_ours(name, other, tmp_path):
    x = images()
    model = Named(name, other()).eval()
    prepared = fq.prepare(model, [fq.Rule("*", 8, 8)], calibration=[x])
    fq.freeze(prepared)
    reference = fq.convert(prepared)
    assert fq.verify(prepared, reference, [x]).reference_equals_fake_quant
    with torch.no_grad():
        assert (reference(x) - model(x)).abs().max() < 0.05 * model(x).abs().max()
    fq.save(reference, tmp_path / "model.fxq")
    assert torch.equal(fq.load(tmp_path / "model.fxq", model)(x), reference(x))


@pytest.mark.parametrize("name", ["c", "bn", "relu", "fc"])
@pytest.mark.parametrize("before", [False, True])
def test_what_a_forward_hook_changes_is_in_the_integers_too(name, before):
    x = images()
    model = nn.Sequential()
    for part, module in {
        "c": nn.Conv2d(3, 8, 3),
        "bn": nn.BatchNorm2d(8),
        "relu": nn.ReLU(),
        "pool": nn.AdaptiveAvgPool2d(1),
        "flat": nn.Flatten(),
        "fc": nn.Linear(8, 5),
    }.items():
        model.add_module(part, module)
    hooked = model.get_submodule(name)
    if before:
        hooked.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2 + 1,))
    else:
        hooked.register_forward_hook(lambda module, inputs, output: output * 2 + 1)
    settle(model, x).eval()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="module 'bn': what is computed in training alone")
        prepared = fq.prepare(model, [fq.Rule("*", 8, 8)], calibration=[x])
    fq.freeze(prepared, calibration=())
    reference = fq.convert(prepared)
    assert fq.verify(prepared, reference, [x]).reference_equals_fake_quant
    with torch.no_grad():
        assert (reference(x) - model(x)).abs().max() < 0.05 * model(x).abs().max()
