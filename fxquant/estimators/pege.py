"""PEGE: Progressive Element-wise Gradient Estimation (arXiv 2509.00097), in fxquant's reading.

Only the abstract could be read when this was written. It says that (1) full-precision values are progressively
replaced by their quantized counterparts, element by element, on a logarithmic curriculum, (2) training becomes a
co-optimization of the task loss and the discretization error, (3) the method plugs onto any forward quantizer.
fxquant reads this as:

* replacement: ``x̂ = M⊙Q(x) + (1 - M)⊙clamp(x)``, M ~ Bernoulli(p) per element; M = 1 in eval and conversion;
* curriculum: ``p(t) = log(1 + κ·t/T) / log(1 + κ)``, then 1;
* gradient: ``g·(1 + δ·sign(g)·(-r))`` on replaced elements, g on the others, 0 outside the range;
* objective: ``λ·mean(((x - Q(x))/Δ)²)`` over all quantized tensors, a named part of :class:`fxquant.QATLoss`.

Q is the shared grid with a learned step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import grid
from ..errors import SpecError
from ..schedule import Schedule, logarithmic
from .base import Bits, Estimator, LearnedStep, at_least_zero
from .functions import BinaryFunction, clamp_levels_, straight_through_gradients
from .passes import add_product_, each, sums_like
from .recompute import attach


class PEGE(LearnedStep):
    """Progressive replacement, element-wise gradient, discretization error.

    Args:
        kappa: how fast the curriculum starts, > 0.
        delta: strength of the element-wise gradient scaling, >= 0; 0 is the STE. With 0.1, inputs of 2 bits were drawn
            to zero (README).
        weight: λ, weight of the discretization error in the objective, >= 0.
        curriculum: share of the steps before fine-tuning over which p goes from 0 to 1, in [0, 1].

    Without a :class:`fxquant.Controller` the curriculum counts as over (p = 1).
    """

    name = "pege"
    regularizes_batches = True

    def __init__(
        self,
        bits: Bits = 8,
        *,
        kappa: float = 10.0,
        delta: float = 1e-3,
        weight: float = 0.01,
        curriculum: float = 0.5,
        **options,
    ):
        if not 0 <= curriculum <= 1:
            raise SpecError(f"curriculum={curriculum!r} was asked for; it is a share of the steps, 0 to 1")
        logarithmic(kappa, 1)  # checks kappa
        super().__init__(bits, **options)
        self.kappa, self.curriculum = kappa, curriculum
        self.delta, self.weight = at_least_zero(delta, "delta"), at_least_zero(weight, "weight")
        self.replaced = 1.0  # p(t)
        self._error: Tensor | None = None

    def schedules(self, total_steps: int) -> dict[str, Schedule]:
        return {"replaced": logarithmic(self.kappa, self.curriculum * total_steps)}

    @property
    def scales_gradients(self) -> bool:
        return self.delta > 0

    def train_forward(self, x: Tensor) -> Tensor:
        scale, step_gradient_scale = self._viewed(self.scale(), x), self.step_gradient_scale(x)
        if self.binary:
            self._error = self.discretization_error(x) if self.weight else None
            mask = torch.lt(*_draw_bytes(x, self.replaced)) if self.replaced < 1 else None
            return BinaryFunction.apply(x, scale, self.delta, step_gradient_scale, mask)
        bounds = self._shift(x), self.quant_min, self.quant_max
        out, self._error = ProgressiveFunction.apply(
            x, scale, *bounds, self.delta, step_gradient_scale, self.replaced, bool(self.weight)
        )
        return out

    def discretization_error(self, x: Tensor) -> Tensor:
        """``mean(((x - Q(x))/Δ)²)``, a scalar; differentiable in x, with Δ held (a larger step is no cure).

        Δ is the distance of neighbouring levels: the step, and ``2s`` on the binary grid.
        """
        with torch.no_grad():
            step, zero = self._viewed(self.scale(), x), self._viewed(self.zero_point(), x)
            nearest = grid.dequantize(self._quantize(x, step, zero), step, zero)
        return ((x - nearest) / (2 * step if self.binary else step)).square().mean()

    @classmethod
    def regularizer(cls, estimators: Sequence[Estimator], task_loss: Tensor) -> Tensor | None:
        terms = []
        for estimator in estimators:
            if estimator._error is not None:
                terms.append(estimator.weight * estimator._error)
                estimator._error = None
        return torch.stack(terms).mean() if terms else None

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_error": None}  # a live graph cannot be copied


class ProgressiveFunction(torch.autograd.Function):
    """Quantize a share of the elements, and tell how far all are from the grid: output and discretization error.

    Gradients are those of :class:`fxquant.estimators.functions.StraightThroughFunction` on what is replaced, and g on
    what is not: there the residual, taken from the output, is 0. An element less than half a step beyond the range is
    its end either way, and has the gradient of one that is replaced; on the binary grid, whose levels lie a step inside
    of its range, one between a level and the end that is not replaced has g. The error is ``mean((u - level)²)``, a
    scalar (None where it is not asked for); its gradient to x holds s.
    """

    @staticmethod
    def forward(ctx, x, scale, zero_point, quant_min, quant_max, delta, gradient_scale, replaced, with_error):
        drawn, threshold = _draw_bytes(x, replaced) if replaced < 1 else (None, None)

        def compute(x, error=None):
            result = torch.empty_like(x)
            tensors = (x, result) if drawn is None else (x, result, drawn)
            each(_progressive, tensors, (scale, zero_point, threshold, error), quant_min, quant_max)
            return result

        error = sums_like(x.new_zeros(())) if with_error else None
        out = compute(x, error)
        error = (error / x.numel()).to(x.dtype) if with_error else None
        ctx.output = attach(out, compute)
        ctx.save_for_backward(x, scale, zero_point)
        ctx.set_materialize_grads(False)
        ctx.on_grid = drawn is None
        ctx.options = quant_min, quant_max, delta, gradient_scale
        return out, error

    @staticmethod
    def backward(ctx, grad, grad_error):
        pull = None if grad_error is None else grad_error * (-2.0 / ctx.saved_tensors[0].numel())
        if grad is None:
            nothing = torch.zeros_like(ctx.saved_tensors[0])
            return straight_through_gradients(ctx, nothing, pull, ctx.on_grid)[0], *[None] * 8
        return *straight_through_gradients(ctx, grad, pull, ctx.on_grid), *[None] * 6


def _progressive(tensors, parameters, quant_min, quant_max) -> None:
    (x, out, *drawn), (s, z, threshold, error) = tensors, parameters
    u = x * (1.0 / s)
    levels = clamp_levels_(u.round(), z, quant_min, quant_max)
    if error is not None:
        difference = levels - u
        add_product_(error, difference, difference)
    if drawn:
        # In units of the step a number and its level are so near that their difference is exact.
        u = clamp_levels_(u, z, quant_min, quant_max)
        levels = u.addcmul_(levels.sub_(u), drawn[0].to(u.dtype).lt_(threshold))
    torch.mul(levels, s, out=out)


def _draw_bytes(like: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Random bytes, of the shape and order of ``like``, and a threshold that each is below with probability ``share``.

    A quarter of what a float of its own costs to draw; the threshold of all, a whole number of 256ths, is itself drawn
    such that the probability is exact.
    """
    words = torch.empty(-(-like.numel() // 8), dtype=torch.int64, device=like.device).random_(-(2**63), None)
    order = torch.empty_like(like, device="meta").stride()
    drawn = words.view(torch.uint8)[: like.numel()].as_strided(like.shape, order)
    return drawn, torch.tensor(float(math.floor(256 * share + float(torch.rand(())))))
