"""Capacity of quantized tensors: how many bits of what they carry survive the noise of their quantizers.

GDNSQ (arXiv 2508.14004) reads a quantized network as noisy channels. Here each quantized tensor is one Gaussian
channel per feature channel c, in parallel:

* signal power ``S_c``: variance of the tensor's values, over images and positions;
* noise power ``N_c``: mean of ``(Q(x) - x)^2``, the sum of a part from rounding (elements inside of the range, off by
  up to half a step) and one from clipping (all others);
* capacity per element: the mean over c of ``1/2 * log2(1 + S_c / N_c)`` bits, times elements per image for the tensor.

Analytic values it agrees with: a uniform x on the range of b one-sided bits has ``N = step^2/12`` and ``S =
(n*step)^2/12`` with ``n = 2^b - 1``, so ``1/2 * log2(1 + n^2)`` bits, which is b but for half a bit at most; a
Gaussian of variance ``s^2`` that is not clipped has ``1/2 * log2(1 + 12*s^2/step^2)``.

The noise of a weight is measured where it acts, at the output of its layer: ``N_c`` is the power of the layer's
product of ``Q(W) - W`` with ``Q(x)`` and ``S_c`` the variance of that of ``W`` with ``Q(x)``, both before BatchNorm,
which scales a channel's signal and noise alike.

No element of b bits carries more than b of them; what a layer computes, in float32, no more than its significand's 24.
A channel that never changes carries nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from . import cost
from .computed import effective_weight
from .edges import PRODUCTS
from .errors import SpecError
from .estimators import Estimator
from .graph import called_module
from .grid import MAX_BITS
from .layers import QATLayer
from .prepare import _images, prepared_info

FLOAT_BITS = 24
"""Significant bits of float32: the most that an element which is not quantized itself can carry."""

INPUT, WEIGHT, EDGE = "input", "weight", "edge"


@dataclass(frozen=True)
class TensorCapacity:
    """What a quantized tensor carries.

    Attributes:
        name: ``<layer>.input``, ``<layer>.weight`` (measured at the layer's output), or that of an edge.
        kind: ``input``, ``weight`` or ``edge``.
        bits: width of its quantizer, the mean over channels where they differ.
        elements: of the tensor, or of the layer's output, per image.
        signal: variance of its values, mean over channels.
        noise: power of its quantization error, mean over channels, in the units of ``signal``.
        rounding, clipping: the two parts of it; of a weight they may correlate, and then do not add up to it.
        bits_per_element: capacity, mean over channels.
        widest: the most bits that the backend's kernels compute rightly there.
    """

    name: str
    kind: str
    bits: float
    elements: int
    signal: float
    noise: float
    rounding: float
    clipping: float
    bits_per_element: float
    widest: int = MAX_BITS

    @property
    def total(self) -> float:
        """Capacity in bits per image."""
        return self.bits_per_element * self.elements

    @property
    def narrow(self) -> bool:
        """Whether it could be wider; a learned width counts as the whole one nearest to it."""
        return self.bits < self.widest - 0.5


def gaussian_capacity(signal: Tensor, noise: Tensor, at_most: float) -> Tensor:
    """``1/2 * log2(1 + signal/noise)`` bits, elementwise, bounded by ``at_most``; 0 where there is no signal.

    >>> gaussian_capacity(torch.tensor([15.0, 0.0, 1.0]), torch.tensor([1.0, 0.0, 0.0]), 8)
    tensor([2., 0., 8.])
    """
    ratio = signal / noise.clamp(min=torch.finfo(noise.dtype).tiny)
    bits = (0.5 * torch.log2(1 + ratio)).clamp(max=at_most)
    return torch.where(signal > 0, bits, 0.0)


class ChannelPowers:
    """Signal and noise powers of one quantized tensor, collected over batches; one figure a channel.

    Args:
        axis: of the channels.
        at_most: bits an element can carry at most.
    """

    def __init__(self, axis: int, at_most: float):
        self.axis, self.at_most = axis, at_most
        self.count = 0  # of values in each channel
        self._elements = self._images = 0  # of all calls
        self._sums: Tensor | None = None  # [5, C] float64: values; squares of values, rounding, clipping, all error

    def add(self, signal: Tensor, rounding: Tensor, clipping: Tensor | None, images: int) -> None:
        """Take in a batch of values and of the two parts of their error (None where nothing is clipped)."""
        values, rounding = self._rows(signal), self._rows(rounding)
        rounded = clipped = total = _power(rounding)
        if clipping is None:
            clipped = torch.zeros_like(total)
        else:
            clipping = self._rows(clipping)
            clipped, total = _power(clipping), _power(rounding + clipping)
        sums = torch.stack([values.sum(1, dtype=torch.float64), _power(values), rounded, clipped, total])
        self._sums = sums if self._sums is None else self._sums + sums
        self.count += values.shape[1]
        self._elements += signal.numel()
        self._images += images

    @property
    def elements(self) -> int:
        """Per image; of a layer that is called at several sizes, the mean of its calls."""
        return self._elements // self._images

    def _rows(self, x: Tensor) -> Tensor:
        axis = self.axis % x.ndim
        return x.detach().transpose(0, axis).reshape(x.shape[axis], -1)

    def powers(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Signal, rounding, clipping and noise power, each [C]."""
        mean, square, *errors = self._sums / self.count
        variance = (square - mean.square()).clamp(min=0)
        negligible = 1e-10 * square  # of rounding in the sums themselves: the channel is constant
        return torch.where(variance > negligible, variance, 0.0), *errors

    def bits_per_element(self) -> float:
        """Capacity of an element, mean over channels."""
        signal, _, _, noise = self.powers()
        return float(gaussian_capacity(signal, noise, self.at_most).mean())


def _power(rows: Tensor) -> Tensor:
    return rows.square().sum(1, dtype=torch.float64)


def channel_axis(x: Tensor, channels_last: bool) -> int:
    """Axis of the channels of a tensor between layers: 1 of [N, C, H, W], the last of tokens, vectors, [N, H, W, C]."""
    return 1 if x.ndim == 4 and not channels_last else -1


def _channels_last(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether the channels of what a node gives are its last axis, as linear layers and LayerNorm have them.

    The nearest layer before it says so, or a permutation in between; a product of activations has heads at axis 1.
    """
    while node.op != "placeholder" and node.all_input_nodes:
        module = called_module(node, modules)
        if isinstance(module, (nn.Linear, nn.LayerNorm)):
            return True
        if isinstance(module, (nn.Conv2d, nn.BatchNorm2d)) or node.target in PRODUCTS:
            return False
        order = node.args[1:] if node.target in ("permute", torch.permute) else ()
        order = tuple(order[0]) if len(order) == 1 else order
        if order in ((0, 2, 3, 1), (0, 3, 1, 2)):
            return order[-1] == 1
        node = node.all_input_nodes[0]
    return False


def split_error(x: Tensor, quantized: Tensor, step: Tensor) -> tuple[Tensor, Tensor | None]:
    """``quantized - x`` as what rounding (up to half a step, at either end of the range too) and what clipping did."""
    error = quantized - x
    clipped = error.abs() > 0.501 * step
    if not bool(clipped.any()):
        return error, None
    return error.masked_fill(clipped, 0.0), error.masked_fill(~clipped, 0.0)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, the model is in eval mode and no gradient is recorded."""
    training = model.training
    try:
        with torch.no_grad():
            model.eval()
            yield
    finally:
        model.train(training)


def measure_capacity(
    model: fx.GraphModule, batches: Iterable, max_batches: int | None = None
) -> dict[str, TensorCapacity]:
    """Capacity of every quantized tensor of a prepared model, with its ranges and widths of this moment.

    Args:
        model: from :func:`fxquant.prepare`, before :func:`fxquant.freeze` or after.
        batches: image tensors, or tuples that begin with one.
        max_batches: how many of them to use; all when not given.

    Returns:
        By name of the tensor, in the order of the graph; an input that its edge has quantized stands under the edge.

    Raises:
        SpecError: for a model without ranges.
        EmptyDataError: where there is no batch.
    """
    probe = _Probe(model)
    device = next(model.parameters()).device
    with evaluating(model), probe:
        for images in itertools.islice(_images(batches), max_batches):
            probe.images = len(images)
            model(images.to(device))
    return probe.capacities()


def product(layer: QATLayer, x: Tensor, weight: Tensor) -> Tensor:
    """A layer's convolution or matrix product of these operands with its bias added, before BatchNorm."""
    return type(layer)._compute(layer, x, weight, layer.bias)


def edge_name(node: fx.Node) -> str:
    """Name of the tensor that an edge's quantizer rounds; one quantizer can round several, as around a pooling."""
    return f"{node.args[0].name}_{EDGE}"


class _Probe:
    """Watches every quantizer of a model while images pass."""

    def __init__(self, model: fx.GraphModule):
        self.layers = cost.qat_layers(model)
        self.info = prepared_info(model)
        modules = dict(model.named_modules(remove_duplicate=False))
        # By module: it, and of its tensors, in the order it sees them, the names and where their channels are.
        self.edges: dict[str, tuple[Estimator, list[tuple[str, bool]]]] = {}
        for node in model.graph.nodes:
            if node.op == "call_module" and isinstance(modules[node.target], Estimator):
                tensor = edge_name(node), _channels_last(node.args[0], modules)
                self.edges.setdefault(node.target, (modules[node.target], []))[1].append(tensor)
        self.images = 0
        self.found: dict[str, tuple[str, float, ChannelPowers]] = {}
        for name, layer in self.layers.items():
            if layer.input_fake_quant is None:
                raise SpecError(f"layer {name!r} has no input quantizer, so nothing says what it carries")
            layer.input_fake_quant.require_initialized()

    def __enter__(self) -> None:
        self._handles = [
            layer.register_forward_pre_hook(lambda _, args, name=name: self._layer(name, args[0]))
            for name, layer in self.layers.items()
        ]
        for edge, tensors in self.edges.values():
            turn = itertools.cycle(tensors)
            self._handles.append(
                edge.register_forward_hook(lambda edge, args, _, turn=turn: self._edge(*next(turn), edge, args[0]))
            )

    def __exit__(self, *exc) -> None:
        for handle in self._handles:
            handle.remove()

    def _layer(self, name: str, x: Tensor) -> None:
        layer = self.layers[name]
        quantizer, axis = layer.weight_fake_quant, layer._channel_axis
        if not layer.input_is_quantized:
            x = self._quantizer(f"{name}.{INPUT}", INPUT, layer.input_fake_quant, x, axis)
        weight = effective_weight(layer)
        rounded = quantizer.eval_forward(weight)
        rounding, clipping = split_error(weight, rounded, quantizer._viewed(quantizer.step(), weight))
        if quantizer.binary:
            rounding, clipping = rounded - weight, None  # the whole line is the range of two levels
        clean = product(layer, x, weight)
        self._powers(f"{name}.{WEIGHT}", WEIGHT, quantizer, axis, FLOAT_BITS).add(
            clean,
            product(layer, x, weight + rounding) - clean,
            None if clipping is None else product(layer, x, weight + clipping) - clean,
            self.images,
        )

    def _edge(self, name: str, channels_last: bool, quantizer: Estimator, x: Tensor) -> None:
        self._quantizer(name, EDGE, quantizer, x, channel_axis(x, channels_last))

    def _quantizer(self, name: str, kind: str, quantizer: Estimator, x: Tensor, axis: int) -> Tensor:
        quantized = quantizer.eval_forward(x)
        error = split_error(x, quantized, quantizer._viewed(quantizer.step(), x))
        self._powers(name, kind, quantizer, axis, float(quantizer.bit_width().max())).add(x, *error, self.images)
        return quantized

    def _powers(self, name: str, kind: str, quantizer: Estimator, axis: int, at_most: float) -> ChannelPowers:
        if name not in self.found:
            self.found[name] = kind, float(quantizer.bit_width().mean()), ChannelPowers(axis, at_most)
        return self.found[name][2]

    def capacities(self) -> dict[str, TensorCapacity]:
        out, widest = {}, {}
        for name, layer in self.layers.items():
            limits = self.info.widest(layer, layer.weight_fake_quant.whole_bits)
            widest |= {f"{name}.{WEIGHT}": limits["weight_bits"], f"{name}.{INPUT}": limits["activation_bits"]}
        for name, (kind, bits, powers) in self.found.items():
            signal, rounding, clipping, noise = (float(part.mean()) for part in powers.powers())
            figures = signal, noise, rounding, clipping, powers.bits_per_element()
            out[name] = TensorCapacity(name, kind, bits, powers.elements, *figures, widest.get(name, MAX_BITS))
        return out
