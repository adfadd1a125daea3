"""Kernels: on the network that trained they are used everywhere and agree; a wrong one is never used."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fxquant as fq
from fxquant.data import load_data
from fxquant.errors import EmptyDataError, SpecError, UnknownNameError
from fxquant.integer import IntegerConv2d, IntegerLinear
from fxquant.lower import native
from fxquant.lower.native import REFERENCE, Recorder
from tests.models import TinyResidual, settle

ENGINES = torch.backends.quantized.supported_engines
BACKENDS = [
    pytest.param(name, marks=pytest.mark.skipif(name not in ENGINES, reason=f"this torch has no engine {name}"))
    for name in ("x86", "onednn", "fbgemm", "qnnpack")
]


def reference_of(model: nn.Module, x: torch.Tensor, bits: int = 4, **rule) -> torch.fx.GraphModule:
    prepared = fq.prepare(model, [fq.Rule("*", bits, bits, **rule)], calibration=[x])
    fq.freeze(prepared)
    return fq.convert(prepared)


@pytest.fixture
def residual():
    x = torch.randn(16, 3, 16, 16)
    return reference_of(settle(TinyResidual(), x), x)


def recorded(graph, x: torch.Tensor) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        recorder = Recorder(graph)
        recorder.run(x)
    return recorder.values


def largest_gap(reference, lowered, backend: str, x: torch.Tensor) -> int:
    """Largest difference of codes anywhere, errors of earlier layers included."""
    return fq.verify(None, reference, [x], lowered={backend: lowered}).lowered[backend].max_code_difference


# ---- agreement -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_operator_of_a_trained_residual_network_runs_on_a_kernel(digits_run, backend):
    outcome, _ = digits_run
    lowered = fq.lower(outcome.reference, backend)
    report = lowered.meta["fxquant_lowered"]
    modules = dict(outcome.reference.named_modules())
    called = [modules[n.target] for n in outcome.reference.graph.nodes if n.op == "call_module"]
    additions = [n for n in outcome.reference.graph.nodes if n.op == "call_function"]
    operators = sum(isinstance(m, (IntegerConv2d, IntegerLinear, nn.MaxPool2d)) for m in called) + len(additions)
    assert operators == len(report) == 21
    assert {entry.kernel.removesuffix("_relu") for entry in report} == {
        "quantized.conv2d",
        "quantized.add",
        "quantized.max_pool2d",
        "aten._int_mm",
    }
    assert all(entry.max_code_difference <= 1 and entry.reason == "" for entry in report)
    assert not any(isinstance(m, (IntegerConv2d, IntegerLinear)) for m in lowered.modules())
    test = load_data("digits", 16)
    parity = fq.verify(None, outcome.reference, [(test.test_images, test.test_labels)], lowered={backend: lowered})
    assert parity.lowered[backend].argmax_agreement >= 99.9
    assert abs(parity.lowered[backend].accuracy - parity.reference_accuracy) <= 0.2  # one image of 599


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bits", [1, 2, 3, 8])
def test_lowered_codes_stay_inside_the_trained_width(backend, bits):
    x = torch.randn(16, 3, 16, 16)
    reference = reference_of(settle(TinyResidual(), x), x, bits)
    lowered = fq.lower(reference, backend)
    values = recorded(lowered, 4 * torch.randn(32, 3, 16, 16))
    narrow = 0
    for node in lowered.graph.nodes:
        if values.get(node.name) is None or values[node.name].dtype != torch.uint8:
            continue
        source = reference.get_submodule(node.meta.get(REFERENCE, node.name))
        assert source.quant_min <= values[node.name].min()
        assert values[node.name].max() <= source.quant_max
        if REFERENCE in node.meta and source.quant_max == 2**bits - 1:
            assert values[node.name].max() == source.quant_max  # inputs 4 times too large do reach the bound
            narrow += 1
    assert narrow


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_kernel_is_within_one_code_on_new_images(residual, backend):
    """Layer by layer on the reference's own codes, so that nothing accumulates."""
    lowered = fq.lower(residual, backend)
    want = recorded(residual, torch.randn(32, 3, 16, 16))
    kernels = [n for n in lowered.graph.nodes if REFERENCE in n.meta]
    assert kernels
    with native._kernels(backend), torch.no_grad():
        for node in kernels:
            inputs = [want[argument.meta.get(REFERENCE, argument.name)] for argument in node.args]
            kernel = lowered.get_submodule(node.target)
            off = (kernel(*inputs).double() - want[node.meta[REFERENCE]].double()).abs()
            if want[node.meta[REFERENCE]].dtype == torch.uint8:
                assert off.max() <= 1, node.name
                assert (off > 0).double().mean() < 0.01, node.name
            elif kernel.kernel == "aten._int_mm":  # the classifier: exact sums, the same float32 product
                assert off.max() == 0
            else:  # a convolution to float: exact sums, scaled in another order of roundings
                assert (off / kernel.unit).max() < 1e-2, node.name


