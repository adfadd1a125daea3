"""The autograd functions that estimators share, and what they are built from.

A training step is bound by memory, so these keep to few passes over it (:mod:`fxquant.estimators.passes`). Of tensors,
``x`` alone is saved, which the layer before keeps anyway; a backward computes the output anew
(:mod:`fxquant.estimators.recompute`).

Throughout, ``s`` is the step, ``u = x/s``, and a level is a code less the zero-point.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .passes import add_sum_, dot, each, is_at_hand, sums_like
from .recompute import attach

HALF = 0.5
"""What rounds to a code is inside of a range: half a step beyond the ends is, too (LSQ, arXiv 1902.08153)."""

EDGE = 1e-4
"""In steps; by so much an end may be passed in float32 by what lies on it."""


def clamp_levels_(levels: Tensor, zero_point: Tensor | None, low: float, high: float) -> Tensor:
    """``clamp(levels + z, low, high) - z``, in place; ``None`` is a zero-point of 0."""
    if zero_point is None:
        return levels.clamp_(low, high)
    if is_at_hand(zero_point):
        zero = float(zero_point)
        return levels.clamp_(low - zero, high - zero)
    return levels.clamp_(low - zero_point, high - zero_point)


def to_grid(x: Tensor, scale: Tensor, zero_point: Tensor | None, low: float, high: float) -> Tensor:
    """What ``x`` is on the grid, in a new tensor: bit for bit what :mod:`fxquant.grid` quantizes and dequantizes."""
    result = torch.empty_like(x)
    each(_to_grid, (x, result), (scale, zero_point), low, high)
    return result


def _to_grid(tensors, parameters, low, high) -> None:
    (x, out), (s, z) = tensors, parameters
    clamp_levels_(torch.mul(x, 1.0 / s, out=out).round_(), z, low, high).mul_(s)


def where_inside(
    values: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor | None, low: float, high: float
) -> Tensor:
    """``values`` where ``low < x/s + z < high``, 0 elsewhere, in a new tensor."""
    result = torch.empty_like(values)
    each(_where_inside, (x, values, result), (scale, zero_point), low, high)
    return result


def _where_inside(tensors, parameters, low, high) -> None:
    x, values, out = tensors
    put_inside_(out, values, x, *parameters, low, high)


def put_inside_(
    out: Tensor, values: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor | None, low: float, high: float
) -> None:
    """Write over ``out``, a piece: ``values`` where ``low < x/s + z < high``, 0 elsewhere."""
    u = x * (1.0 / scale)
    put_between_(out, values, u if zero_point is None else u.add_(zero_point), low, high)


def put_between_(out: Tensor, values: Tensor, x: Tensor, low: float, high: float) -> None:
    """Write over ``out``: ``values`` where ``low < x < high``, 0 elsewhere.

    By torch's one vectorised kernel that selects without a mask.
    """
    torch.ops.aten.hardtanh_backward.grad_input(values, x, low, high, grad_input=out)


def scale_elementwise_(grad: Tensor, distance: Tensor, cell: Tensor, delta: float) -> None:
    """``g·(1 + δ·sign(g)·distance/cell)``, in place; ``distance`` is ``x - out``.

    EWGS (CVPR 2021, arXiv 2104.00903, equation 6).
    """
    if is_at_hand(cell):
        grad.addcmul_(grad.abs(), distance, value=delta / float(cell))
    else:
        grad.addcmul_(grad.abs(), distance * (1.0 / cell), value=delta)


def straight_through_gradients(ctx, grad: Tensor, pull: Tensor | None = None, on_grid: bool = True):
    """Gradients of :class:`StraightThroughFunction` to ``x``, ``s`` and ``z``, from what forward keeps in ``ctx``.

    Args:
        pull: a scalar; to x is added ``pull·(nearest - x)/s²``, nearest being what x is on the grid.
        on_grid: whether the output is that.
    """
    x, scale, zero_point = ctx.saved_tensors
    quant_min, quant_max, delta, gradient_scale = ctx.options
    grad_x = ctx.output.take(x)  # over which the gradient is written
    to_scale = sums_like(scale) if ctx.needs_input_grad[1] else None
    to_zero = sums_like(zero_point) if ctx.needs_input_grad[2] else None
    parameters = scale, zero_point, to_scale, to_zero, pull
    each(_straight_through, (x, grad, grad_x), parameters, quant_min, quant_max, delta, on_grid)
    grad_scale = None if to_scale is None else (to_scale / scale * gradient_scale).to(scale.dtype)
    return grad_x, grad_scale, None if to_zero is None else (to_zero * scale).to(scale.dtype)


def _straight_through(tensors, parameters, quant_min, quant_max, delta, on_grid) -> None:
    (x, grad, out), (s, z, to_scale, to_zero, pull) = tensors, parameters
    distance = x - out if delta or (pull is not None and on_grid) else None
    from_nearest = None if pull is None else distance if on_grid else x - _nearest(x, s, z, quant_min, quant_max)
    # To s: of (out - x)/s inside and the level out/s outside, the sum of g·out first, as out is written over.
    whole = None if to_scale is None else dot(grad, out) if is_at_hand(s) else grad * out
    put_inside_(out, grad, x, s, z, quant_min - HALF, quant_max + HALF)
    if whole is not None:
        add_sum_(to_scale, whole.sub_(dot(out, x)) if is_at_hand(s) else whole.addcmul_(out, x, value=-1))
    if to_zero is not None:
        add_sum_(to_zero, out - grad)
    if delta:
        scale_elementwise_(out, distance, s, delta)
    if pull is None:
        return
    factor = pull / s.square()
    if is_at_hand(s):
        out.add_(from_nearest, alpha=-float(factor))
    else:
        out.addcmul_(from_nearest, factor, value=-1)


def _nearest(x: Tensor, scale: Tensor, zero_point: Tensor | None, low: float, high: float) -> Tensor:
    out = torch.empty_like(x)
    _to_grid((x, out), (scale, zero_point), low, high)
    return out


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


class ClampFunction(torch.autograd.Function):
    """Clamp a parameter to [low, high]; beyond an end only the gradients pass that descent follows back inside."""

    @staticmethod
    def forward(ctx, x, low, high):
        ctx.save_for_backward(x)
        ctx.ends = low, high
        return x.clamp(low, high)

    @staticmethod
    def backward(ctx, grad):
        (x,), (low, high) = ctx.saved_tensors, ctx.ends
        outward = ((x < low) & (grad > 0)) | ((x > high) & (grad < 0))
        return grad.masked_fill(outward, 0.0), None, None


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
