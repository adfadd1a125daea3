"""The estimators' mathematics once more, in float64, from the formulas alone: nothing of the library is used here.

Gradients are written out by hand, not by autograd. Scales, zero-points and ranges are scalars, or shaped to broadcast
against ``x``; gradients to them come back summed to that shape.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

LN2 = math.log(2)


def double(value: Tensor | float) -> Tensor:
    return torch.as_tensor(value).detach().to(torch.float64)


def levels(bits: int, scheme: str) -> tuple[int, int]:
    """Smallest and largest integer of the grid."""
    if scheme != "symmetric":
        return 0, 2**bits - 1
    return (-1, 1) if bits == 1 else (-(2 ** (bits - 1) - 1), 2 ** (bits - 1) - 1)


def is_binary(bits: int, scheme: str) -> bool:
    return scheme == "symmetric" and bits == 1


def step_of_range(low: Tensor, high: Tensor, bits: int, scheme: str) -> tuple[Tensor, Tensor]:
    """Step and zero-point of the grid on [low, high], from the table of grids."""
    if scheme == "symmetric":
        return high / max(2 ** (bits - 1) - 1, 1), torch.zeros_like(high)
    if scheme == "one_sided":
        return high / (2**bits - 1), torch.zeros_like(high)
    step = (high - low) / (2**bits - 1)
    return step, torch.round(-low / step).clamp(0, 2**bits - 1)


def quantize(x: Tensor, step: Tensor, zero: Tensor, bits: int, scheme: str) -> tuple[Tensor, Tensor]:
    """Codes, and the numbers they stand for."""
    if is_binary(bits, scheme):
        codes = torch.where(x >= 0, 1.0, -1.0).to(x.dtype)
    else:
        low, high = levels(bits, scheme)
        codes = (torch.round(x / step) + zero).clamp(low, high)
    return codes, (codes - zero) * step


def ends(step: Tensor, zero: Tensor, bits: int, scheme: str) -> tuple[Tensor, Tensor]:
    """The range [lo, hi] that the grid represents."""
    low, high = levels(bits, scheme)
    return (low - zero) * step, (high - zero) * step


def straight_through_gradients(
    x: Tensor, grad: Tensor, step: Tensor, zero: Tensor, bits: int, scheme: str, delta: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients to x, step and zero-point: STE and LSQ at ``delta = 0``, EWGS above.

    r = round(u) - u. To x: g·(1 + δ·sign(g)·(-r)) inside, 0 outside. To the step (LSQ, equation 3): r inside, the
    level of the bound outside. To the zero-point: -Δ·g outside. The binary grid's range is its two cells,
    |x| <= 2Δ, its residual is in steps of 2Δ, and its levels ±Δ are proportional to the step everywhere.
    """
    codes, _ = quantize(x, step, zero, bits, scheme)
    u = x / step
    if is_binary(bits, scheme):
        inside, residual, to_step = u.abs() <= 2, (codes - u) / 2, codes
    else:
        low, high = levels(bits, scheme)
        inside = (u >= low - zero) & (u <= high - zero)
        residual = torch.round(u) - u
        to_step = torch.where(inside, residual, codes - zero)
    to_x = torch.where(inside, grad * (1 + delta * torch.sign(grad) * -residual), 0.0)
    to_zero = torch.where(inside, 0.0, -step * grad)
    return to_x, (grad * to_step).sum_to_size(step.shape), to_zero.sum_to_size(zero.shape)


# ---- PEGE ------------------------------------------------------------------------------------------------


def pege_curriculum(step: float, kappa: float, steps: float) -> float:
    """p(t) = log(1 + κ·t/T) / log(1 + κ), 1 from T on."""
    return 1.0 if step >= steps else math.log(1 + kappa * step / steps) / math.log(1 + kappa)


def pege_forward(x: Tensor, mask: Tensor, step: Tensor, zero: Tensor, bits: int, scheme: str) -> Tensor:
    """M⊙Q(x) + (1 - M)⊙clamp(x)."""
    low, high = ends(step, zero, bits, scheme)
    return torch.where(mask, quantize(x, step, zero, bits, scheme)[1], torch.minimum(torch.maximum(x, low), high))


def pege_gradient(
    x: Tensor, grad: Tensor, mask: Tensor, step: Tensor, zero: Tensor, bits: int, scheme: str, delta: float
) -> Tensor:
    """To x: element-wise scaled where replaced, identity elsewhere, 0 outside the range."""
    replaced, _, _ = straight_through_gradients(x, grad, step, zero, bits, scheme, delta)
    low, high = ends(step, zero, bits, scheme)
    return torch.where(mask, replaced, torch.where((x >= low) & (x <= high), grad, 0.0))


def discretization_error(x: Tensor, step: Tensor, zero: Tensor, bits: int, scheme: str) -> tuple[Tensor, Tensor]:
    """mean(((x - Q(x))/Δ)²) and its gradient to x, Q(x) and Δ held; Δ is what lies between two levels."""
    apart = 2 * step if is_binary(bits, scheme) else step
    distance = (x - quantize(x, step, zero, bits, scheme)[1]) / apart
    return distance.square().mean(), 2 * distance / apart / x.numel()


# ---- NIPQ ------------------------------------------------------------------------------------------------


def nipq_steps(bits: int, scheme: str) -> int:
    """How many steps the truncation range α spans."""
    return max(2 ** (bits - 1) - 1, 1) if scheme == "symmetric" else 2**bits - 1


