"""The ONNX file in OpenVINO: integer kernels, and the reference's choice of class."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fxquant as fq
from fxquant import timm
from fxquant.errors import FxQuantError
from fxquant.lower.onnx import require_packages
from fxquant.train import lower_to
from tests.models import TinyMobile, settle

pytest.importorskip("openvino", reason="the extra fxquant[openvino] is not installed")
pytest.importorskip("onnxscript", reason="the extra fxquant[onnx] is not installed")


class Plain(nn.Module):
    """Convolutions, one of them depthwise, BatchNorm, pooling, a classifier; no residual sum. Input [N, 3, H, W]."""

    def __init__(self, channels: int = 16):
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.conv, self.head = nn.Conv2d(channels, 2 * channels, 3, stride=2), nn.Linear(2 * channels, 10)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.bn(self.stem(x))), 2)
        return self.head(F.relu(self.conv(F.relu(self.depthwise(x)))).mean((2, 3)))


def reference_of(model: nn.Module, bits: int):
    x = torch.randn(8, 3, 16, 16)
    prepared = fq.prepare(settle(model, x), [fq.Rule("*", bits, bits)], calibration=[x], backend="openvino")
    fq.freeze(prepared)
    return fq.convert(prepared)


def kernels_of(runs: fq.OpenVinoModel) -> list[tuple[str, str]]:
    """(kind, kernel) of each node as it runs."""
    infos = [node.get_rt_info() for node in runs.compiled.get_runtime_model().get_ops()]
    return [(info["layerType"].astype(str), info["primitiveType"].astype(str)) for info in infos]


@pytest.mark.parametrize(("model", "bits"), [(Plain, 1), (Plain, 2), (Plain, 4), (Plain, 8), (TinyMobile, 4)])
def test_openvino_agrees_where_there_is_no_residual_sum(model, bits, tmp_path):
    """All argmaxes; nearly all logits to a few units in the last place, some a few codes of one activation away."""
    reference = reference_of(model(), bits)
    runs = lower_to(reference, "openvino", tmp_path / "model.onnx")
    assert isinstance(runs, fq.OpenVinoModel)
    report = fq.verify(None, reference, [torch.randn(n, 3, 16, 16) for n in (1, 64, 512)], lowered={"openvino": runs})
    report.raise_on_failure()
    assert report.lowered["openvino"].max_code_difference is None
    images = torch.randn(256, 3, 16, 16)
    want = reference(images)
    near = (runs(images) - want).abs() <= 1e-6 * want.abs().max()
    assert float(near.double().mean()) > 0.98
    layers = [kernel for kind, kernel in kernels_of(runs) if kind in ("Convolution", "FullyConnected")]
    assert len(layers) == 4
    assert all(kernel.endswith("_I8") for kernel in layers)


@pytest.mark.skipif(not torch.cpu._is_avx512_supported(), reason="OpenVINO fuses attention on AVX512 alone")
def test_attention_multiplies_integers(tmp_path):
    reference = reference_of(timm.create_model("test_vit", img_size=16, num_classes=10), 8)
    runs = lower_to(reference, "openvino", tmp_path / "model.onnx")
    report = fq.verify(None, reference, [torch.randn(64, 3, 16, 16)], lowered={"openvino": runs})
    assert report.lowered["openvino"].argmax_agreement > 90  # of random weights, whose classes are close
    attention = [kernel for kind, kernel in kernels_of(runs) if kind == "Subgraph"]
    assert attention
    assert all(kernel.lower().endswith("_i8") for kernel in attention)


class LargeWindow(nn.Module):
    """An average pooling as timm's ResNets have it, on an image of one row and three columns."""

    def __init__(self):
        super().__init__()
        self.stem, self.last, self.head = nn.Conv2d(3, 8, 3, (16, 6)), nn.Conv2d(8, 8, 1), nn.Linear(16, 5)
        self.pool = nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False)

    def forward(self, x):
        return self.head(self.last(self.pool(F.relu(self.stem(x)))).flatten(1))


def test_a_window_larger_than_the_image(tmp_path):
    reference, images = reference_of(LargeWindow(), 4), torch.randn(16, 3, 16, 16)
    runs = lower_to(reference, "openvino", tmp_path / "model.onnx")
    for model in (runs, fq.OnnxModel(tmp_path / "model.onnx", threads=1)):
        assert torch.allclose(model(images), reference(images), atol=1e-5)


