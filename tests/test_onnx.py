"""The ONNX file: in onnxruntime the reference's own numbers, at the size of its bits."""

from __future__ import annotations

import importlib.util
from collections import Counter

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fxquant as fq
from fxquant.errors import FxQuantError, SpecError, UnknownNameError
from tests.models import TinyMobile, TinyResidual, settle

onnx = pytest.importorskip("onnx", reason="the extra fxquant[onnx] is not installed")
pytest.importorskip("onnxscript", reason="the extra fxquant[onnx] is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="the extra fxquant[onnx] is not installed")


def reference_of(model: nn.Module, x: torch.Tensor, bits: int = 4, **options):
    prepared = fq.prepare(settle(model, x), [fq.Rule("*", bits, bits)], calibration=[x], **options)
    fq.freeze(prepared)
    return fq.convert(prepared)


def exported(reference, tmp_path) -> fq.OnnxModel:
    fq.export_onnx(reference, tmp_path / "model.onnx")
    return fq.OnnxModel(tmp_path / "model.onnx", threads=1)


@pytest.mark.parametrize(
    ("model", "bits"), [(TinyResidual, 1), (TinyResidual, 2), (TinyResidual, 3), (TinyResidual, 8), (TinyMobile, 4)]
)
def test_onnxruntime_gives_the_references_logits(model, bits, tmp_path):
    """All of them, bit for bit, on new images and at any batch size, in networks as small as these.

    onnxruntime multiplies sums by one number where the reference multiplies by two, one after the other; among many
    more activations, some lie so near a tie that the two round them apart.
    """
    x = torch.randn(8, 3, 16, 16)
    reference = reference_of(model(), x, bits)
    runs = exported(reference, tmp_path)
    for count in (1, 8, 33):
        images = torch.randn(count, 3, 16, 16)
        assert torch.equal(runs(images), reference(images))
    report = fq.verify(None, reference, [x, torch.randn(5, 3, 16, 16)], lowered={"onnxruntime": runs})
    parity = report.lowered["onnxruntime"]
    assert (parity.argmax_agreement, parity.logits_equal, parity.max_code_difference) == (100, 100, None)
    report.raise_on_failure()


class Operators(nn.Module):
    """Convolutions of many geometries, and every operator that is carried on an 8-bit grid."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.grouped = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=2)
        self.depthwise = nn.Conv2d(8, 8, (3, 5), padding=(1, 2), groups=8)
        self.point = nn.Conv2d(8, 8, 1, bias=False)
        self.pool, self.mean = nn.MaxPool2d(3, 2, 1), nn.AdaptiveAvgPool2d(1)
        self.gate, self.head = nn.Conv2d(8, 8, 1), nn.Linear(16, 5)

    def forward(self, x):
        x = F.relu(self.a(x))
        x = self.grouped(x) + self.depthwise(x)
        x = x * torch.sigmoid(self.gate(self.mean(x)))
        x = F.relu(self.pool(x) + self.pool(F.gelu(self.point(x))))
        return self.head(F.pad(torch.cat([x, x.flip(-1)], 1), (1, 0, 0, 1)).mean((2, 3)))


@pytest.mark.parametrize("bits", [2, 5, 8])
def test_operators_of_many_geometries(bits, tmp_path):
    """Bit for bit but for float means, whose sums a runtime may order otherwise."""
    x = torch.randn(8, 3, 16, 16)
    reference = reference_of(Operators(), x, bits)
    images = torch.randn(16, 3, 16, 16)
    want, got = reference(images), exported(reference, tmp_path)(images)
    step = float(reference.head_rescale.scale.max()) * 127
    assert (got - want).abs().max() <= step
    assert float((got == want).double().mean()) > 0.9


def test_the_file_is_sound_and_narrow(tmp_path):
    x = torch.randn(4, 3, 16, 16)
    prepared = fq.prepare(settle(TinyResidual(), x), [fq.Rule("stem", 8, 8), fq.Rule("*", 4, 3)], calibration=[x])
    fq.freeze(prepared)
    fq.export_onnx(fq.convert(prepared), tmp_path / "model.onnx")
    model = onnx.load(tmp_path / "model.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 21)]
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param
    assert [i.name for i in model.graph.input] == ["images"]
    assert [o.name for o in model.graph.output] == ["logits"]
    kinds = [i.data_type for i in model.graph.initializer if len(i.dims) > 1]
    assert sorted(kinds) == sorted([onnx.TensorProto.INT8, *[onnx.TensorProto.INT4] * 4])
    quantizers = [n for n in model.graph.node if n.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert all(len(n.input) == 3 for n in quantizers)  # zero-points are explicit
    bounds = {i.name: i for i in model.graph.initializer if i.name.endswith("highest")}
    clips = [n for n in model.graph.node if n.op_type == "Clip"]
    assert len(clips) == 3  # conv1 and the shortcut read the same codes
    assert {int(onnx.numpy_helper.to_array(bounds[n.input[2]])) for n in clips} == {7}


class TwoConvolutions(nn.Module):
    """No residual, and weights whose number fills no byte."""

    def __init__(self, channels: int = 7):
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, channels, 3, stride=2), nn.Conv2d(channels, channels, 3, bias=False)
        self.head = nn.Linear(channels * 25, 5)

    def forward(self, x):
        return self.head(F.relu(self.conv(F.relu(self.stem(x)))).flatten(1))


@pytest.mark.parametrize(
    ("bits", "two_bit", "opset", "kind"),
    [
        (1, "bytes", 21, onnx.TensorProto.UINT8),
        (2, "bytes", 21, onnx.TensorProto.UINT8),
        (1, "int2", 25, onnx.TensorProto.INT2),
        (2, "int2", 25, onnx.TensorProto.INT2),
        (3, "int2", 21, onnx.TensorProto.INT4),
    ],
)
def test_weights_of_one_and_two_bits_have_their_size(bits, two_bit, opset, kind, tmp_path):
    x = torch.randn(4, 3, 16, 16)
    reference = reference_of(TwoConvolutions(), x, bits)
    file = tmp_path / "model.onnx"
    fq.export_onnx(reference, file, two_bit=two_bit)
    model = onnx.load(file)
    onnx.checker.check_model(model, full_check=True)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", opset)]
    weights = {i.name: i for i in model.graph.initializer if ".weight_bytes" in i.name or ".weight_int" in i.name}
    assert {i.data_type for i in weights.values()} == {kind}
    stored = sum(len(i.raw_data) for i in weights.values())
    each = 8 // {onnx.TensorProto.INT2: 2, onnx.TensorProto.INT4: 4}.get(kind, bits)
    assert stored == sum(-(-count // each) for count in (3 * 7 * 9, 7 * 7 * 9, 7 * 25 * 5))
    for count in (1, 9):
        images = torch.randn(count, 3, 16, 16)
        assert torch.equal(fq.OnnxModel(file, threads=1)(images), reference(images))
    assert kinds_after_optimization(file, tmp_path)["QLinearConv"] == 2


def kinds_after_optimization(file, tmp_path) -> Counter:
    """How often each operator is in the graph that onnxruntime runs."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.optimized_model_filepath = 3, str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("activation", [nn.ReLU6, nn.SiLU])
def test_every_convolution_is_fused_whatever_follows_it(activation, bits, tmp_path):
    """A float Clip that reaches into the grid, or a float operator on unrounded sums, leaves a convolution in float."""
    x = 4 * torch.randn(8, 3, 16, 16)
    layers = nn.Conv2d(3, 8, 3), activation(), nn.Conv2d(8, 8, 3, groups=8), activation(), nn.AdaptiveAvgPool2d(1)
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(8, 5))
    reference = reference_of(model, x, bits, backend="onnxruntime")
    fq.export_onnx(reference, tmp_path / "model.onnx")
    kinds = kinds_after_optimization(tmp_path / "model.onnx", tmp_path)
    assert kinds["QLinearConv"] == 2
    assert not kinds["FusedConv"]
    assert not kinds["Conv"]
    images = 8 * torch.randn(16, 3, 16, 16)  # beyond every bound
    assert torch.equal(fq.OnnxModel(tmp_path / "model.onnx", threads=1)(images), reference(images))


