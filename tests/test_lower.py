"""Kernels: on the network that trained they are used everywhere and agree; a wrong one is never used."""

from __future__ import annotations

import copy
import re
import warnings
from collections import Counter

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fxquant as fq
from fxquant.data import load_data
from fxquant.errors import EmptyDataError, SpecError, UnknownNameError
from fxquant.hardware import has_vnni
from fxquant.integer import Dequantize, IntegerConv2d, IntegerLinear, Quantize, Rescale
from fxquant.lower import kernels, native
from fxquant.lower.native import REFERENCE, Recorder
from fxquant.train import lower_to
from tests.models import TinyResidual, settle

ENGINES = torch.backends.quantized.supported_engines
BACKENDS = [
    pytest.param(name, marks=pytest.mark.skipif(name not in ENGINES, reason=f"this torch has no engine {name}"))
    for name in ("x86", "onednn", "fbgemm", "qnnpack")
]


def reference_of(
    model: nn.Module, x: torch.Tensor, bits: int = 4, backend: str = "x86", **rule
) -> torch.fx.GraphModule:
    prepared = fq.prepare(model, [fq.Rule("*", bits, bits, **rule)], calibration=[x], backend=backend)
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
    layers = sum(isinstance(m, (IntegerConv2d, IntegerLinear)) for m in called)
    found = Counter(entry.kernel for entry in report)
    assert all(entry.max_code_difference <= 1 and entry.reason == "" for entry in report)
    assert found["onednn.qlinear_pointwise (sums)"] == 1
    assert found["quantized.max_pool2d"] == sum(isinstance(m, nn.MaxPool2d) for m in called) == 1
    convolutions = {kernel: count for kernel, count in found.items() if "conv" in kernel}
    assert sum(convolutions.values()) == layers - 1
    if backend == "onednn" or (backend == "x86" and has_vnni()):
        additions = [n for n in outcome.reference.graph.nodes if n.op == "call_function"]
        assert {kernel.split(" + ")[0] for kernel in convolutions} == {"onednn.qconv_pointwise"}
        assert found["onednn.qconv_pointwise + sum"] == len(additions) == 4  # a layer adds the residual itself
        assert found["onednn.qconv_pointwise + hardtanh"]  # narrow codes are clamped in the kernel
    else:  # what was prepared for onednn's kernels and runs here leaves the layers before an addition unrounded
        assert {"quantized.conv2d", "quantized.conv2d_relu"} & set(convolutions)
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
    nodes = [n for n in lowered.graph.nodes if REFERENCE in n.meta]
    assert nodes
    with native._kernels(backend), torch.no_grad():
        for node in nodes:
            inputs = [want[argument.meta.get(REFERENCE, argument.name)].clone() for argument in node.args]
            kernel = lowered.get_submodule(node.target)
            off = (kernel(*inputs).double() - want[node.meta[REFERENCE]].double()).abs()
            if want[node.meta[REFERENCE]].dtype == torch.uint8:
                assert off.max() <= 1, node.name
                assert (off > 0).double().mean() < 0.01, node.name
            elif (
                kernel.kernel == "onednn.qlinear_pointwise (sums)"
            ):  # the classifier: exact sums, the same float32 product
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


class Activated(nn.Module):
    def __init__(self, activation, layer=nn.Conv2d):
        super().__init__()
        self.a, self.b = (nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)) if layer is nn.Conv2d else (nn.Linear(12, 8),) * 2
        self.b = nn.Linear(8, 4) if layer is nn.Linear else self.b
        self.activation = activation

    def forward(self, x):
        return self.b(self.activation(self.a(x))).mean((1, 2))


