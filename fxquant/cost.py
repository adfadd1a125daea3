"""What a quantized model costs: multiply-accumulates, bits, bytes, bit operations. One definition of each.

All widths come from ``bit_width()`` of the estimators, so every figure is differentiable where widths are learned.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .estimators import estimators_of
from .layers import QATLayer


@dataclass(frozen=True)
class LayerCost:
    """The sizes of one layer, for one image.

    Attributes:
        macs: multiply-accumulates.
        weights: elements of the weight.
        inputs: elements of the tensors that enter, of all calls.
    """

    macs: int
    weights: int
    inputs: int


def qat_layers(model: nn.Module) -> dict[str, QATLayer]:
    """The layers that train quantized, by name, in the order of the module tree."""
    return {name: m for name, m in model.named_modules() if isinstance(m, QATLayer)}


@torch.no_grad()
def measure_costs(model: nn.Module, example_inputs: tuple[Tensor, ...]) -> dict[str, LayerCost]:
    """Run ``example_inputs`` through ``model`` once and read off every quantized layer's sizes per image."""
    costs: dict[str, LayerCost] = {}
    images = len(example_inputs[0])  # not what a layer gets: windows of images are cut in between
    handles = []
    for name, layer in qat_layers(model).items():

        def note(layer, args, out, name=name):
            per_output = layer.weight[0].numel()
            macs = out.numel() * per_output // images
            before = costs.get(name, LayerCost(0, 0, 0))  # of earlier calls
            inputs = args[0].numel() // images
            costs[name] = LayerCost(macs + before.macs, layer.weight.numel(), inputs + before.inputs)

        handles.append(layer.register_forward_hook(note))
    training = model.training
    try:
        model.eval()(*example_inputs)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return costs


def weight_bits(layer: QATLayer) -> Tensor:
    """Mean width of a layer's weight, a scalar."""
    return layer.weight_fake_quant.bit_width().mean()


def activation_bits(layer: QATLayer) -> Tensor:
    """Width of a layer's input, a scalar."""
    return layer.input_fake_quant.bit_width().mean()


def mean_weight_bits(layers: dict[str, QATLayer], costs: dict[str, LayerCost]) -> Tensor:
    """``sum(bits * elements) / sum(elements)`` over the weights of all quantized layers."""
    return _weighted_mean([(weight_bits(layer), costs[name].weights) for name, layer in layers.items()])


def mean_activation_bits(layers: dict[str, QATLayer], costs: dict[str, LayerCost]) -> Tensor:
    """``sum(bits * elements) / sum(elements)`` over the inputs of all quantized layers, per image."""
    return _weighted_mean([(activation_bits(layer), costs[name].inputs) for name, layer in layers.items()])


def bops(layers: dict[str, QATLayer], costs: dict[str, LayerCost]) -> Tensor:
    """Bit operations per image: ``sum(MACs * weight bits * activation bits)`` over quantized layers."""
    return torch.stack(
        [costs[name].macs * weight_bits(layer) * activation_bits(layer) for name, layer in layers.items()]
    ).sum()


def float_bytes(model: nn.Module) -> int:
    """Bytes of the parameters of a float model, 4 each."""
    return 4 * sum(p.numel() for p in model.parameters())


def packed_bytes(elements: int, bits: int) -> int:
    """Bytes of so many codes of ``bits`` bits each, packed."""
    return -(-elements * bits // 8)


def ideal_weight_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters packed at their own widths: :func:`packed_bytes` of each quantized weight, and
    :func:`unpacked_bytes` beside them."""
    layers = qat_layers(model).values()
    packed = (packed_bytes(layer.weight.numel(), int(weight_bits(layer).detach().round())) for layer in layers)
    return sum(packed) + unpacked_bytes(model)


def unpacked_bytes(model: nn.Module) -> int:
    """Bytes of what no width changes: a float32 scale and an int32 bias for each output channel of a quantized layer, 4
    bytes for each parameter that stays float. BatchNorm is folded away."""
    layers = qat_layers(model)
    counted: set[int] = {id(p) for p in quantizer_parameters(model)}
    for layer in layers.values():
        counted.update(id(p) for p in layer.parameters())  # BatchNorm's among them
    channels = sum(layer.weight.shape[0] for layer in layers.values())
    return 8 * channels + sum(4 * p.numel() for p in model.parameters() if id(p) not in counted)


def weight_bytes(layers: dict[str, QATLayer], costs: dict[str, LayerCost]) -> Tensor:
    """Bytes of the quantized weights alone, ``sum(bits * elements) / 8``; differentiable, without rounding up."""
    return torch.stack([weight_bits(layer) * (costs[name].weights / 8) for name, layer in layers.items()]).sum()


def quantizer_parameters(model: nn.Module) -> list[nn.Parameter]:
    """All learnable parameters of quantizers."""
    return [p for estimator in estimators_of(model) for p in estimator.parameters(recurse=False)]


def _weighted_mean(pairs: list[tuple[Tensor, int]]) -> Tensor:
    total = sum(elements for _, elements in pairs)
    weighted = torch.stack([bits.to(torch.float64) * elements for bits, elements in pairs])
    return (weighted.sum() / total).to(torch.float32)  # in float64, so that 8 bits everywhere are 8, not 8.000001