class CalledTwice(nn.Module):
    """One layer and one activation, called twice: before the second call lie values without a ceiling."""

    def __init__(self):
        super().__init__()
        self.stem, self.again, self.activation = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3, padding=1), nn.ReLU6()

    def forward(self, x):
        x = torch.relu(self.stem(x))
        for _ in range(2):
            x = self.activation(self.again(x))
        return x.mean((2, 3))


@pytest.mark.parametrize("backend", ["openvino", "onnxruntime"])
def test_a_ceiling_holds_for_its_call_alone(backend, tmp_path):
    x = 6 * torch.randn(8, 3, 12, 12)
    model = settle(CalledTwice(), x)
    model.stem.weight.data.mul_(4)  # well above 6
    reference = reference_of(model, x, 4, backend=backend)
    runs = exported(reference, tmp_path)
    images = 6 * torch.randn(32, 3, 12, 12)
    torch.testing.assert_close(runs(images), reference(images), rtol=1e-4, atol=1e-4)


class FloatBetween(nn.Module):
    """An integer layer, a layer that is to stay float, in one of some forms, an integer layer. Input [N, 3, 12, 12]."""

    def __init__(self, form: str):
        super().__init__()
        self.form = form
        self.first, self.last = nn.Conv2d(3, 6, 12 if form == "product" else 3), nn.Conv2d(6, 4, 1)
        self.kept = nn.ConvTranspose2d(6, 6, 3) if form == "transposed" else nn.Conv2d(6, 6, 3, bias=form != "no bias")
        self.weight, self.bias = nn.Parameter(torch.randn(6, 6)), nn.Parameter(torch.randn(6))

    def forward(self, x):
        x = self.first(x)
        if self.form == "product":
            x = (x.flatten(1) @ self.weight + self.bias)[:, :, None, None]
        else:
            x = self.kept(F.max_pool2d(x, 2) if self.form == "after a pooling" else x)
        return self.last(F.relu(x)).mean((2, 3))