@pytest.mark.parametrize("bits", [3, 8])
@pytest.mark.parametrize(
    ("activation", "layer", "kernel"),
    [
        (nn.SiLU(), nn.Conv2d, "onednn.qconv_pointwise + swish"),
        (F.silu, nn.Conv2d, "onednn.qconv_pointwise + swish"),
        (nn.Hardswish(), nn.Conv2d, "onednn.qconv_pointwise + hardswish"),
        (nn.GELU(), nn.Linear, "onednn.qlinear_pointwise + gelu"),
        (nn.GELU("tanh"), nn.Linear, "onednn.qlinear_pointwise + gelu"),
        (nn.ReLU6(), nn.Conv2d, "onednn.qconv_pointwise + hardtanh"),
    ],
)
def test_an_activation_function_is_done_by_the_layers_kernel(activation, layer, kernel, bits):
    x = 3 * torch.randn(4, 3, 12, 12)
    with torch.no_grad():
        model = Activated(activation, layer)
        model.a.weight.mul_(4)
    reference = reference_of(model, x, bits)
    lowered = fq.lower(reference, "onednn")
    assert lowered.meta["fxquant_lowered"][1].kernel == kernel
    assert largest_gap(reference, lowered, "onednn", 3 * torch.randn(16, 3, 12, 12)) <= 1


class Sums(nn.Module):
    """Residual additions whose addend is read again, comes from two layers, or is broadcast. Input [N, 3, H, W]."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(i, 8, 3, padding=1) for i in (3, 8, 8))
        self.gate = nn.Conv2d(8, 8, 1)

    def forward(self, x):
        x = F.relu(self.a(x))
        y = x + self.b(x)
        z = F.relu(self.c(x) + y)  # reads x after something was added to it
        return (z + self.gate(z.mean((2, 3), keepdim=True))).mean((2, 3))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("backend", ["x86", "onednn"])
def test_a_layer_adds_a_residual_without_spoiling_it_for_others(backend, bits):
    x = torch.randn(8, 3, 12, 12)
    reference = reference_of(Sums(), x, bits, backend)
    lowered = fq.lower(reference, backend)
    sums = [m for m in lowered.modules() if getattr(m, "add_grid", None)]
    assert [kernel.overwrite for kernel in sums] == [False, True]
    assert [kernel.kernel for kernel in sums] == ["onednn.qconv_pointwise + sum"] * 2
    new = torch.randn(16, 3, 12, 12)
    before = new.clone()
    assert largest_gap(reference, lowered, backend, new) <= 1
    first = lowered(new)
    assert torch.equal(first, lowered(new))
    assert torch.equal(new, before)


class Echo(nn.Module):
    """A layer that reads the very codes it is added to. Input [N, 3, H, W]."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        x = F.relu(self.a(x))
        return (self.b(x) + x).mean((2, 3))


def test_a_layer_does_not_write_over_its_own_input():
    x = torch.randn(8, 3, 24, 24)
    reference = reference_of(Echo(), x, 8)
    lowered = fq.lower(reference, "x86")
    (kernel,) = (n for n in lowered.graph.nodes if n.op == "call_module" and len(n.args) == 2)
    assert kernel.args[0] is kernel.args[1]
    assert not lowered.get_submodule(kernel.target).overwrite
    assert largest_gap(reference, lowered, "x86", torch.randn(16, 3, 24, 24)) <= 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_images_of_any_floating_type_are_taken(residual, dtype):
    images = torch.randn(16, 3, 16, 16).to(dtype)
    lowered = fq.lower(residual, "x86")
    assert (lowered(images).argmax(1) == residual(images.float()).argmax(1)).all()


class Transposed(nn.Module):
    """A residual addition of linear layers whose other operand is not contiguous."""

    def __init__(self):
        super().__init__()
        self.tokens, self.a, self.b = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 12)

    def forward(self, x):
        x = self.tokens(x.flatten(2)).transpose(1, 2).reshape(x.shape[0], 12, 12).transpose(1, 2)
        return (x + self.b(torch.relu(self.a(x)))).mean(1)


@pytest.mark.parametrize("count", [1, 4])
def test_an_addend_that_is_not_contiguous_is_added_rightly(count):
    x = torch.randn(16, 12, 3, 4)
    reference = reference_of(Transposed(), x, 8)
    lowered = fq.lower(reference, "x86", calibration=[x[:count]])
    assert any("sum" in layer.kernel for layer in lowered.meta["fxquant_lowered"])
    assert largest_gap(reference, lowered, "x86", torch.randn(64, 12, 3, 4)) <= 1


