"""What each width of each layer costs the model, measured or predicted: what :func:`fxquant.allocate` weighs up.

One figure per layer, kind of tensor (weight, or input: the activation that enters) and width, in nats per image, all
other tensors being float:

* ``loss``: the Kullback-Leibler divergence of the output from that of the float model, measured with this tensor
  quantized. One forward per figure.
* ``fisher``: its second-order prediction, ``1/2 * d^T F d`` with d what quantization adds to the layer's output and F
  the Fisher information of the model at the float weights. As ``d^T F d = E[(g^T d)^2]``, g the gradient of the
  log-likelihood of a label drawn from the model's own distribution, one backward a batch serves all figures, no label
  is needed, and the correlation between elements is kept, which a diagonal F would drop.
* ``capacity``: nothing of the task; the capacity (:mod:`fxquant.capacity`) that the tensor has at that width.

Ranges are fitted for each width anew, by the rule's ``init``, as :func:`fxquant.prepare` would.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from . import cost, grid
from .capacity import FLOAT_BITS, INPUT, WEIGHT, ChannelPowers, evaluating, measure_capacity, product, split_error
from .computed import effective_weight
from .errors import SpecError, UnknownNameError
from .estimators import Estimator
from .layers import QATLayer
from .prepare import _images, _quantizers_bypassed
from .ranges import RangeObserver, step_and_zero
from .spec import check_count

METHODS = ("capacity", "fisher", "loss")

Candidates = Mapping[str, tuple[Iterable[int], Iterable[int]]]
"""Widths in question of each layer's weight and input."""


@dataclass
class Sensitivity:
    """What :func:`measure_sensitivity` found.

    Attributes:
        method: ``capacity``, ``fisher`` or ``loss``.
        tensors: by name (``<layer>.weight``, ``<layer>.input``) and width: nats, or bits of capacity, per image.
        edges: for ``capacity``, bits per image of the tensors between layers, whose width is given.
    """

    method: str
    tensors: dict[str, dict[int, float]]
    edges: dict[str, float] = field(default_factory=dict)


def measure_sensitivity(
    model: fx.GraphModule,
    batches: Iterable,
    method: str,
    candidates: Candidates,
    *,
    max_batches: int = 4,
    seed: int = 0,
) -> Sensitivity:
    """What the candidate widths of each layer cost, by one of the methods above.

    Args:
        model: from :func:`fxquant.prepare`, not frozen; its parameters and ranges stay as they are.
        batches: image tensors, or tuples that begin with one.
        candidates: widths by layer.
        max_batches: how many batches to use.
        seed: of the labels that ``fisher`` draws.

    Raises:
        UnknownNameError: an unknown method.
        SpecError: for a frozen model, or no batches to use.
        EmptyDataError: where there is no batch.
    """
    if method not in METHODS:
        raise UnknownNameError("sensitivity", method, METHODS)
    if any(layer.frozen for layer in cost.qat_layers(model).values()):
        raise SpecError("this model is frozen, its widths are settled; measure sensitivities before fxquant.freeze")
    check_count(max_batches, "max_batches")
    if not candidates:
        return Sensitivity(method, {})
    device = next(model.parameters()).device
    images = [batch.to(device) for batch in itertools.islice(_images(batches), max_batches)]
    with evaluating(model), _quantizers_bypassed(model):
        tensors = _Candidates(model, images, candidates)
        if method == "loss":
            return Sensitivity(method, _measured_divergence(model, images, tensors))
        if method == "fisher":
            return Sensitivity(method, _fisher(model, images, tensors, seed))
        found = _capacities(model, images, tensors)
    known = measure_capacity(model, images)
    return Sensitivity(method, found, {n: t.total for n, t in known.items() if t.kind not in (INPUT, WEIGHT)})


# ---- operands at any width -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Grid:
    """A grid fitted to a tensor: [C] steps and zero-points along ``axis``."""

    bits: int
    scheme: str
    step: Tensor
    zero: Tensor
    axis: int | None

    @classmethod
    def fitted(cls, observer: RangeObserver, bits: int, like: Estimator) -> Grid:
        """To what ``observer`` saw, the way the quantizer ``like`` would."""
        scheme = like.grid_scheme
        ends = observer.range(like.init, bits, scheme, like.percentile)
        return cls(bits, scheme, *step_and_zero(*ends, bits, scheme), like.axis)

    def __call__(self, x: Tensor) -> Tensor:
        """``x``, quantized and read back."""
        step, zero = self.steps(x), grid.channel_view(self.zero, x.ndim, self.axis)
        binary = grid.is_binary(self.bits, self.scheme)
        return grid.dequantize(grid.quantize(x, step, zero, *grid.bounds(self.bits, self.scheme), binary), step, zero)

    def steps(self, x: Tensor) -> Tensor:
        """The steps, shaped to broadcast against ``x``."""
        return grid.channel_view(self.step, x.ndim, self.axis)