@pytest.mark.parametrize("form", ["alone", "no bias", "transposed", "after a pooling", "product"])
def test_a_layer_that_stays_float_keeps_its_float_weights(form, tmp_path):
    torch.manual_seed(0)
    x = torch.randn(8, 3, 12, 12)
    rules = [fq.Rule("first|last", 8, 8), fq.Rule("*", None, None)]
    prepared = fq.prepare(FloatBetween(form).eval(), rules, calibration=[x], backend="onnxruntime")
    fq.freeze(prepared)
    reference = fq.convert(prepared)
    model = exported(reference, tmp_path)
    with torch.no_grad():
        want = reference(x)
    assert (model(x) - want).abs().max() < 1e-5 * want.abs().max()


class SharedCodes(nn.Module):
    """A Linear that reads the codes of a residual sum."""

    def __init__(self):
        super().__init__()
        self.first, self.a, self.b = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x):
        x = self.first(x.flatten(1))
        return x + self.b(torch.relu(self.a(x)))


def test_weight_only_linear_layers_may_share_codes_with_others(tmp_path):
    x = torch.randn(16, 2, 4, 4)
    prepared = fq.prepare(SharedCodes(), [fq.Rule("*", 4, 8)], calibration=[x], backend="onnxruntime")
    fq.freeze(prepared)
    reference = fq.convert(prepared)
    fq.export_onnx(reference, tmp_path / "model.onnx", weight_only_linear=True)
    got = fq.OnnxModel(tmp_path / "model.onnx", threads=1)(x)
    torch.testing.assert_close(got, reference(x), rtol=0, atol=0.05 * float(reference(x).std()))


class Tokens(nn.Module):
    """Linear layers on rows of an image and on vectors; one has 40 inputs, which is no whole number of blocks."""

    def __init__(self):
        super().__init__()
        self.embed, self.mix = nn.Conv2d(3, 48, 4, stride=4), nn.Linear(48, 64)
        self.back, self.odd = nn.Linear(64, 40, bias=False), nn.Linear(40, 32)
        self.wide, self.head = nn.Linear(32, 16), nn.Linear(16, 5)

    def forward(self, x):
        x = self.embed(x).flatten(2).transpose(1, 2)
        x = self.odd(F.relu(self.back(F.gelu(self.mix(x))))).mean(1)
        return self.head(F.relu(self.wide(x)))


