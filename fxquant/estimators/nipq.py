"""NIPQ: Noise proxy-based Integrated Pseudo-Quantization (Shin et al., CVPR 2023, arXiv 2206.00820).

Training replaces rounding by noise with the distribution of the true rounding error, so that the gradient of what
is computed is exact; truncation range and width are learned with it. As in the authors' code, the range is
``α = softplus(a)`` and a learned width is ``b = b_min + (b_max - b_min)·sigmoid(β)``, jittered by U(-½, ½) and
rounded with a straight-through gradient at every step. Where fxquant departs:

* noise is the tensor's own residuals, rolled by a random number of places: each element gets that of another, any with
  the same probability. That is the exact empirical distribution, which the authors' 256-bin histogram approximates;
  what lies side by side stays so. ``sampler="bootstrap"`` draws for each element by itself, with replacement, at
  fifty times the cost; ``sampler="histogram"`` does as the authors do;
* the grid is the shared one, with an integer zero-point, and a width of 1 is the binary grid;
* widths stay within 1-8, since nothing else converts; learned ones start at ``initial_width`` of their interval, not in
  its middle, and ranges, a weight's too, by ``init``, not at ``max|w|``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import grid
from ..errors import SpecError
from .base import Bits, Estimator
from .functions import EDGE, clamp_levels_, put_inside_, to_grid, where_inside
from .passes import add_product_, add_sum_, each, sums_like
from .recompute import attach

SAMPLERS = ("roll", "bootstrap", "histogram")
NO_NOISE = "none"


class NIPQ(Estimator):
    """Noise instead of rounding while training; true rounding in eval and once the width is fixed.

    Args:
        bits: whole width, or (lowest, highest) to learn it.
        sampler: ``roll`` gives each element the residual of another, at a random distance that all have in common;
            ``bootstrap`` draws them one by one, ``histogram`` from 256 bins of them. What is clipped on the binary grid
            leaves gaps, so that ``roll`` draws one by one there. ``none`` rounds truly from the start, for comparison.
        initial_width: where a learned width starts, as a share of the interval, in (0, 1).
    """

    name = "nipq"
    can_learn_width = True

    def __init__(
        self,
        bits: Bits = 8,
        *,
        sampler: str = "roll",
        initial_width: float = 0.9,
        **options,
    ):
        if sampler not in (*SAMPLERS, NO_NOISE):
            raise SpecError(f"sampler={sampler!r} was asked for; known: {', '.join((*SAMPLERS, NO_NOISE))}")
        if not 0 < initial_width < 1:
            raise SpecError(f"initial_width={initial_width!r} was asked for; it lies between 0 and 1")
        super().__init__(bits, **options)
        self.sampler = sampler
        # Set by fix_width: from then on true rounding, with a straight-through gradient.
        self.register_buffer("noise_off", torch.zeros(1, dtype=torch.uint8, device=self._device))
        self.raw_range = nn.Parameter(torch.zeros(self.channels, device=self._device))
        if isinstance(self.bits, tuple):
            start = math.log(initial_width / (1 - initial_width))
            self.raw_width = nn.Parameter(torch.full((1,), start, device=self._device))
        else:
            self.raw_width = None
        self._read_flags()

    def alpha(self) -> Tensor:
        """Width of the truncation range, [channels]: ``softplus(raw_range)``."""
        return F.softplus(self.raw_range)

    def bit_width(self) -> Tensor:
        if not self.learns_width:
            return self.width
        low, high = self.bits
        return low + (high - low) * torch.sigmoid(self.raw_width)

    @property
    def whole_bits(self) -> int:
        if not self.learns_width:
            return self._bits
        return int(torch.round(self.bit_width().detach()))

    def scale(self) -> Tensor:
        return self._scale_at(self.whole_bits)

    def _scale_at(self, bits: Tensor | int) -> Tensor:
        return self.alpha() / self._steps_at(bits)

    def _steps_at(self, bits: Tensor | int) -> Tensor | float:
        """Steps that alpha spans at a (differentiable) width."""
        if self.grid_scheme != "symmetric":
            return 2**bits - 1
        if isinstance(bits, int):
            return float(max(2 ** (bits - 1) - 1, 1))
        return (2 ** (bits - 1) - 1).clamp(min=1)

    def set_range(self, low: Tensor, high: Tensor) -> None:
        alpha = self._safe_width(low, high)
        # The inverse of softplus; for large values it is the identity to float precision.
        self.raw_range.copy_(torch.where(alpha > 20, alpha, torch.log(torch.expm1(alpha.clamp(max=20)))))
        self._set_zero_fraction(low, high)

    @property
    def noise(self) -> bool:
        """Whether training still replaces rounding by noise."""
        return not self._noise_off and self.sampler != NO_NOISE

    @property
    def settled(self) -> bool:
        return super().settled and not self.noise

    def fix_width(self, bits: int) -> None:
        self.noise_off.fill_(1)
        super().fix_width(bits)

    def train_forward(self, x: Tensor) -> Tensor:
        bits = self._jittered_width() if self.learns_width else self._bits
        whole = int(bits)
        quant_min, quant_max = grid.bounds(whole, self.grid_scheme)
        return NoiseProxyFunction.apply(
            x,
            self._viewed(self._scale_at(bits), x),
            self._viewed(self.alpha(), x),
            self._shift(x, quant_max - quant_min),
            quant_min,
            quant_max,
            grid.is_binary(whole, self.grid_scheme),
            self.sampler if self.noise else None,
        )

    def _jittered_width(self) -> Tensor:
        width = self.bit_width()
        jitter = torch.rand_like(width) - 0.5
        low, high = self.bits
        return grid.round_straight_through(width + jitter).clamp(low, high)

    def _read_flags(self) -> None:
        super()._read_flags()
        self._noise_off = bool(getattr(self, "noise_off", False))


class NoiseProxyFunction(torch.autograd.Function):
    """``x + n·s`` inside the truncation range, its bound outside; n from the empirical residuals of x.

    Gradients: to x, 1 inside and 0 outside; to s, ``n`` inside; to alpha, the bound's share of alpha (±1 where
    the range is one-sided or symmetric) outside; to z, ``-s`` outside. None flows into n. With ``sampler=None``
    the residual itself takes the place of n: true rounding with the same gradients.

    The range of the binary grid are its two cells, ``|x| <= 2s``; n is in units of s, half the distance of its levels.
    """

    @staticmethod
    def forward(ctx, x, scale, alpha, zero_point, quant_min, quant_max, binary, sampler):
        low, high = (-2, 2) if binary else (quant_min, quant_max)
        draw = None if sampler is None else _Noise(sampler)

        def compute(x):
            if draw is None:
                return _signs(x).mul_(scale) if binary else to_grid(x, scale, zero_point, quant_min, quant_max)
            if binary:
                signs, u = _signs(x), x * (1.0 / scale)
                pool = (signs - u)[u.abs() <= 2]  # what is clipped lends no noise
                noise = draw(pool, u) if pool.numel() else torch.zeros_like(x)
                levels = torch.where(u.abs() <= 2, u, signs)
                return levels.add_(where_inside(noise, x, scale, None, low - EDGE, high + EDGE)).mul_(scale)
            # Above one bit the residual of its own, unclamped rounding stands in for what is clipped.
            result = torch.empty_like(x)
            each(_residual, (x, result), (scale,))
            noise = draw(result, result)
            each(_add_noise, (x, noise, result), (scale, zero_point), quant_min, quant_max, low - EDGE, high + EDGE)
            return result

        out = compute(x)
        ctx.output = attach(out, compute)
        ctx.save_for_backward(x, scale, zero_point)
        ctx.ends = low - EDGE, high + EDGE
        ctx.alpha_shape, ctx.steps = alpha.shape, quant_max if quant_min < 0 else quant_max - quant_min
        return out

    @staticmethod
    def backward(ctx, grad):
        x, scale, zero_point = ctx.saved_tensors
        grad_x = ctx.output.take(x)  # over which the gradient is written
        inside, outside = (sums_like(scale) for _ in range(2))
        zero_sums = None if zero_point is None else sums_like(zero_point)
        each(_shares, (x, grad, grad_x), (scale, zero_point, inside, outside, zero_sums), *ctx.ends)
        grad_alpha = (outside / (scale * ctx.steps)).sum_to_size(ctx.alpha_shape)
        grads = inside / scale, grad_alpha, None if zero_sums is None else zero_sums * scale
        return grad_x, *(None if g is None else g.to(x.dtype) for g in grads), None, None, None, None


def _residual(tensors, parameters) -> None:
    (x, out), (s,) = tensors, parameters
    u = x * (1.0 / s)
    torch.round(u, out=out).sub_(u)


def _add_noise(tensors, parameters, quant_min, quant_max, low, high) -> None:
    (x, noise, out), (s, z) = tensors, parameters
    put_inside_(out, noise, x, s, z, low, high)
    out.add_(clamp_levels_(x * (1.0 / s), z, quant_min, quant_max)).mul_(s)


def _shares(tensors, parameters, low, high) -> None:
    """The gradient to x over the output; ``sum(g·(out - x))`` of what is inside, ``sum(g·out)`` of what is outside."""
    (x, grad, out), (s, z, inside, outside, to_zero) = tensors, parameters
    difference, level = out - x, out.clone()
    put_inside_(out, grad, x, s, z, low, high)
    add_product_(inside, difference, out)
    cut = torch.sub(grad, out, out=difference)
    add_product_(outside, cut, level)
    if z is not None:
        add_sum_(to_zero, cut.neg_())


def _signs(x: Tensor) -> Tensor:
    """The levels of the binary grid: +1 where x >= 0, else -1."""
    return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)


class _Noise:
    """Noise drawn from the distribution of the values of a tensor: the same at every call with the same values.

    Tensors are taken in the order in memory that the first one has, whatever order later ones have.
    """

    def __init__(self, sampler: str):
        self._sampler = sampler
        self._drawn: int | Tensor | None = None  # by how much residuals are rolled, or their noise
        self._order: tuple[int, ...] = ()  # strides

    def __call__(self, residual: Tensor, like: Tensor) -> Tensor:
        """Noise of the shape of ``like``; both are tensors without gaps, ``residual`` of that shape or flat."""
        first = self._drawn is None
        self._order = like.stride() if first else self._order
        if residual.ndim == like.ndim and residual.stride() != self._order:
            residual = like.new_empty_strided(like.shape, self._order).copy_(residual)
        flat = residual.as_strided((residual.numel(),), (1,))
        rolls = self._sampler == "roll" and flat.numel() == like.numel()
        if first:
            self._drawn = int(torch.randint(flat.numel(), ())) if rolls else _draw(flat, self._sampler, like.numel())
        noise = flat.roll(self._drawn) if rolls else self._drawn
        return noise.as_strided(like.shape, self._order)


def _draw(flat: Tensor, sampler: str, count: int) -> Tensor:
    """So many numbers, each of the distribution of the values of ``flat``."""
    if sampler != "histogram":
        return flat[torch.randint(flat.numel(), (count,), device=flat.device)]
    half = max(float(flat.abs().max()), 1e-12)
    bins = 256
    index = ((flat + half) * (bins / (2 * half))).long().clamp_(0, bins - 1)
    counts = torch.bincount(index, minlength=bins).to(torch.float32)
    drawn = torch.multinomial(counts, count, replacement=True)
    return (drawn + torch.rand(count, device=flat.device)) * (2 * half / bins) - half