def in_openvino_and_reference(model: nn.Module, rules: list[fq.Rule], x: torch.Tensor, tmp_path):
    """Logits of both, of a model that was calibrated on the same images."""
    prepared = fq.prepare(model.eval(), rules, calibration=[x], backend="openvino")
    fq.freeze(prepared)
    reference = fq.convert(prepared)
    with torch.no_grad():
        return lower_to(reference, "openvino", tmp_path / "model.onnx")(x), reference(x)


class Padded(nn.Module):
    """A strided convolution of one pixel on a padded image, all of whose outputs are read. Input [N, 5, 6, 5]."""

    def __init__(self, stride, stride_after):
        super().__init__()
        self.conv = nn.Conv2d(5, 4, 1, stride, padding=1, dilation=2)
        self.after = nn.Conv2d(4, 4, 1, stride_after)

    def forward(self, x):
        return self.after(F.relu(self.conv(F.relu(x)))).flatten(1)


@pytest.mark.parametrize("rules", [[("*", 1, 1)], [("*", 8, 8)], [("conv", None, None)], [("after", None, None)]])
@pytest.mark.parametrize("strides", [(2, 1), ((1, 2), 1), (1, 2)])
def test_a_convolution_of_one_pixel_keeps_its_padding(strides, rules, tmp_path):
    torch.manual_seed(0)
    x = torch.randn(4, 5, 6, 5)
    rules = [fq.Rule(*rule) for rule in [*rules, ("*", 8, 8)]]
    got, want = in_openvino_and_reference(Padded(*strides), rules, x, tmp_path)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


class Reduced(nn.Module):
    """A linear layer over tokens, a reduction, a classifier. Input [N, 6, 16]."""

    def __init__(self, reduction):
        super().__init__()
        self.reduction, self.tokens, self.head = reduction, nn.Linear(16, 12, bias=False), nn.Linear(12, 5)

    def forward(self, x):
        return self.head(self.reduction(self.tokens(x)))


REDUCTIONS = {
    "mean": lambda x: x.mean(1),
    "max": lambda x: x.amax(1),
    "sum": lambda x: x.sum(1),
    "mean after a transpose": lambda x: x.transpose(1, 2).mean(2),
    "index": lambda x: x[:, 0],
}


@pytest.mark.parametrize("name", REDUCTIONS)
def test_what_a_reduction_reads_of_a_linear_layer(name, tmp_path):
    torch.manual_seed(0)
    x = torch.randn(64, 6, 16)
    got, want = in_openvino_and_reference(Reduced(REDUCTIONS[name]), [fq.Rule("*", 8, 8)], x, tmp_path)
    assert (got - want).abs().max() < 1e-5 * want.abs().max()


def test_weight_only_linear_in_openvino(tmp_path):
    """Its own rounding of activations to 8 bits is off."""
    reference = reference_of(Plain(), 4)
    runs = lower_to(reference, "openvino", tmp_path / "model.onnx", weight_only_linear=True)
    images = torch.randn(64, 3, 16, 16)
    want = reference(images)
    near = (runs(images) - want).abs() <= 1e-5 * want.abs().max()
    assert float(near.double().mean()) > 0.98


def test_what_openvino_does_not_take_is_said(tmp_path, monkeypatch):
    reference, file = reference_of(Plain(), 2), tmp_path / "model.onnx"
    fq.export_onnx(reference, file, two_bit="int2")
    with pytest.raises(FxQuantError, match=r"OpenVINO does not take .*model\.onnx: .*Unsupported type"):
        fq.OpenVinoModel(file)
    fq.export_onnx(reference, file)
    assert fq.OpenVinoModel(file, threads=1)(torch.randn(3, 3, 16, 16)).shape == (3, 10)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "openvino" else name)
    message = r"ONNX needs openvino, not installed here: pip install 'fxquant\[openvino\]'"
    with pytest.raises(FxQuantError, match=message):
        fq.OpenVinoModel(file)
    with pytest.raises(FxQuantError, match=message):
        require_packages("onnx", "onnxscript", "openvino")  # what a run asks for before it begins