@pytest.mark.parametrize(("bits", "activation_bits"), [(4, 8), (2, 3)])
def test_weight_only_linear(bits, activation_bits, tmp_path):
    """onnxruntime multiplies by the narrow weights; numbers are the reference's but for float sums."""
    x = torch.randn(8, 3, 16, 16)
    prepared = fq.prepare(Tokens(), [fq.Rule("*", bits, activation_bits)], calibration=[x])
    fq.freeze(prepared)
    reference, file = fq.convert(prepared), tmp_path / "model.onnx"
    fq.export_onnx(reference, file, weight_only_linear=True)
    kinds = kinds_after_optimization(file, tmp_path)
    assert kinds["MatMulNBits"] == 4
    assert kinds["MatMul"] + kinds["Gemm"] + kinds["FusedGemm"] == 0
    model = onnx.load(file)
    onnx.checker.check_model(model, full_check=True)
    blocked = {n.input[0] for n in model.graph.node if any(a.name == "block_size" for a in n.attribute)}
    weights = [i for i in model.graph.initializer if i.name in blocked]
    assert {i.data_type for i in weights} == {onnx.TensorProto.INT4}
    assert sum(len(i.raw_data) for i in weights) == (48 * 64 + 64 * 40 + 32 * 16 + 16 * 5) // 2
    runs = fq.OnnxModel(file, threads=1)
    for count in (1, 8, 17):
        images = torch.randn(count, 3, 16, 16)
        want, got = reference(images), runs(images)
        # A float sum next to a tie may end on its other side: few codes of few inputs of the last layer.
        assert (got - want).abs().max() <= float(reference.head_rescale.scale.max()) * 2**bits
        assert float((got - want).abs().median()) <= 1e-5 * float(want.abs().max())


def test_weight_only_needs_a_linear_that_fits(tmp_path):
    reference = reference_of(TinyResidual(), torch.randn(4, 3, 16, 16), 8)
    with pytest.raises(SpecError, match=r"weight_only_linear was asked for, but no Linear.*4 bits.*leave it out"):
        fq.export_onnx(reference, tmp_path / "x.onnx", weight_only_linear=True)


def test_what_cannot_be_exported_is_said(tmp_path, monkeypatch):
    x = torch.randn(4, 3, 16, 16)
    prepared = fq.prepare(TinyResidual(), [fq.Rule("*", 4, 4)], calibration=[x])
    with pytest.raises(SpecError, match="without integer layers"):
        fq.export_onnx(prepared, tmp_path / "x.onnx")
    reference = reference_of(TinyResidual(), x)
    with pytest.raises(SpecError, match=r"backend 'onnxruntime' reads a file: write it with fxquant\.export_onnx"):
        fq.lower(reference, "onnxruntime")
    with pytest.raises(UnknownNameError, match=r"unknown two_bit 'uint2': did you mean 'int2'"):
        fq.export_onnx(reference, tmp_path / "x.onnx", two_bit="uint2")
    (tmp_path / "broken.onnx").write_bytes(b"no model")
    with pytest.raises(FxQuantError, match=r"onnxruntime does not take .*broken\.onnx"):
        fq.OnnxModel(tmp_path / "broken.onnx")
    with monkeypatch.context() as patch:
        patch.setattr(onnx, "TensorProto", object())
        with pytest.raises(FxQuantError, match=r"'int2' needs a newer onnx than .*'bytes'"):
            fq.export_onnx(reference, tmp_path / "x.onnx", two_bit="int2")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FxQuantError, match=r"ONNX needs onnx and onnxscript, not installed.*fxquant\[onnx\]"):
        fq.export_onnx(reference, tmp_path / "x.onnx")
    assert not (tmp_path / "x.onnx").exists()
