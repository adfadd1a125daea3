"""The autograd functions that estimators share, and what they are built from.

A training step is bound by memory, so these keep to few passes over it: in place on buffers of their own, in float,
without masks (a ``torch.where`` on a mask takes five times a multiplication). Of tensors, ``x`` alone is saved, which
the layer before keeps anyway; a backward computes the output anew (:mod:`fxquant.estimators.recompute`). No tensor is
read by the host, but for single values that are in its memory already.

Throughout, ``s`` is the step, ``u = x/s``, and a level is a code less the zero-point.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .recompute import attach

_PIECE = 1 << 16  # elements, for each thread

HALF = 0.5
"""What rounds to a code is inside of a range: half a step beyond the ends is, too (LSQ, arXiv 1902.08153)."""

EDGE = 1e-4
"""In steps; by so much an end may be passed in float32 by what lies on it."""


def is_at_hand(value: Tensor) -> bool:
    """Whether the host can read a value without waiting for a device: a single one, in its own memory."""
    return value.numel() == 1 and value.device.type == "cpu"


def clamp_levels_(levels: Tensor, zero_point: Tensor | None, low: float, high: float) -> Tensor:
    """``clamp(levels + z, low, high) - z``, in place; ``None`` is a zero-point of 0."""
    if zero_point is None:
        return levels.clamp_(low, high)
    if is_at_hand(zero_point):
        zero = float(zero_point)
        return levels.clamp_(low - zero, high - zero)
    return levels.clamp_(low - zero_point, high - zero_point)


def pieces(
    tensors: Sequence[Tensor], parameters: Sequence[Tensor | None]
) -> Iterator[tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]]]:
    """Slices of tensors of one shape, and of parameters that broadcast against it, that fit into a core's cache.

    What several passes are made over stays there between them, and what they need besides is small. On a device, and
    where parameters differ along other axes than the first, the whole is the only piece.
    """
    first, size = tensors[0], _PIECE * torch.get_num_threads()
    single = all(parameter is None or parameter.numel() == 1 for parameter in parameters)
    by_row = all(p is None or p.numel() == 1 or p.shape[:1] == first.shape[:1] == (p.numel(),) for p in parameters)
    if first.device.type != "cpu" or first.numel() <= size:
        yield tuple(tensors), tuple(parameters)
    elif single and all(tensor.is_contiguous() for tensor in tensors):
        for slices in zip(*(tensor.view(-1).split(size) for tensor in tensors), strict=True):
            yield slices, tuple(None if p is None else p.reshape(()) for p in parameters)
    elif single or by_row:
        rows = max(size * len(first) // first.numel(), 1)
        for begin in range(0, len(first), rows):
            part = slice(begin, begin + rows)
            narrowed = (p if p is None or p.numel() == 1 else p[part] for p in parameters)
            yield tuple(tensor[part] for tensor in tensors), tuple(narrowed)
    else:
        yield tuple(tensors), tuple(parameters)


def to_grid(x: Tensor, scale: Tensor, zero_point: Tensor | None, low: float, high: float) -> Tensor:
    """What ``x`` is on the grid, in a new tensor: bit for bit what :mod:`fxquant.grid` quantizes and dequantizes."""
    result = torch.empty_like(x)
    for (part, out), (s, z) in pieces((x, result), (scale, zero_point)):
        clamp_levels_(torch.mul(part, 1.0 / s, out=out).round_(), z, low, high).mul_(s)
    return result


def where_inside(
    values: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor | None, low: float, high: float
) -> Tensor:
    """``values`` where ``low < x/s + z < high``, 0 elsewhere, in a new tensor."""
    result = torch.empty_like(values)
    for (out, value, part), (s, z) in pieces((result, values, x), (scale, zero_point)):
        put_inside_(out, value, part, s, z, low, high)
    return result


def put_inside_(
    out: Tensor, values: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor | None, low: float, high: float
) -> None:
    """Write over ``out``, a piece: ``values`` where ``low < x/s + z < high``, 0 elsewhere."""
    if is_at_hand(scale) and (zero_point is None or is_at_hand(zero_point)):
        zero = 0.0 if zero_point is None else float(zero_point)
        put_between_(out, values, x, (low - zero) * float(scale), (high - zero) * float(scale))
    else:
        u = x * (1.0 / scale)
        put_between_(out, values, u if zero_point is None else u.add_(zero_point), low, high)


def put_between_(out: Tensor, values: Tensor, x: Tensor, low: float, high: float) -> None:
    """Write over ``out``: ``values`` where ``low < x < high``, 0 elsewhere.

    By torch's one vectorised kernel that selects without a mask.
    """
    torch.ops.aten.hardtanh_backward.grad_input(values, x, *map(_within_float32, (low, high)), grad_input=out)


def _within_float32(end: float) -> float:
    """``end``, infinite where float32 has no such number: torch refuses to convert it."""
    return math.copysign(math.inf, end) if abs(end) > torch.finfo(torch.float32).max else end


def sums_like(parameter: Tensor) -> Tensor:
    """Zeros, to which :func:`pieces` may add what their elements come to; in float64 where it is one on a CPU."""
    return torch.zeros_like(parameter, dtype=torch.float64 if is_at_hand(parameter) else None)


def add_sum_(sums: Tensor, values: Tensor) -> None:
    """Add to each of ``sums`` the values that share it."""
    sums.add_(values.sum_to_size(sums.shape))


def add_product_(sums: Tensor, a: Tensor, b: Tensor) -> None:
    """Add to each of ``sums`` the products ``a·b`` that share it."""
    sums.add_(dot(a, b) if is_at_hand(sums) else (a * b).sum_to_size(sums.shape))


def dot(a: Tensor, b: Tensor) -> Tensor:
    """``sum(a·b)``, a float64 scalar, on a CPU: pieces in float32, without a product in memory, their sum in float64.

    So may be subtracted what nearly cancels: a piece is short enough for an error of a few parts in a million.
    """
    pairs = zip(a.reshape(-1).split(_PIECE), b.reshape(-1).split(_PIECE), strict=True)
    return torch.stack([torch.dot(*pair) for pair in pairs]).sum(dtype=torch.float64)


def scale_elementwise_(grad: Tensor, distance: Tensor, cell: Tensor, delta: float) -> None:
    """``g·(1 + δ·sign(g)·distance/cell)``, in place; ``distance`` is ``x - out`` and may be written over.

    EWGS (CVPR 2021, arXiv 2104.00903, equation 6).
    """
    if is_at_hand(cell):
        grad.addcmul_(grad.abs(), distance, value=delta / float(cell))
    else:
        grad.addcmul_(grad.abs(), distance.mul_(1.0 / cell), value=delta)


def straight_through_gradients(ctx, grad: Tensor, pull: Tensor | None = None):
    """Gradients of :class:`StraightThroughFunction` to ``x``, ``s`` and ``z``, from what forward keeps in ``ctx``.

    Args:
        pull: a scalar; to x is added ``pull·(nearest - x)/s²``, nearest being what x is on the grid.
    """
    x, scale, zero_point = ctx.saved_tensors
    quant_min, quant_max, delta, gradient_scale = ctx.options
    grad_x = ctx.output.take(x)  # over which the gradient is written
    to_scale = sums_like(scale) if ctx.needs_input_grad[1] else None
    to_zero = sums_like(zero_point) if ctx.needs_input_grad[2] else None
    parameters = scale, zero_point, to_scale, to_zero
    for (part, g, out), (s, z, sums, zero_sums) in pieces((x, grad, grad_x), parameters):
        distance = part - out if delta else None
        towards = None if pull is None else to_grid(part, s, z, quant_min, quant_max).sub_(part)
        # To s: of (out - x)/s inside and the level out/s outside, the sum of g·out first, as out is written over.
        whole = None if sums is None else dot(g, out) if is_at_hand(s) else g * out
        put_inside_(out, g, part, s, z, quant_min - HALF, quant_max + HALF)
        if whole is not None:
            add_sum_(sums, whole.sub_(dot(out, part)) if is_at_hand(s) else whole.addcmul_(out, part, value=-1))
        if zero_sums is not None:
            add_sum_(zero_sums, out - g)
        if delta:
            scale_elementwise_(out, distance, s, delta)
        if pull is not None:
            factor = pull / s.square()
            if is_at_hand(factor):
                out.add_(towards, alpha=float(factor))
            else:
                out.addcmul_(towards, factor)
    grad_scale = None if to_scale is None else (to_scale / scale * gradient_scale).to(scale.dtype)
    return grad_x, grad_scale, None if to_zero is None else (to_zero * scale).to(scale.dtype)


class StraightThroughFunction(torch.autograd.Function):
    """Quantize and dequantize with the straight-through family of gradients.

    With the rounding residual ``r = round(u) - u`` (in steps), incoming gradient ``g``:

    * to ``x``: ``g·(1 + delta·sign(g)·(-r))`` inside the range, 0 outside. ``delta = 0`` is the plain straight-through
      estimator, ``delta > 0`` the element-wise scaling of EWGS.
    * to ``s``: ``gradient_scale·sum(g·t)`` with ``t = r`` inside and the level outside (LSQ, equation 3).
    * to ``z``: ``-s·g`` summed over the elements outside.

    ``x`` and the result have one shape; ``scale`` and ``zero_point`` (``None`` for 0) broadcast against it.
    """

    @staticmethod
    def forward(ctx, x, scale, zero_point, quant_min, quant_max, delta=0.0, gradient_scale=1.0):
        def compute(x):
            return to_grid(x, scale, zero_point, quant_min, quant_max)

        out = compute(x)
        ctx.output = attach(out, compute)
        ctx.save_for_backward(x, scale, zero_point)
        ctx.options = quant_min, quant_max, delta, gradient_scale
        return out

    @staticmethod
    def backward(ctx, grad):
        return *straight_through_gradients(ctx, grad), None, None, None, None


class BinaryFunction(torch.autograd.Function):
    """The grid of two levels, ``-s`` and ``+s``: its range is their two cells, ``|x| <= 2s``.

    Gradients are those of :class:`StraightThroughFunction`, with the residual in steps of ``2s``, and to ``s`` the
    level everywhere. Where ``replaced`` (bool) is given and False, an element inside stays the number it is, clamped to
    the levels, with the plain gradient ``g`` and none to ``s`` (PEGE).
    """

    @staticmethod
    def forward(ctx, x, scale, delta=0.0, gradient_scale=1.0, replaced=None):
        out = torch.copysign(scale, torch.where(x == 0, 0.0, x))
        kept = None
        if replaced is not None:
            kept = (x.abs() <= 2 * scale) & ~replaced
            out = torch.where(kept, torch.clamp(x, -scale, scale), out)
        ctx.save_for_backward(x, out, scale, kept)
        ctx.options = delta, gradient_scale
        return out

    @staticmethod
    def backward(ctx, grad):
        x, out, scale, kept = ctx.saved_tensors
        delta, gradient_scale = ctx.options
        grad_x = where_inside(grad, x, scale, None, -2 - EDGE, 2 + EDGE)
        grad_scale = None
        if ctx.needs_input_grad[1]:
            product = grad * out
            grad_scale = (product if kept is None else product.masked_fill_(kept, 0.0)).sum_to_size(scale.shape)
            grad_scale = grad_scale / scale * gradient_scale
        if delta:
            distance = x - out if kept is None else (x - out).masked_fill_(kept, 0.0)
            scale_elementwise_(grad_x, distance, 2 * scale, delta)
        return grad_x, grad_scale, None, None, None