def test_the_backend_named_at_prepare_is_the_default():
    x = torch.randn(8, 3, 16, 16)
    prepared = fq.prepare(settle(TinyResidual(), x), [fq.Rule("*", 4, 4)], calibration=[x], backend=_other())
    fq.freeze(prepared)
    engine = torch.backends.quantized.engine
    lowered = fq.lower(fq.convert(prepared))
    assert lowered.meta["fxquant_backend"] == _other()
    assert any(node.name.endswith(_other()) for node in lowered.graph.nodes)
    assert torch.backends.quantized.engine == engine


def _other() -> str:
    return next(name for name in ("fbgemm", "qnnpack", "x86") if name in ENGINES)


class SpelledRelu(nn.Module):
    def __init__(self, relu):
        super().__init__()
        self.a, self.b, self.relu = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), relu

    def forward(self, x):
        return self.b(self.relu(self.a(x))).mean((2, 3))


@pytest.mark.parametrize(
    "relu",
    [nn.ReLU(), nn.ReLU(inplace=True), F.relu, torch.relu, lambda x: x.relu(), lambda x: F.relu(x, inplace=True)],
)
def test_a_relu_in_any_spelling_is_fused_into_the_kernel_before_it(relu):
    x = torch.randn(4, 3, 12, 12)
    lowered = fq.lower(reference_of(SpelledRelu(relu), x), _other())
    assert lowered.meta["fxquant_lowered"][0].kernel == "quantized.conv2d_relu"


# ---- wrong kernels ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("offset", "used"), [(1, True), (2, False)])
def test_a_kernel_wrong_by_more_than_one_code_is_not_used(residual, monkeypatch, offset, used):
    backend = _other()
    sound = native._NativeConv2d.forward

    def corrupt(self, codes):
        out = sound(self, codes).clone()
        out[0, 0, 0, 0] += offset if out[0, 0, 0, 0] < offset else -offset
        return out

    monkeypatch.setattr(native._NativeConv2d, "forward", corrupt)
    lowered = fq.lower(residual, backend)
    report = {entry.name: entry for entry in lowered.meta["fxquant_lowered"]}
    convolutions = [report[name] for name in ("conv2_quantize", "conv2_edge_quantize", "shortcut_edge_quantize")]
    for entry in convolutions:
        assert entry.kernel.startswith("quantized.conv2d") is used
        assert entry.max_code_difference == offset
        assert 0 < entry.share_different < 0.01
        if not used:
            assert entry.kernel == "reference"
            assert f"of {backend} was off by up to 2 codes in 0." in entry.reason
    assert report["head_rescale"].kernel == "aten._int_mm"
    if not used:
        x = torch.randn(16, 3, 16, 16)
        assert largest_gap(residual, lowered, backend, x) <= 1  # what remains is the addition's kernel


def test_a_kernel_that_torch_refuses_is_listed_with_torchs_words(residual, monkeypatch):
    def refuse(self, layer, weight, bias):
        raise RuntimeError("this engine has no such convolution\nand a long trace")

    monkeypatch.setattr(native._NativeConv2d, "_pack", refuse)
    lowered = fq.lower(residual, _other())
    reasons = [e.reason for e in lowered.meta["fxquant_lowered"] if e.kernel == "reference" and "float" not in e.reason]
    assert reasons == ["this engine has no such convolution"] * 3
    x = torch.randn(4, 3, 16, 16)
    assert largest_gap(residual, lowered, _other(), x) <= 1


