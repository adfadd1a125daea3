"""The integer grid: which integers a width has, and the arithmetic between them and real numbers.

Pure tensor functions; nothing here knows of torch.ao, of modules or of training. This table is the contract
that training, the reference graph and every lowering share (b is the width in bits):

==================  ===================  ==================================  =========================
scheme              integers             step from the range [lo, hi]        zero-point
==================  ===================  ==================================  =========================
symmetric, b >= 2   -(2^(b-1)-1) .. +    hi / (2^(b-1) - 1),  lo = -hi        0
symmetric, b = 1    -1, +1 (no zero)     hi                                  0
one_sided           0 .. 2^b - 1         hi / (2^b - 1),      lo = 0          0
affine              0 .. 2^b - 1         (hi - lo) / (2^b - 1)               round(-lo / step), integer
==================  ===================  ==================================  =========================

A real number x becomes the integer ``q = clamp(round(x * (1/s)) + z, qmin, qmax)`` (round half to even, in
float32, multiplying by the reciprocal as integer kernels do) and reads back as ``(q - z) * s``.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .errors import SpecError

MIN_BITS, MAX_BITS = 1, 8
SCHEMES = ("symmetric", "one_sided", "affine")


def check_bits(bits: int, what: str = "bits") -> int:
    """``bits`` as an int if it is a whole width from 1 to 8.

    Raises:
        SpecError: otherwise.
    """
    if (
        not isinstance(bits, (int, float))
        or isinstance(bits, bool)
        or not float(bits).is_integer()
        or not MIN_BITS <= bits <= MAX_BITS
    ):
        raise SpecError(
            f"{what}={bits!r} was asked for; widths are whole numbers of bits from {MIN_BITS} to {MAX_BITS}"
        )
    return int(bits)


def bounds(bits: int, scheme: str) -> tuple[int, int]:
    """Smallest and largest integer of a width.

    >>> bounds(4, "symmetric"), bounds(1, "symmetric"), bounds(4, "affine")
    ((-7, 7), (-1, 1), (0, 15))
    """
    if scheme == "symmetric":
        top = max(2 ** (bits - 1) - 1, 1)
        return -top, top
    return 0, 2**bits - 1


def is_binary(bits: int, scheme: str) -> bool:
    """Whether the grid is the two-level one without a zero, {-s, +s}."""
    return scheme == "symmetric" and bits == 1


def quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int, binary: bool = False
) -> Tensor:
    """Real numbers to the integers of a grid, carried in ``x``'s floating dtype.

    ``scale`` and ``zero_point`` broadcast against ``x`` (see :func:`channel_view`). A binary grid has no zero:
    x >= 0 becomes +1, anything else -1.
    """
    if binary:
        return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)
    return (torch.round(x * (1.0 / scale)) + zero_point).clamp(quant_min, quant_max)


def dequantize(q: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Integers of a grid (in any dtype) to the float32 numbers they stand for, ``(q - z) * s``."""
    return (q.to(scale.dtype) - zero_point) * scale


def channel_view(parameter: Tensor, ndim: int, axis: int | None) -> Tensor:
    """A per-channel vector [C] shaped to broadcast against an ``ndim``-dimensional tensor along ``axis``.

    A single value (or ``axis=None``) is returned as a scalar, which broadcasts against anything.
    """
    if parameter.numel() == 1:
        return parameter.reshape(())
    if axis is None:
        raise SpecError(f"{parameter.numel()} scales were given for a tensor that is quantized as a whole")
    shape = [1] * ndim
    shape[axis] = -1
    return parameter.reshape(shape)


