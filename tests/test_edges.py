"""Products of activations, which some backends compute on integers: where their operands are rounded, and how."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

import fxquant as fq
from fxquant.qconfig import OperandFakeQuantize

IMAGES = torch.randn(6, 3, 16, 16)


class Attention(nn.Module):
    """timm's attention on 64 positions of an image, and a classifier. Input [N, 3, 16, 16]."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 24, 2, 2), nn.Linear(24, 5)
        self.attention = timm.layers.Attention(24, 3)

    def forward(self, x):
        return self.head(self.attention(self.stem(x).flatten(2).transpose(1, 2)).mean(1))


class LinearAttention(Attention):
    """One whose second product is divided by the first's sums."""

    def forward(self, x):
        x = self.stem(x).flatten(2)
        weights = torch.relu(x) @ x.transpose(1, 2)
        return self.head((weights / weights.sum(-1, keepdim=True).clamp(min=1e-3)).mean(1))


def prepared(model: nn.Module, backend: str = "openvino", **options) -> torch.fx.GraphModule:
    torch.manual_seed(0)
    return fq.prepare(model, [fq.Rule("*", 4, 4)], calibration=[IMAGES], backend=backend, **options)


def operands(model: nn.Module) -> dict[str, OperandFakeQuantize]:
    return {name: m for name, m in model.named_modules() if isinstance(m, OperandFakeQuantize)}


def test_one_quantizer_serves_a_projection_and_one_softmax():
    model = prepared(Attention())
    assert list(operands(model)) == ["attention_qkv_edge", "softmax_edge"]
    projected, shares = operands(model).values()
    assert (projected.grid_scheme, shares.grid_scheme) == ("affine", "one_sided")
    assert (int(projected.zero_point()), int(shares.zero_point())) == (128, 0)
    assert projected.range()[1] >= 0.99 * projected.range()[0].abs() > 0
    order = [node.name for node in model.graph.nodes]
    assert order.index("attention_qkv_edge") == order.index("attention_qkv") + 1


def test_backends_that_multiply_them_in_float_get_none():
    assert not operands(prepared(Attention(), "x86"))
    assert not operands(prepared(Attention(), "onnxruntime"))


def test_what_a_division_depends_on_stays_float():
    assert not operands(prepared(LinearAttention()))


@pytest.mark.parametrize("bits", [1, 2, 8])
def test_the_zero_point_stays_in_the_middle_while_the_step_learns(bits):
    model = prepared(Attention(), residual_bits=bits).train()
    projected = operands(model)["attention_qkv_edge"]
    before = projected.scale().detach().clone()
    optimizer = torch.optim.Adam(fq.param_groups(model, lr=1e-2, quantizer_lr=1e-2))
    for _ in range(3):
        optimizer.zero_grad()
        model(IMAGES).square().sum().backward()
        optimizer.step()
    assert int(projected.zero_point()) == 2 ** (bits - 1)
    assert not torch.equal(projected.scale(), before)
    fq.freeze(model)
    assert torch.equal(model.eval()(IMAGES), fq.convert(model)(IMAGES))


def test_an_operand_of_zeros_alone_has_a_grid():
    quantizer = OperandFakeQuantize(8, scheme="affine")
    quantizer.initialize_from(torch.zeros(3))
    assert int(quantizer.zero_point()) == 128
    assert torch.equal(quantizer.eval()(torch.zeros(3)), torch.zeros(3))


def test_a_packed_file_restores_them(tmp_path):
    model = prepared(Attention())
    fq.freeze(model)
    reference = fq.convert(model)
    fq.save(reference, tmp_path / "attention.fxq")
    assert torch.equal(fq.load(tmp_path / "attention.fxq", Attention())(IMAGES), reference(IMAGES))


def test_a_layer_that_reads_two_edges_has_a_quantizer_of_its_own():
    class Again(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.conv = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(2))
            self.head = nn.Linear(3, 5)

        def forward(self, x):
            x = torch.relu(self.stem(x))
            return self.head(self.conv(self.conv(x) + x).mean((2, 3)))

    model = fq.prepare(Again(), [fq.Rule("*", 8, 8)], calibration=[IMAGES])
    assert not model.get_submodule("conv").input_is_quantized
    fq.freeze(model)
    assert fq.verify(model, fq.convert(model), [IMAGES]).reference_equals_fake_quant