class Bottleneck(nn.Module):
    """1x1 convolutions on signed inputs, whose grid has a zero-point; one of them adds a residual."""

    def __init__(self, **options):
        super().__init__()
        self.expand = nn.Conv2d(8, 24, 1, **options)
        self.project = nn.Conv2d(24, 8, 1)
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x):
        return (x + self.norm(self.project(self.expand(x)))).mean((2, 3))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("options", "operators"),
    [({}, ["qlinear", "qlinear"]), ({"stride": 1, "padding": 1}, ["qconv"]), ({"groups": 2}, ["qconv", "qlinear"])],
)
def test_a_pointwise_convolution_on_a_grid_with_a_zero_point_is_a_matrix_product(options, operators, bits):
    """torch's convolution lays out such a weight anew in every call. With padding or groups it stays one."""
    x = torch.randn(4, 8, 6, 5)
    model = settle(
        Bottleneck(**options) if "padding" not in options else nn.Sequential(nn.Conv2d(8, 4, 1, **options)), x
    )
    reference = reference_of(model, x, bits)
    lowered = fq.lower(reference, "onednn")
    found = [layer.kernel for layer in lowered.meta["fxquant_lowered"] if "onednn" in layer.kernel]
    assert [kernel.split(".")[1].split("_")[0] for kernel in found] == operators
    for batch in (torch.randn(1, 8, 6, 5), torch.randn(7, 8, 9, 9)):
        assert largest_gap(reference, lowered, "onednn", batch) <= 1


@pytest.mark.parametrize(("features", "parts"), [(40, 1), (3000, 3)])
def test_the_classifiers_sums_are_exact_however_long(features, parts):
    weight = torch.randint(30, 64, (5, features), dtype=torch.int8)  # 3000 * 46 * 255 is above 2^25
    layer = IntegerLinear(weight, torch.tensor([1, -(2**24), 3, 2**24, 7]), torch.tensor(3), (0, 255))
    rescale = Rescale(torch.rand(5), 1, False)
    kernel = kernels.ExactLinear(layer, rescale)
    assert len(kernel.packed) == parts
    codes = torch.randint(0, 256, (33, features), dtype=torch.uint8)
    assert torch.equal(kernel(codes), rescale(layer(codes)))
    assert torch.equal(copy.deepcopy(kernel)(codes[:1]), rescale(layer(codes[:1])))


def test_a_lowered_model_can_be_copied(residual):
    x = torch.randn(4, 3, 16, 16)
    lowered = fq.lower(residual, "x86")
    assert torch.equal(copy.deepcopy(lowered)(x), lowered(x))


@pytest.mark.parametrize("scale", [0.02, 1.0, 300.0])
def test_the_fast_quantizer_gives_the_references_codes(scale):
    x = scale * torch.randn(50_000)
    x[:8] = torch.tensor([0.0, -0.0, 1e30, -1e30, float("inf"), -float("inf"), 0.125, 0.375])
    for step, zero, bounds in ((0.25, 3, (0, 255)), (0.0371, 128, (0, 255)), (0.7, 2, (0, 7))):
        exit_ = Quantize(torch.tensor(step), torch.tensor(zero), *bounds)
        assert torch.equal(kernels.FastQuantize(exit_)(x), exit_(x))
        every = torch.arange(256, dtype=torch.uint8)
        for other in (0.25, 0.0113, 0.5):
            entry = Dequantize(torch.tensor(other), torch.tensor(7))
            assert torch.equal(kernels.Requantize(entry, exit_)(every), exit_(entry(every)))


@pytest.mark.parametrize(
    "relu",
    [nn.ReLU(), nn.ReLU(inplace=True), F.relu, torch.relu, lambda x: x.relu(), lambda x: F.relu(x, inplace=True)],
)
def test_a_relu_in_any_spelling_is_fused_into_the_kernel_before_it(relu):
    x = torch.randn(4, 3, 12, 12)
    lowered = fq.lower(reference_of(SpelledRelu(relu), x), "fbgemm")
    assert [entry.kernel for entry in lowered.meta["fxquant_lowered"]][1] == "quantized.conv2d_relu"


# ---- wrong kernels ---------------------------------------------------------------------------------------