class _Candidates:
    """A grid for every candidate width of every layer's weight and input."""

    def __init__(self, model: fx.GraphModule, images: list[Tensor], candidates: Candidates):
        layers = cost.qat_layers(model)
        self.layers: dict[str, QATLayer] = {name: layers[name] for name in candidates}
        observers = {name: RangeObserver() for name in self.layers}

        def observe(name: str, x: Tensor, weight: Tensor) -> Tensor:
            observers[name].update(x, None, f"the input of layer {name!r}")
            return product(self.layers[name], x, weight)

        with tapped(self.layers, observe):
            for batch in images:
                model(batch)
        self.weights: dict[str, dict[int, Grid]] = {}
        self.inputs: dict[str, dict[int, Grid]] = {}
        for name, layer in self.layers.items():
            quantizer, entry = layer.weight_fake_quant, layer.input_fake_quant
            observer = RangeObserver()
            observer.update(effective_weight(layer), quantizer.axis, f"the weight of layer {name!r}")
            self.weights[name] = {b: Grid.fitted(observer, b, quantizer) for b in candidates[name][0]}
            self.inputs[name] = {b: Grid.fitted(observers[name], b, entry) for b in candidates[name][1]}

    def of(self, name: str, x: Tensor, weight: Tensor) -> Iterator[tuple[str, int, Tensor, Tensor]]:
        """(tensor, width, x, weight) of a layer's product, one operand at a time quantized."""
        for bits, fitted in self.weights[name].items():
            yield f"{name}.{WEIGHT}", bits, x, fitted(weight)
        for bits, fitted in self.inputs[name].items():
            yield f"{name}.{INPUT}", bits, fitted(x), weight

    def table(self, value: Callable[[], object] = float) -> dict[str, dict[int, object]]:
        """An entry for each tensor and width."""
        out: dict[str, dict[int, object]] = {}
        for name in self.layers:
            out[f"{name}.{WEIGHT}"] = {bits: value() for bits in self.weights[name]}
            out[f"{name}.{INPUT}"] = {bits: value() for bits in self.inputs[name]}
        return out


@contextmanager
def tapped(layers: Mapping[str, QATLayer], tap: Callable[[str, Tensor, Tensor], Tensor]) -> Iterator[None]:
    """Inside, ``tap(name, x, weight)`` stands in for each layer's product, which :func:`product` gives."""
    for name, layer in layers.items():
        layer._compute = lambda x, weight, _, name=name: tap(name, x, weight)
    try:
        yield
    finally:
        for layer in layers.values():
            del layer._compute


# ---- methods ---------------------------------------------------------------------------------------------------------


def _capacities(model: fx.GraphModule, images: list[Tensor], tensors: _Candidates) -> dict[str, dict[int, float]]:
    powers: dict[tuple[str, int], ChannelPowers] = {}

    def tap(name: str, x: Tensor, weight: Tensor) -> Tensor:
        layer = tensors.layers[name]
        clean = product(layer, x, weight)
        for tensor, bits, other_x, other_weight in tensors.of(name, x, weight):
            of_input = tensor.endswith(f".{INPUT}")
            found = powers.setdefault(
                (tensor, bits), ChannelPowers(layer._channel_axis, bits if of_input else FLOAT_BITS)
            )
            if of_input:
                steps = tensors.inputs[name][bits].steps(x)
                found.add(x, *split_error(x, other_x, steps), len(batch))
            else:
                found.add(clean, product(layer, x, other_weight) - clean, None, len(batch))
        return clean

    with tapped(tensors.layers, tap):
        for batch in images:
            model(batch)
    out = tensors.table()
    for (tensor, bits), found in powers.items():
        out[tensor][bits] = found.bits_per_element() * found.elements
    return out


def _fisher(
    model: fx.GraphModule, images: list[Tensor], tensors: _Candidates, seed: int
) -> dict[str, dict[int, float]]:
    generator = torch.Generator().manual_seed(seed)
    out, total = tensors.table(), 0
    for batch in images:
        calls: list[tuple[str, Tensor, Tensor]] = []

        def tap(name: str, x: Tensor, weight: Tensor, calls=calls) -> Tensor:
            result = product(tensors.layers[name], x, weight)
            calls.append((name, x.detach(), result))
            return result.clone()  # the layer goes on in place

        with torch.enable_grad(), tapped(tensors.layers, tap):
            # The image, so that there is a gradient even where all parameters are held.
            logits = model(batch.detach().requires_grad_()).flatten(1)
            probabilities = logits.detach().softmax(-1).cpu()
            labels = torch.multinomial(probabilities, 1, generator=generator).to(logits.device)
            likelihood = logits.log_softmax(-1).gather(1, labels).sum()
            gradients = torch.autograd.grad(likelihood, [result for _, _, result in calls])
        slopes: dict[tuple[str, int], Tensor] = {}
        for (name, x, result), gradient in zip(calls, gradients, strict=True):
            layer = tensors.layers[name]
            clean, weight = result.detach(), effective_weight(layer)
            for tensor, bits, other_x, other_weight in tensors.of(name, x, weight):
                change = product(layer, other_x, other_weight) - clean
                slope = (gradient * change).reshape(len(batch), -1).sum(1)
                # A layer that is called several times moves the output by the sum of what its calls do.
                slopes[tensor, bits] = slopes.get((tensor, bits), 0) + slope
        for (tensor, bits), slope in slopes.items():
            out[tensor][bits] += 0.5 * float(slope.double().square().sum())
        total += len(batch)
    return {tensor: {bits: value / total for bits, value in row.items()} for tensor, row in out.items()}


def _measured_divergence(
    model: fx.GraphModule, images: list[Tensor], tensors: _Candidates
) -> dict[str, dict[int, float]]:
    expected = [model(batch).flatten(1).log_softmax(-1) for batch in images]
    total = sum(len(batch) for batch in images)
    out = tensors.table()
    for name, layer in tensors.layers.items():
        for kind, grids in ((WEIGHT, tensors.weights[name]), (INPUT, tensors.inputs[name])):
            for bits, fitted in grids.items():

                def tap(_, x, weight, layer=layer, kind=kind, fitted=fitted):
                    return product(layer, *((x, fitted(weight)) if kind == WEIGHT else (fitted(x), weight)))

                with tapped({name: layer}, tap):
                    for batch, want in zip(images, expected, strict=True):
                        got = model(batch).flatten(1).log_softmax(-1)
                        divergence = F.kl_div(got, want, reduction="sum", log_target=True)
                        out[f"{name}.{kind}"][bits] += float(divergence) / total
    return out
