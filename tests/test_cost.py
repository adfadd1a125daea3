"""Cost figures against numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fxquant as fq
from fxquant import cost
from tests.models import TinyMobile, TinyResidual, settle

pytestmark = pytest.mark.usefixtures("with_vnni_throughout")

# TinyResidual on 16x16 images: 16x16 into the stem, 8x8 after the pool, 4x4 after conv1 and shortcut.
BY_HAND = {
    #         multiply-accumulates     weights         inputs
    "stem": (16 * 16 * 8 * 3 * 9, 8 * 3 * 9, 3 * 16 * 16),
    "conv1": (4 * 4 * 16 * 8 * 9, 16 * 8 * 9, 8 * 8 * 8),
    "conv2": (4 * 4 * 16 * 16 * 9, 16 * 16 * 9, 16 * 4 * 4),
    "shortcut": (4 * 4 * 16 * 8, 16 * 8, 8 * 8 * 8),
    "head": (16 * 5, 16 * 5, 16),
}
WIDTHS = {"stem": (8, 8), "conv1": (4, 3), "conv2": (2, 5), "shortcut": (1, 7), "head": (6, 6)}


@pytest.fixture
def model() -> nn.Module:
    x = torch.randn(8, 3, 16, 16)
    rules = [fq.Rule(name, *bits) for name, bits in WIDTHS.items()]
    return fq.prepare(settle(TinyResidual(), x), rules, calibration=[x])


def test_sizes_of_every_layer(model):
    costs = model.meta["fxquant"].costs
    assert {n: (c.macs, c.weights, c.inputs) for n, c in costs.items()} == BY_HAND


@pytest.mark.parametrize("batch", [1, 5])
def test_sizes_do_not_depend_on_the_batch(model, batch):
    model.train()
    assert cost.measure_costs(model, (torch.randn(batch, 3, 16, 16),)) == model.meta["fxquant"].costs
    assert model.training
    assert not any(m._forward_hooks for m in model.modules())


def test_depthwise_layers_count_their_own_channel_alone():
    x = torch.randn(4, 3, 16, 16)
    costs = fq.prepare(settle(TinyMobile(), x), [fq.Rule("*", 4, 4)], calibration=[x]).meta["fxquant"].costs
    assert (costs["depthwise"].macs, costs["depthwise"].weights) == (8 * 8 * 8 * 9, 8 * 9)
    assert costs["pointwise"].macs == 8 * 8 * 8 * 8
    assert costs["head"].macs == 16 * 5


def test_a_layer_used_twice_computes_twice_and_is_stored_once():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x):
            return self.conv(self.conv(x)).flatten(1)

    x = torch.randn(2, 3, 8, 8)
    costs = fq.prepare(Twice(), [fq.Rule("*", 4, 4)], calibration=[x]).meta["fxquant"].costs
    assert costs["conv"] == cost.LayerCost(macs=2 * 8 * 8 * 3 * 3 * 9, weights=81, inputs=2 * 192)


def test_sizes_are_of_an_image_where_a_layer_sees_windows_of_it():
    class Windows(nn.Module):
        """Four windows of an image side by side in the batch, as in Swin."""

        def __init__(self):
            super().__init__()
            self.conv, self.linear = nn.Conv2d(3, 3, 1), nn.Linear(48, 5)

        def forward(self, x):
            windows = self.conv(x).unflatten(2, (2, 4)).unflatten(4, (2, 4)).permute(0, 2, 4, 1, 3, 5).flatten(0, 2)
            return self.linear(windows.flatten(1)).unflatten(0, (-1, 4)).mean(1)

    costs = fq.prepare(Windows(), [fq.Rule("*", 4, 4)], calibration=[torch.randn(2, 3, 8, 8)]).meta["fxquant"].costs
    assert costs["linear"] == cost.LayerCost(macs=4 * 48 * 5, weights=48 * 5, inputs=4 * 48)


def test_mean_bits_and_bit_operations(model):
    layers, costs = cost.qat_layers(model), model.meta["fxquant"].costs
    weights = sum(BY_HAND[n][1] * WIDTHS[n][0] for n in BY_HAND) / sum(s[1] for s in BY_HAND.values())
    inputs = sum(BY_HAND[n][2] * WIDTHS[n][1] for n in BY_HAND) / sum(s[2] for s in BY_HAND.values())
    bops = sum(BY_HAND[n][0] * WIDTHS[n][0] * WIDTHS[n][1] for n in BY_HAND)
    assert float(cost.mean_weight_bits(layers, costs)) == pytest.approx(weights, rel=1e-6)
    assert float(cost.mean_activation_bits(layers, costs)) == pytest.approx(inputs, rel=1e-6)
    assert float(cost.bops(layers, costs)) == pytest.approx(bops, rel=1e-6)


def test_figures_are_differentiable_where_widths_are_learned():
    x = torch.randn(4, 3, 16, 16)
    model = fq.prepare(settle(TinyResidual(), x), [fq.Rule("*", (2, 8), (2, 8), "nipq")], calibration=[x])
    layers, costs = cost.qat_layers(model), model.meta["fxquant"].costs
    # nipq starts at 0.9 of the interval: 2 + 0.9 * 6
    assert float(cost.mean_weight_bits(layers, costs).detach()) == pytest.approx(7.4, rel=1e-6)
    cost.bops(layers, costs).backward()
    slope = (8 - 2) * 0.9 * 0.1
    for name, layer in layers.items():
        assert float(layer.weight_fake_quant.raw_width.grad) == pytest.approx(BY_HAND[name][0] * 7.4 * slope, rel=1e-5)
        assert float(layer.input_fake_quant.raw_width.grad) == pytest.approx(BY_HAND[name][0] * 7.4 * slope, rel=1e-5)


def test_bytes_by_hand(model):
    float_parameters = sum(s[1] for s in BY_HAND.values()) + 2 * (8 + 16 + 16) + 16 + 5  # BatchNorms, biases
    assert cost.float_bytes(TinyResidual()) == 4 * float_parameters
    packed = sum(-(-BY_HAND[n][1] * WIDTHS[n][0] // 8) for n in BY_HAND)
    scales_and_biases = 8 * (8 + 16 + 16 + 16 + 5)
    assert cost.ideal_weight_bytes(model) == packed + scales_and_biases
    fq.freeze(model)
    assert cost.ideal_weight_bytes(model) == packed + scales_and_biases


def test_bytes_of_a_layer_kept_float_and_of_a_loose_batch_norm():
    class Loose(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.conv, self.head = nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), nn.Linear(4, 5)

        def forward(self, x):
            return self.head(self.conv(self.norm(x)).mean((2, 3)))

    x = torch.randn(4, 3, 8, 8)
    model = fq.prepare(Loose(), [fq.Rule("conv", 3, 3)], calibration=[x])
    assert cost.ideal_weight_bytes(model) == -(-4 * 3 * 9 * 3 // 8) + 8 * 4 + 4 * (2 * 3 + 4 * 5 + 5)


def test_quantizer_parameters_are_those_of_all_quantizers(model):
    names = {id(p): n for n, p in model.named_parameters()}
    quantizers = {names[id(p)] for p in cost.quantizer_parameters(model)}
    assert quantizers == {n for n in names.values() if "fake_quant." in n or "_edge." in n}
    assert len(quantizers) == len(cost.quantizer_parameters(model)) == 5 * 3 + 2 * 2


def test_the_mean_of_equal_widths_is_that_width():
    """8.000001, as sums in float32 make it of these sizes, would be over a budget of 8."""
    x = torch.randn(2, 3, 16, 16)
    prepared = fq.prepare(TinyResidual(), [fq.Rule("*", 8, 8)], calibration=[x])
    (layer, *_) = cost.qat_layers(prepared).values()
    sizes = [3 * (index + 1) for index in range(12)]
    layers = {str(index): layer for index in range(len(sizes))}
    costs = {str(index): cost.LayerCost(1, size, size) for index, size in enumerate(sizes)}
    assert float(cost.mean_weight_bits(layers, costs)) == 8
    assert float(cost.mean_activation_bits(layers, costs)) == 8