def corrupted(sound, offset: int):
    """A kernel's forward with one code wrong by ``offset``; what it does to float results is left alone."""

    def forward(self, *codes):
        out = sound(self, *codes).clone()
        if out.dtype == torch.uint8 and out.ndim == 4:
            out[0, 0, 0, 0] += offset if out[0, 0, 0, 0] < offset else -offset
        return out

    return forward


@pytest.mark.parametrize(
    ("channels", "size", "options"),
    [
        (1, (4, 3), {"kernel_size": (2, 3), "stride": (1, 2)}),
        (1, (14, 2), {"kernel_size": (3, 2), "stride": (1, 4), "padding": (1, 0)}),
        (1, (8, 28), {"kernel_size": (2, 5), "stride": 2, "padding": 2}),
        (4, (5, 1), {"kernel_size": (4, 1), "stride": 3, "padding": (3, 2), "dilation": 2}),
        (8, (6, 1), {"kernel_size": (1, 2), "padding": 1, "dilation": 2}),
    ],
    ids=str,
)
def test_convolutions_that_onednn_reads_beyond_the_input_for_run_elsewhere(channels, size, options):
    """It gives other numbers for more images than it was checked on, or ends the process."""
    x = torch.randn(2, channels, *size)
    reference = reference_of(nn.Sequential(nn.Conv2d(channels, 8, **options), nn.ReLU()), x, 4)
    lowered = fq.lower(reference, "onednn")
    (layer,) = [layer for layer in lowered.meta["fxquant_lowered"] if layer.layer]
    assert not layer.kernel.startswith("onednn")
    assert layer.reason == "onednn would read beyond the input"
    for images in (3, 8, 17):
        assert largest_gap(reference, lowered, "onednn", torch.randn(images, channels, *size)) <= 1


@pytest.mark.parametrize(("offset", "used"), [(1, True), (2, False)])
@pytest.mark.parametrize("backend", ["fbgemm", "onednn"])
def test_a_kernel_wrong_by_more_than_one_code_is_not_used(monkeypatch, backend, offset, used):
    x = torch.randn(16, 3, 16, 16)
    reference = reference_of(settle(TinyResidual(), x), x, backend=backend)
    for kernel in (kernels.QuantizedLayer, kernels.OnednnLayer):
        monkeypatch.setattr(kernel, "forward", corrupted(kernel.forward, offset))
    lowered = fq.lower(reference, backend)
    report = {entry.name: entry for entry in lowered.meta["fxquant_lowered"]}
    own = "quantized.conv2d" if backend == "fbgemm" else "onednn.qconv_pointwise"
    results = (
        "conv2_quantize",
        "conv2_edge_quantize",
        "shortcut_edge_quantize" if backend == "fbgemm" else "relu_2_edge_quantize",
    )
    for layer, result in zip(("conv1", "conv2", "shortcut"), results, strict=True):
        if used:
            assert report[result].kernel.startswith(own)
            assert report[result].max_code_difference == offset
            assert 0 < report[result].share_different < 0.01
        else:  # its float result is right, and is rounded apart
            assert report[f"{layer}_rescale"].kernel.startswith("onednn.qconv_pointwise")
            assert f"of {backend} was off by up to 2 codes in 0." in report[f"{layer}_rescale"].reason
    assert report["head_rescale"].kernel == "onednn.qlinear_pointwise (sums)"
    if not used:
        assert largest_gap(reference, lowered, backend, torch.randn(16, 3, 16, 16)) <= 1


