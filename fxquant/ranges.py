"""Where a quantizer's range starts: min-max, percentile and mean-squared-error search over what was observed."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import grid
from .distributed import gathered, position
from .errors import ConstantTensorError, EmptyDataError, NonFiniteError

METHODS = ("minmax", "percentile", "mse")

# Activations are subsampled to this many values per observed batch: enough for a 99.99 % percentile of the
# whole, little enough to keep calibration out of the profile.
_SAMPLE_PER_BATCH = 65_536
_LARGEST = torch.finfo(torch.float32).max / 4  # so that twice a range, and the distance of its ends, are numbers
_SHRINK = torch.linspace(1.0, 0.1, 46)
# Where the best of these is small, or the extreme an outlier, small ones five per cent apart are tried too.
_SMALL, _OUTLIER = 0.2, 8.0  # a factor; times the root of the mean square
_SHRINK_SMALL = torch.logspace(math.log10(0.22), -3, 108)


class RangeObserver:
    """Collects what a tensor looks like, over any number of batches, and answers with its range.

    One row per channel: shape [C, samples], C = 1 when the tensor is quantized as a whole.
    """

    def __init__(self) -> None:
        self.low: Tensor | None = None
        self.high: Tensor | None = None
        self._rows: list[Tensor] = []
        self._pooled = False

    def update(self, x: Tensor, axis: int | None, what: str) -> None:
        """Take in one batch of ``x``, split into channels along ``axis``.

        Raises:
            NonFiniteError: where ``x`` holds NaN, infinity or numbers near the end of float32; ``what`` is the tensor's
                name in the message.
        """
        if x.numel() == 0:
            raise EmptyDataError(f"{what}: an empty tensor of shape {tuple(x.shape)} cannot set a range")
        x = x.detach().to(torch.float32)
        rows = x.reshape(1, -1) if axis is None else x.transpose(0, axis).reshape(x.shape[axis], -1)
        low, high = rows.amin(1), rows.amax(1)
        if not (torch.isfinite(low).all() and torch.isfinite(high).all()):
            bad = int((~torch.isfinite(x)).sum())
            raise NonFiniteError(
                f"{what}: {bad} of {x.numel()} values are NaN or infinite; a range cannot be set from them. "
                "Look at the layers before it, at the input data and at the learning rate"
            )
        widest = max(-float(low.min()), float(high.max()))
        if widest > _LARGEST:
            raise NonFiniteError(
                f"{what}: values up to {widest:.3g} were seen; a range ends at {_LARGEST:.3g} at most, as float32 "
                "does. Look at the layers before it, at the input data and at the learning rate"
            )
        self.low = low if self.low is None else torch.minimum(self.low, low)
        self.high = high if self.high is None else torch.maximum(self.high, high)
        index, parts = position()
        values = rows.shape[1]
        if values * parts > _SAMPLE_PER_BATCH and axis is None:
            every = -(-values * parts // _SAMPLE_PER_BATCH)  # of the whole batch, wherever a part of it begins
            rows = rows[:, -index * values % every :: every]
        self._rows.append(rows.clone())
        self._pooled = False

    def pool(self) -> None:
        """Take in what the processes saw that have the other parts (:func:`fxquant.distributed.whole_batch`)."""
        if self._pooled or self.empty:
            return
        lows, highs = (torch.stack(gathered(end[None])).amin(0)[0] for end in (self.low, -self.high))
        self.low, self.high = lows, -highs
        self._rows = [rows.T for rows in gathered(torch.cat(self._rows, 1).T)]
        self._pooled = True

    @property
    def empty(self) -> bool:
        return self.low is None

    def is_constant(self) -> bool:
        """Whether every value seen, over all channels, was one and the same."""
        return bool(self.low.min() == self.high.max())

    def require_varying(self, what: str) -> None:
        """Raises :class:`ConstantTensorError` if all values seen are the same."""
        if self.is_constant():
            raise ConstantTensorError(
                f"{what}: all values seen are {self.low.min().item():g}, so there is no range to quantize. Calibrate "
                "with real data, or keep this layer in float with a rule such as Rule(name, None, None)"
            )

    def range(self, method: str, bits: int, scheme: str, percentile: float) -> tuple[Tensor, Tensor]:
        """Lower and upper end of the range, each [C], for a grid of ``bits`` and ``scheme``.

        * ``minmax``: the extremes.
        * ``percentile``: the smallest interval that leaves ``(100 - percentile)/2`` per cent of the values
          beyond either end (of |x| for a symmetric grid).
        * ``mse``: the extremes shrunk by the factor in [0.001, 1] that makes the quantized tensor nearest to the
          original in squared error. On the binary grid this is E|x|, in closed form.

        The interval is widened to contain 0; symmetric ranges have ``low = -high``.
        """
        rows = torch.cat(self._rows, 1)
        low, high = self.low.clamp(max=0), self.high.clamp(min=0)
        if scheme == "one_sided":
            low = torch.zeros_like(low)
        if scheme == "symmetric":
            high = torch.maximum(-low, high)
            low = -high
        if method == "mse" and grid.is_binary(bits, scheme):
            high = rows.abs().mean(1)
            return -high, high
        if method == "percentile":
            if scheme == "symmetric":
                high = torch.minimum(high, _quantile(rows.abs(), percentile / 100))
                return -high, high
            tail = (100 - percentile) / 200
            low = torch.maximum(low, _quantile(rows, tail).clamp(max=0))
            return low, torch.minimum(high, _quantile(rows, 1 - tail).clamp(min=0))
        if method == "mse":
            shrink = _best_shrink(rows, low, high, bits, scheme)
            return low * shrink, high * shrink
        return low, high


def step_and_zero(low: Tensor, high: Tensor, bits: int, scheme: str) -> tuple[Tensor, Tensor]:
    """Step and integer zero-point of the grid that covers [low, high] (the table in :mod:`fxquant.grid`)."""
    quant_min, quant_max = grid.bounds(bits, scheme)
    width = high / quant_max if scheme == "symmetric" else (high - low) / (quant_max - quant_min)
    step = width.clamp(min=torch.finfo(torch.float32).tiny)
    zero = torch.round(-low / step).clamp(quant_min, quant_max) if scheme == "affine" else torch.zeros_like(step)
    return step, zero


def _quantile(rows: Tensor, fraction: float) -> Tensor:
    # kthvalue, because torch.quantile refuses more than 16 million values.
    count = rows.shape[1]
    return rows.kthvalue(min(max(round(fraction * (count - 1)) + 1, 1), count), dim=1).values


_BLOCK = 2**17  # elements


def _best_shrink(rows: Tensor, low: Tensor, high: Tensor, bits: int, scheme: str) -> Tensor:
    """The factor of each channel's range, [C], that makes ``rows`` [C, N] on the grid nearest to themselves."""
    if len(rows) > 1 and rows.numel() > _BLOCK:
        channels = max(_BLOCK // rows.shape[1], 1)  # so that what all candidates read stays in the cache
        parts = zip(rows.split(channels), low.split(channels), high.split(channels), strict=True)
        return torch.cat([_best_shrink(*part, bits, scheme) for part in parts])
    best, error = _best_of(_SHRINK, rows, low, high, bits, scheme)
    usual = rows.square().mean(1).sqrt()
    small = (best <= _SMALL) | (torch.maximum(-low, high) > _OUTLIER * usual)
    if small.any():
        tried, other = _best_of(_SHRINK_SMALL, rows[small], low[small], high[small], bits, scheme)
        best[small] = torch.where(other < error[small], tried, best[small])
    return best


def _best_of(
    candidates: Tensor, rows: Tensor, low: Tensor, high: Tensor, bits: int, scheme: str
) -> tuple[Tensor, Tensor]:
    """The best of the factors, [C], and its mean squared error, [C]."""
    quant_min, quant_max = grid.bounds(bits, scheme)
    best_error = torch.full_like(high, torch.inf)
    best = torch.ones_like(high)
    for shrink in candidates.tolist():
        step, zero = (v[:, None] for v in step_and_zero(low * shrink, high * shrink, bits, scheme))
        q = grid.quantize(rows, step, zero, quant_min, quant_max)
        error = (grid.dequantize(q, step, zero) - rows).square_().mean(1)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best = torch.where(better, shrink, best)
    return best, best_error