def nipq_forward(x: Tensor, noise: Tensor, alpha: Tensor, zero: Tensor, bits: int, scheme: str) -> Tensor:
    """x + n·Δ inside the truncation range, its bound outside."""
    inside, bound, step = _truncation(x, alpha, zero, bits, scheme)
    return torch.where(inside, x + noise * step, bound)


def nipq_gradients(
    x: Tensor, grad: Tensor, noise: Tensor, alpha: Tensor, zero: Tensor, bits: int, scheme: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients to x, α and b, with Δ = α / (2^(b-1) - 1) or α / (2^b - 1)."""
    inside, bound, _ = _truncation(x, alpha, zero, bits, scheme)
    steps = nipq_steps(bits, scheme)
    to_x = torch.where(inside, grad, 0.0)
    to_alpha = torch.where(inside, grad * noise / steps, grad * bound / alpha)
    power = 2 ** (bits - 1) if scheme == "symmetric" else 2**bits
    step_by_bits = -alpha * power * LN2 / steps**2
    to_bits = torch.where(inside, grad * noise * step_by_bits, 0.0)
    return to_x, to_alpha.sum_to_size(alpha.shape), to_bits.sum()


def _truncation(x: Tensor, alpha: Tensor, zero: Tensor, bits: int, scheme: str) -> tuple[Tensor, Tensor, Tensor]:
    step = alpha / nipq_steps(bits, scheme)
    if is_binary(bits, scheme):
        return x.abs() <= 2 * step, torch.sign(x) * step, step
    low, high = ends(step, zero, bits, scheme)
    return (x >= low) & (x <= high), torch.where(x > high, high, low), step


def nipq_width(raw: Tensor, lowest: int, highest: int) -> tuple[Tensor, Tensor]:
    """b = b_min + (b_max - b_min)·sigmoid(β) and db/dβ."""
    share = 1 / (1 + torch.exp(-raw))
    return lowest + (highest - lowest) * share, (highest - lowest) * share * (1 - share)


def softplus(raw: Tensor) -> tuple[Tensor, Tensor]:
    """α = log(1 + e^a) and dα/da."""
    return torch.log1p(torch.exp(raw)), 1 / (1 + torch.exp(-raw))


# ---- GDNSQ -----------------------------------------------------------------------------------------------


def gdnsq_weight_width(largest: Tensor, step: Tensor) -> Tensor:
    """b at which max|w| = Δ·(2^(b-1) - 1)."""
    return torch.log(largest / step + 1) / LN2 + 1


def gdnsq_activation_width(extent: Tensor, step: Tensor) -> Tensor:
    """b at which the range = Δ·(2^b - 1)."""
    return torch.log(extent / step + 1) / LN2


def gdnsq_hinge(widths: Tensor, target: float) -> Tensor:
    """mean(max(0, b - (target - 1e-3))) times the share of quantizers that violate it."""
    excess = torch.relu(widths - (target - 1e-3))
    return excess.mean() * (excess > 0).to(torch.float64).mean()


def jeffreys(logits: Tensor, teacher: Tensor) -> Tensor:
    """KL(p|q) + KL(q|p), mean over the batch."""
    p, q = torch.softmax(teacher, -1), torch.softmax(logits, -1)
    return ((p * (p / q).log()).sum(-1) + (q * (q / p).log()).sum(-1)).mean()


def soft_cross_entropy(logits: Tensor, teacher: Tensor) -> Tensor:
    """-sum(p·log q), mean over the batch."""
    p, q = torch.softmax(teacher, -1), torch.softmax(logits, -1)
    return -(p * q.log()).sum(-1).mean()


# ---- statistics ------------------------------------------------------------------------------------------


def distribution_distance(a: Tensor, b: Tensor) -> float:
    """The largest gap between two empirical distribution functions (Kolmogorov-Smirnov)."""
    a, b = a.flatten().sort().values, b.flatten().sort().values
    at = torch.cat([a, b])
    gap = torch.searchsorted(a, at, right=True) / a.numel() - torch.searchsorted(b, at, right=True) / b.numel()
    return float(gap.abs().max())


# ---- test tensors ----------------------------------------------------------------------------------------


def spread(shape: tuple[int, ...], step: Tensor, zero: Tensor, bits: int, scheme: str) -> Tensor:
    """A float32 tensor over all cells of the grid and beyond it, on which float32 and float64 cannot disagree.

    Nothing lies near a tie between two levels or near an end of the range, nor in the half cells just beyond the
    ends, where an element still rounds to a level but lies outside of [lo, hi] (a test of its own says what holds).
    """
    if is_binary(bits, scheme):
        u = torch.rand(shape, dtype=torch.float64) * 0.96 + torch.randint(0, 4, shape) + 0.02
        u = u * (torch.randint(0, 2, shape) * 2 - 1)
    else:
        low, high = (bound - zero for bound in levels(bits, scheme))
        beyond = 4
        cells = torch.rand(shape, dtype=torch.float64) * (high - low + 2 * beyond + 1)
        cell = torch.floor(cells) + low - beyond
        residual = (torch.rand(shape, dtype=torch.float64) * 0.43 + 0.02) * (torch.randint(0, 2, shape) * 2 - 1)
        residual = torch.where(cell == high, -residual.abs(), torch.where(cell == low, residual.abs(), residual))
        u = cell + residual
    return (u * step).to(torch.float32)
