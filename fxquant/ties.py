"""avoid_ties(): scales at which the integers do not depend on the order in which a runtime multiplies.

A sum of products ``n`` becomes the code ``round(n·s_x·s_w / s_y)``. Runtimes round the product of the three scales in
their own order: the reference multiplies by ``s_x·s_w``, then by ``1/s_y``; onnxruntime, fbgemm and qnnpack by one
number. The results are a few parts in 10^8 apart, which matters only where ``n·s_x·s_w / s_y`` is as near as that to
half a code. ``n`` is an integer, so for each channel there is one ``n`` beside each such tie, and all of them can be
looked at. Where the orders disagree, the scale is moved by parts in a million, which nothing else notices, until they
agree at every tie. The same is done for what requantizes codes: the 256 codes of an edge, the 65,536 pairs of an
addition, the sums of an average pooling.

Values that no finite set of integers gives (after SiLU, softmax, LayerNorm; a sum that a layer adds to an edge before
it rounds) are left as they are.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from .cost import qat_layers
from .estimators import Estimator
from .graph import called_module
from .layers import QATLayer
from .qconfig import MOVES_VALUES

_STEP, _GROWTH, _CANDIDATES = 2.0**-21, 1.055, 256  # from 5e-7, a few units of float32's last place, to 4e-4
_CHUNK = 8  # candidates that are looked at together
_HOPELESS = 5  # ties a candidate: one without any is then too rare to look for
_LARGEST = 2**20  # elements of one look
_DISAGREE = 1000  # what a tie at which orders disagree weighs, against one that is only near
_MARGIN = 2.0**-22  # of the value: what four roundings of float32 can add up to

_KEEPS_VALUES = MOVES_VALUES | {nn.ReLU, F.relu, torch.relu, "relu", operator.getitem, torch.cat, F.pad}
"""Operators whose results are among their inputs' values, or 0."""

_MEANS = {nn.AdaptiveAvgPool2d, F.adaptive_avg_pool2d, torch.mean, "mean"}


@torch.no_grad()
def avoid_ties(model: fx.GraphModule) -> dict[str, int]:
    """Move frozen scales away from ties, in place; the trained codes of weights stay.

    Returns:
        for each quantizer and layer where some tie is left, by name, at how many: empty where all integers are the
        same in any runtime that multiplies float32 scales in an order of its own.
    """
    graph = _Graph(model)
    left: dict[str, int] = {}
    for name, quantizer in graph.quantizers():
        sources = [source for node in graph.inputs[quantizer] for source in graph.sources(node)]
        if not sources:
            continue
        base = quantizer.frozen_scale.clone()
        if count := _search(lambda factor, q=quantizer, b=base, s=sources: _try_scale(q, b, factor, s)):
            left[name] = count
    for name, layer in qat_layers(model).items():
        layer._integer = None
        exits = [q for q in graph.readers(name) if q is not None]
        if exits and (count := _move_channels(layer, exits)):
            left[name] = count
    return left