class FakeQuantizeFunction(torch.autograd.Function):
    """Quantize and dequantize with the straight-through family of gradients, in one autograd node.

    With ``u = x/s``, the rounding residual ``r = round(u) - u`` (in steps), incoming gradient ``g``:

    * to ``x``: ``g * (1 + delta * sign(g) * (-r))`` inside the range, 0 outside. ``delta = 0`` is the plain
      straight-through estimator, ``delta > 0`` the element-wise scaling of EWGS (CVPR 2021, arXiv 2104.00903,
      equation 6).
    * to ``s``: ``gradient_scale * sum(g * t)`` with ``t = r`` inside and ``q - z`` outside (LSQ, arXiv 1902.08153,
      equation 3; "inside" is whatever rounds to a code, half a step beyond the ends included). With
      ``noise_gradient`` the residual inside is replaced by a random sign times ``1/sqrt(12)``, the standard
      deviation of uniform rounding noise (GDNSQ, arXiv 2508.14004).
    * to ``z``: ``-s * g`` summed over the elements outside (inside, z cancels).

    Where ``replaced`` is given and False, an element stays the real number it is, clamped to the range: its gradient
    is ``g`` inside and that of any clipped element outside (PEGE, arXiv 2509.00097).

    On the binary grid ``q`` does not depend on ``s``, so t = q everywhere; the range of its two cells is
    ``|x| <= 2s`` and its residual is taken in steps of ``2s``.
    """

    @staticmethod
    def forward(
        ctx, x, scale, zero_point, quant_min, quant_max, binary, delta, noise_gradient, gradient_scale, replaced=None
    ):
        if binary:
            q = torch.where(x >= 0, 1.0, -1.0).to(x.dtype)
            inside = x.abs() <= 2 * scale
            levels, residual = q, 0.5 * (q - x / scale)
        else:
            u = x * (1.0 / scale)
            unclamped = torch.round(u) + zero_point
            q = unclamped.clamp(quant_min, quant_max)
            inside = q == unclamped
            levels = q - zero_point
            residual = torch.where(inside, levels - u, levels)
        out = levels * scale
        step_term = levels if binary else None
        if replaced is not None:
            kept = inside & ~replaced
            lowest, highest = (quant_min - zero_point) * scale, (quant_max - zero_point) * scale
            out = torch.where(kept, x.clamp(lowest, highest), out)
            residual = residual.masked_fill(kept, 0.0)
            step_term = levels.masked_fill(kept, 0.0) if binary else None
        ctx.save_for_backward(residual, inside, scale, step_term)
        ctx.zero_point_shape = zero_point.shape
        ctx.options = binary, delta, noise_gradient, gradient_scale
        return out

    @staticmethod
    def backward(ctx, grad):
        residual, inside, scale, binary_term = ctx.saved_tensors
        binary, delta, noise_gradient, gradient_scale = ctx.options
        grad_x = grad_scale = grad_zero = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.where(inside, grad - delta * grad.abs() * residual if delta else grad, 0.0)
        if ctx.needs_input_grad[1]:
            step_term = binary_term if binary else residual
            if noise_gradient and not binary:
                sign = torch.randint(0, 2, residual.shape, device=residual.device, dtype=torch.int8)
                noise = (sign.to(residual.dtype) * 2 - 1) * (12**-0.5)
                step_term = torch.where(inside, noise, residual)
            grad_scale = (grad * step_term).sum_to_size(scale.shape) * gradient_scale
        if ctx.needs_input_grad[2]:
            grad_zero = torch.where(inside, 0.0, -grad * scale).sum_to_size(ctx.zero_point_shape)
        return grad_x, grad_scale, grad_zero, *[None] * 7


class _RoundStraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return torch.round(x)

    @staticmethod
    def backward(ctx, grad):
        return grad


def round_straight_through(x: Tensor) -> Tensor:
    """``round(x)`` whose gradient is that of ``x``."""
    return _RoundStraightThrough.apply(x)


def symmetric_bits(codes: Tensor) -> int:
    """The smallest width whose symmetric grid holds all of ``codes`` (int8): 1 for -1 and +1 alone.

    >>> symmetric_bits(torch.tensor([-1, 1])), symmetric_bits(torch.tensor([0, 7])), symmetric_bits(torch.tensor([-8]))
    (1, 4, 5)
    """
    magnitude = codes.to(torch.int32).abs()
    if not codes.numel() or bool((magnitude == 1).all()):
        return 1
    return int(magnitude.max()).bit_length() + 1 if bool(magnitude.any()) else 2


def pack(codes: Tensor, bits: int) -> Tensor:
    """Signed codes of a symmetric grid, of any shape, to a stream of ``bits`` bits each: uint8 [ceil(n * bits / 8)].

    A code is stored as its distance from the grid's lowest integer (1 bit: as 0 for -1 and 1 for +1), lowest bit first;
    the bits after the last code are 0.

    Raises:
        SpecError: codes that are not on the grid.
    """
    low, high = bounds(check_bits(bits), "symmetric")
    flat = codes.detach().cpu().to(torch.int32).flatten().numpy()
    on_grid = np.isin(flat, (low, high)) if bits == 1 else (flat >= low) & (flat <= high)
    if not on_grid.all():
        raise SpecError(f"codes from {flat.min()} to {flat.max()} do not fit {bits} bits, which hold {low} to {high}")
    stored = ((flat - low) // (2 if bits == 1 else 1)).astype(np.uint8)
    stream = np.unpackbits(stored[:, None], axis=1, count=bits, bitorder="little")
    return torch.from_numpy(np.packbits(stream, bitorder="little"))


def unpack(stream: Tensor, bits: int, shape: tuple[int, ...]) -> Tensor:
    """What :func:`pack` packed: int8 codes of ``shape``.

    Raises:
        SpecError: a stream of another length, or one that holds what is not on the grid.
    """
    low, high = bounds(check_bits(bits), "symmetric")
    count = int(np.prod(shape, dtype=np.int64))
    if stream.dtype != torch.uint8 or stream.shape != (-(-count * bits // 8),):
        raise SpecError(f"{tuple(stream.shape)} bytes of {stream.dtype} are no {count} codes of {bits} bits")
    found = np.unpackbits(stream.cpu().numpy(), count=count * bits, bitorder="little").reshape(count, bits)
    stored = np.packbits(found, axis=1, bitorder="little")[:, 0] if count else np.zeros(0, np.uint8)
    codes = stored.astype(np.int16) * (2 if bits == 1 else 1) + low
    if count and codes.max() > high:
        raise SpecError(f"code {codes.max()} is not on the grid of {bits} bits, which ends at {high}")
    return torch.from_numpy(codes.astype(np.int8)).reshape(shape)
