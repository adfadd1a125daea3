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
        or not MIN_BITS <= bits <= MAX_BITS
        or not float(bits).is_integer()
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