def _factors() -> Iterator[float]:
    """1, then a little above and below it, further and further away."""
    yield 1.0
    for index in range(1, _CANDIDATES):
        yield 1 + _STEP * _GROWTH ** ((index - 1) // 2) * (1 if index % 2 else -1)


def _search(ties_at: Callable[[float], int]) -> int:
    """Settle on the first factor without a tie, or the one with fewest; returns how many are left."""
    counts: dict[float, int] = {}
    for factor in _factors():
        counts[factor] = ties_at(factor)
        if counts[factor] == 0:
            return 0
    return ties_at(min(counts, key=counts.get))


def _try_scale(quantizer: Estimator, base: Tensor, factor: float, sources: list[Callable[[Estimator], int]]) -> int:
    quantizer.frozen_scale.copy_((base.to(torch.float64) * factor).to(torch.float32))
    return sum(source(quantizer) for source in sources)


# ---- where a quantizer's values come from -----------------------------------------------------------------


class _Graph:
    """The frozen graph, as far as values on grids go."""

    def __init__(self, model: fx.GraphModule):
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.inputs: dict[Estimator, list[fx.Node]] = {}
        self.nodes: dict[str, list[fx.Node]] = {}
        for node in model.graph.nodes:
            module = self.module(node)
            if isinstance(module, QATLayer):
                self.nodes.setdefault(node.target, []).append(node)
                if module.input_fake_quant is not None and not module.input_is_quantized:
                    self.inputs.setdefault(module.input_fake_quant, []).append(node.args[0])
            elif isinstance(module, Estimator):
                self.inputs.setdefault(module, []).append(node.args[0])

    def module(self, node: fx.Node) -> nn.Module | None:
        return called_module(node, self.modules)

    def quantizers(self) -> Iterator[tuple[str, Estimator]]:
        """Activation quantizers in the order of the graph, each once."""
        for quantizer in self.inputs:
            yield quantizer.where, quantizer

    def readers(self, layer: str) -> list[Estimator]:
        """The quantizers that a layer's results reach as they are."""
        found: list[Estimator] = []
        reached = list(self.nodes.get(layer, ()))
        while reached:
            for user in reached.pop().users:
                module = self.module(user)
                if isinstance(module, Estimator):
                    found.append(module)
                elif isinstance(module, QATLayer):
                    found.append(module.input_fake_quant)
                elif self._kind(user) in _KEEPS_VALUES:
                    reached.append(user)
        return list(dict.fromkeys(found))

    def sources(self, node: fx.Node) -> list[Callable[[Estimator], int]]:
        """For each finite set of values that may come out of a node: the count of ties it has with a quantizer."""
        found: list[Callable[[Estimator], int]] = []
        for origin in self._origins(node):
            module, kind = self.module(origin), self._kind(origin)
            operands = [self.module(operand) for operand in origin.all_input_nodes]
            on_grids = bool(operands) and all(isinstance(operand, Estimator) for operand in operands)
            if isinstance(module, Estimator):
                found.append(lambda q, e=module: _ties_of_values(_levels(e) * _scale(e), q))
            elif on_grids and len(operands) == 2 and kind in (operator.add, torch.add):
                found.append(lambda q, ends=operands: _ties_of_sums(*ends, q))
            elif on_grids and len(operands) == 2 and kind in (operator.mul, torch.mul):
                found.append(lambda q, ends=operands: _ties_of_products(*ends, q))
            elif on_grids and len(operands) == 1 and kind in _MEANS and (count := self._averaged(origin)):
                found.append(lambda q, e=operands[0], n=count: _ties_of_means(e, n, q))
        return found

    def _origins(self, node: fx.Node) -> list[fx.Node]:
        """Where the values of a node come from, through operators that only choose among them."""
        origins, seen, reached = [], set(), [node]
        while reached:
            node = reached.pop()
            if node in seen:
                continue
            seen.add(node)
            if self._kind(node) in _KEEPS_VALUES:
                reached += node.all_input_nodes
            else:
                origins.append(node)
        return origins

    def _kind(self, node: fx.Node):
        module = self.module(node)
        return type(module) if module is not None else node.target

    def _averaged(self, node: fx.Node) -> int:
        """How many values a mean is over, 0 where that is not one number."""
        source = node.all_input_nodes[0]
        while "shape" not in source.meta and source.op == "call_module":
            source = source.args[0]  # through quantizers, which came after capture
        before, after = (math.prod(n.meta.get("shape", (0,))) for n in (source, node))
        return before // after if after and before % after == 0 else 0


# ---- ties -------------------------------------------------------------------------------------------------


def _scale(quantizer: Estimator) -> Tensor:
    return quantizer.frozen_scale.reshape(())


def _zero(quantizer: Estimator) -> Tensor:
    return quantizer.frozen_zero_point.reshape(())


def _levels(quantizer: Estimator) -> Tensor:
    """``q - z`` of every code, float32."""
    codes = torch.arange(quantizer.quant_min, quantizer.quant_max + 1, dtype=torch.float32)
    return codes.to(quantizer.frozen_scale.device) - _zero(quantizer)


def _near_a_tie(steps: Tensor, quantizer: Estimator, reach: Tensor | None = None) -> int:
    """How many of ``steps`` (float64, values over the scale) lie within ``reach`` of a tie between codes of the grid;
    by default within the roundings of a value of that size."""
    zero = _zero(quantizer).to(torch.float64)
    reach = _MARGIN * (steps.abs() + zero.abs() + 1) if reach is None else reach
    inside = (steps + zero > quantizer.quant_min) & (steps + zero < quantizer.quant_max)
    return int((inside & ((steps - torch.floor(steps) - 0.5).abs() < reach)).sum())


def _ties_of_values(values: Tensor, quantizer: Estimator) -> int:
    return _near_a_tie(values.to(torch.float64) / _scale(quantizer).to(torch.float64), quantizer)


def _ties_of_sums(left: Estimator, right: Estimator, quantizer: Estimator) -> int:
    a = _levels(left).to(torch.float64) * _scale(left).to(torch.float64)
    b = _levels(right).to(torch.float64) * _scale(right).to(torch.float64)
    scale = _scale(quantizer).to(torch.float64)
    # The operands are rounded before their sum is, so what counts is their size, not the sum's.
    size = (a.abs().reshape(-1, 1) + b.abs()) / scale
    reach = _MARGIN / 2 * (size + _zero(quantizer).to(torch.float64).abs() + 1)
    return _near_a_tie((a.reshape(-1, 1) + b) / scale, quantizer, reach)


def _ties_of_products(left: Estimator, right: Estimator, quantizer: Estimator) -> int:
    products = (_levels(left).to(torch.float64).reshape(-1, 1) * _levels(right).to(torch.float64)).unique()
    scale = _scale(left).to(torch.float64) * _scale(right).to(torch.float64) / _scale(quantizer).to(torch.float64)
    return _near_a_tie(products * scale, quantizer)


def _ties_of_means(entry: Estimator, count: int, quantizer: Estimator) -> int:
    step = _scale(entry).to(torch.float64) / count / _scale(quantizer).to(torch.float64)
    return _near_a_tie(_beside_ties(step.reshape(1), quantizer).flatten() * step, quantizer)


def _beside_ties(step: Tensor, quantizer: Estimator) -> Tensor:
    """The integers ``n`` whose ``n·step`` lies on either side of each tie of a grid, [channels, 2·ties] float64."""
    zero = _zero(quantizer).to(torch.float64)
    ties = torch.arange(quantizer.quant_min, quantizer.quant_max, device=step.device) - zero + 0.5
    below = torch.floor(ties / step.reshape(-1, 1))
    return torch.cat([below, below + 1], 1)


def _move_channels(layer: QATLayer, exits: list[Estimator]) -> int:
    """Choose each channel's factor of the weight's scale; returns how many ties are left."""
    codes, scale, bias = layer._coarsened()
    input_scale = layer.input_fake_quant.step()
    lowest, highest = _reach(codes, layer.input_fake_quant)
    best, device = torch.ones_like(layer.scale_shift), scale.device
    sums_vary = codes.flatten(1).any(1)  # a channel whose weights are all 0 gives its bias, nothing else
    fewest = torch.where(sums_vary, torch.iinfo(torch.int64).max, 0)
    open_ = torch.nonzero(sums_vary).flatten()
    factors = torch.tensor(list(_factors()), dtype=torch.float32, device=device)
    done = 0
    while done < len(factors) and len(open_):
        together = max(1, min(_CHUNK, _LARGEST // (2 * max(q.quant_max for q in exits) * len(open_))))
        tried = factors[done : done + together]
        done += len(tried)
        sums = (scale[open_].reshape(-1, 1) * tried).to(torch.float32) * input_scale  # [open, tried]
        biases = torch.round(bias[open_].reshape(-1, 1) / sums.to(torch.float64)).to(torch.float32)
        reach = [(end[open_].reshape(-1, 1) + biases).flatten() for end in (lowest, highest)]
        ties = sum(_ties_of_channels(sums.flatten(), biases.flatten(), q, *reach) for q in exits).reshape(sums.shape)
        count, which = ties.min(1)
        better = count < fewest[open_]
        fewest[open_] = torch.where(better, count, fewest[open_])
        best[open_] = torch.where(better, tried[which], best[open_])
        hopeless = (ties % _DISAGREE).double().mean(1) > _HOPELESS if done >= _CHUNK else torch.zeros_like(better)
        hopeless &= fewest[open_] < _DISAGREE
        open_ = open_[(fewest[open_] > 0) & ~hopeless]
    layer.scale_shift.copy_(best)
    return int((fewest // _DISAGREE).sum())


def _reach(codes: Tensor, entry: Estimator) -> tuple[Tensor, Tensor]:
    """Between what a channel's sums of products can lie, [O] float32 each; an input may be 0, as padding is."""
    codes, levels = codes.flatten(1), _levels(entry)
    products = torch.stack([codes * levels[0], codes * levels[-1], torch.zeros_like(codes)])
    return products.amin(0).sum(1).to(torch.float32), products.amax(0).sum(1).to(torch.float32)


def _ties_of_channels(sum_scale: Tensor, bias: Tensor, quantizer: Estimator, lowest: Tensor, highest: Tensor) -> Tensor:
    """Of each channel, how many sums lie near a tie, and ``_DISAGREE`` for each at which orders disagree, [O].

    Those that are merely near matter to an order that is not tried here. Of 8-bit results of 8-bit operands there are
    some for every scale, of narrower ones for hardly any.

    Args:
        sum_scale: ``s_x·s_w`` [O] float32.
        bias: whole steps of it, [O]; some runtimes add it as a float.
        lowest, highest: between what the sums lie, the bias included, [O]; no other tie counts.
    """
    scale, zero = _scale(quantizer), _zero(quantizer)
    multiplier = sum_scale / scale
    n = _beside_ties(multiplier.to(torch.float64), quantizer)
    exact = n * (sum_scale.to(torch.float64) / scale.to(torch.float64)).reshape(-1, 1)
    in_reach = (n >= lowest.reshape(-1, 1)) & (n <= highest.reshape(-1, 1))
    near = in_reach & ((exact - torch.floor(exact) - 0.5).abs() < _MARGIN * (exact.abs() + zero.abs() + 1))
    n = n.to(torch.float32)
    sum_scale, multiplier, bias = (t.reshape(-1, 1) for t in (sum_scale, multiplier, bias))
    products, float_bias = n - bias, bias * sum_scale
    sums = n * sum_scale, products * sum_scale + float_bias
    orders = [s * (1.0 / scale) for s in sums] + [s / scale for s in sums]
    orders += [n * multiplier, (products + float_bias / sum_scale) * multiplier]
    codes = [torch.round(order) for order in orders] + [torch.round(order + zero) - zero for order in orders]
    disagree = torch.zeros_like(n, dtype=torch.bool)
    for other in codes[1:]:
        disagree |= other != codes[0]
    return near.sum(1) + _DISAGREE * (disagree & in_reach).sum(1)