class WideDepthwise(nn.Module):
    """A depthwise convolution whose 16-bit partial sums saturate in fbgemm, and in x86 beyond 100 groups."""

    def __init__(self, channels: int = 192):
        super().__init__()
        self.expand = nn.Conv2d(3, channels, 1)
        self.depthwise = nn.Conv2d(channels, channels, 3, groups=channels, padding=1)
        self.project = nn.Conv2d(channels, 4, 1)

    def forward(self, x):
        return self.project(F.relu(self.depthwise(F.relu(self.expand(x))))).mean((2, 3))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_wide_depthwise_convolution_at_full_8_bits_stays_correct(backend):
    x = torch.rand(4, 3, 12, 12) + 0.2
    model = WideDepthwise()
    for weight in (model.expand.weight, model.depthwise.weight):
        nn.init.uniform_(weight, 0.9, 1.0)
    reference = reference_of(model, x, 8, init="minmax")
    values = recorded(reference, x)
    assert values["depthwise_quantize"].max() == 255
    assert reference.depthwise_integer.weight.max() == 127
    lowered = fq.lower(reference, backend)
    entry = next(e for e in lowered.meta["fxquant_lowered"] if e.name == "project_quantize")
    assert entry.max_code_difference <= 1
    assert entry.kernel.startswith("quantized.conv2d_relu")
    if backend != "onednn":
        moved = entry.kernel == "quantized.conv2d_relu of onednn"
        said = re.match(rf"quantized.conv2d_relu of {backend} was off by up to \d+ codes in", entry.reason)
        assert moved is bool(said)
        assert moved is (backend in ("x86", "fbgemm"))
    new = torch.rand(8, 3, 12, 12) + 0.2
    assert largest_gap(reference, lowered, backend, new) <= 2  # a code of one layer may move one of the next


# ---- what is left alone, what is refused -----------------------------------------------------------------


def test_the_reference_is_left_as_it_is(residual):
    state = {name: tensor.clone() for name, tensor in residual.state_dict().items()}
    nodes = [(node.name, str(node.target), str(node.args)) for node in residual.graph.nodes]
    meta = dict(residual.meta)
    x = torch.randn(8, 3, 16, 16)
    want = residual(x)
    fq.lower(residual, _other())
    assert nodes == [(node.name, str(node.target), str(node.args)) for node in residual.graph.nodes]
    assert list(residual.state_dict()) == list(state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in residual.state_dict().items())
    assert residual.meta == meta
    assert torch.equal(residual(x), want)


def test_an_unknown_backend_is_refused_with_the_nearest(residual):
    with pytest.raises(
        UnknownNameError,
        match=r"unknown backend 'fbgem': did you mean 'fbgemm'\?.*onednn, onnxruntime, openvino, qnnpack",
    ):
        fq.lower(residual, "fbgem")


def test_an_engine_that_this_torch_lacks_is_refused(residual, monkeypatch):
    monkeypatch.setattr(type(torch.backends.quantized), "supported_engines", ["none", "onednn"])
    with pytest.raises(SpecError, match=r"backend 'qnnpack' was asked for; .* has the engines none, onednn"):
        fq.lower(residual, "qnnpack")


def test_lower_asks_for_a_batch_to_check_kernels_against():
    x = torch.randn(8, 3, 16, 16)
    prepared = fq.prepare(settle(TinyResidual(), x), [fq.Rule("*", 4, 4)], example_inputs=(x,))
    fq.prepare.__globals__["calibrate"](prepared, [x])
    fq.freeze(prepared)
    reference = fq.convert(prepared)
    with pytest.raises(SpecError, match=r"needs one batch to check kernels against: pass calibration="):
        fq.lower(reference)
    with pytest.raises(EmptyDataError, match="yielded no batch"):
        fq.lower(reference, calibration=[])
    assert fq.lower(reference, _other(), calibration=[x]).meta["fxquant_lowered"]


def test_lower_takes_only_a_reference(digits_run):
    with pytest.raises(SpecError, match=r"Linear was not made by fxquant\.prepare"):
        fq.lower(nn.Linear(2, 2))