@pytest.mark.parametrize(
    ("said", "listed"),
    [
        ("this engine has no such convolution\nand a long trace", "this engine has no such convolution"),
        ("", "RuntimeError"),
    ],
)
def test_a_kernel_that_torch_refuses_is_listed_with_torchs_words(residual, monkeypatch, said, listed):
    def refuse(self, *operands, **options):
        raise RuntimeError(said)

    monkeypatch.setattr(kernels.QuantizedLayer, "__init__", refuse)
    monkeypatch.setattr(kernels.OnednnLayer, "__init__", refuse)
    lowered = fq.lower(residual, _other())
    reasons = [e.reason for e in lowered.meta["fxquant_lowered"] if e.kernel == "reference"]
    assert reasons == [listed] * 4
    x = torch.randn(4, 3, 16, 16)
    assert largest_gap(residual, lowered, _other(), x) == 0


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
def test_a_wide_depthwise_convolution_at_full_8_bits_stays_correct(backend, with_vnni):
    x = torch.rand(4, 3, 12, 12) + 0.2
    model = WideDepthwise()
    for weight in (model.expand.weight, model.depthwise.weight):
        nn.init.uniform_(weight, 0.9, 1.0)
    reference = reference_of(model, x, 8, init="minmax")  # prepare would not leave fbgemm these widths
    values = recorded(reference, x)
    assert values["depthwise_quantize"].max() == 255
    assert reference.depthwise_integer.weight.max() == 127
    lowered = fq.lower(reference, backend)
    entry = next(e for e in lowered.meta["fxquant_lowered"] if e.name == "project_quantize")
    assert entry.max_code_difference <= 1
    if backend != "qnnpack" and not has_vnni():
        assert entry.kernel == "reference"
        assert "saturate at 16 bits without VNNI" in entry.reason
    elif backend == "fbgemm":
        assert entry.kernel == "onednn.qconv_pointwise of onednn"
        assert re.match(r"quantized.conv2d_relu of fbgemm was off by up to \d+ codes in", entry.reason)
    else:
        assert (entry.kernel, entry.reason) == (
            "quantized.conv2d_relu" if backend == "qnnpack" else "onednn.qconv_pointwise",
            "",
        )
    new = torch.rand(8, 3, 12, 12) + 0.2
    assert largest_gap(reference, lowered, backend, new) <= 2  # a code of one layer may move one of the next


@pytest.mark.parametrize("backend", BACKENDS[:3])
def test_without_vnni_no_kernel_computes_sums_that_may_saturate(backend, with_vnni, monkeypatch):
    """Whatever the images it is tried on show: a model may come from a CPU that has VNNI instructions."""
    monkeypatch.setattr(native, "has_vnni", lambda: False)
    x = torch.randn(8, 3, 16, 16)
    rules = [fq.Rule("stem", 8, 8), fq.Rule("head", 7, 8), fq.Rule("*", 8, 4)]
    prepared = fq.prepare(settle(TinyResidual(), x), rules, calibration=[x], backend=backend)
    fq.freeze(prepared)
    reference = fq.convert(prepared)
    lowered = fq.lower(reference)
    entries = {entry.layer: entry for entry in lowered.meta["fxquant_lowered"] if entry.layer}
    on_reference = {name: entry.reason for name, entry in entries.items() if entry.kernel == "reference"}
    assert list(on_reference) == ["stem_rescale"]
    assert re.match(r"sums of two products, up to \d+, saturate at 16 bits", on_reference["stem_rescale"])
    assert largest_gap(reference, lowered, backend, torch.randn(32, 3, 16, 16)) <= 2


@pytest.mark.parametrize(("weight_bits", "warned"), [(8, ["layers 'stem', 'conv1', 'conv2' and 2 more"]), (7, [])])
def test_without_vnni_a_runtime_that_may_saturate_is_warned_of(weight_bits, warned, with_vnni, monkeypatch, tmp_path):
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(native, "has_vnni", lambda: False)
    x = torch.randn(8, 3, 16, 16)
    prepared = fq.prepare(
        settle(TinyResidual(), x), [fq.Rule("*", weight_bits, 8)], calibration=[x], backend="onnxruntime"
    )
    fq.freeze(prepared)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        lower_to(fq.convert(prepared), "onnxruntime", tmp_path / "model.onnx")
    said = [str(w.message) for w in caught if "without VNNI" in str(w.message)]
    assert [message.split(":")[0] for message in said] == warned


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


@pytest.mark.parametrize("frozen", [False, True])
def test_a_model_that_is_not_converted_is_refused(frozen):
    x = torch.randn(2, 3, 8, 8)
    prepared = fq.prepare(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()), [fq.Rule("*", 4, 4)], calibration=[x])
    if frozen:
        fq.freeze(prepared)
    with pytest.raises(SpecError, match="lower was given a GraphModule that is not converted"):
        fq.lower(prepared)
