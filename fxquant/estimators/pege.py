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

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import grid
from ..errors import SpecError
from ..schedule import Schedule, logarithmic
from .base import Bits, Estimator, LearnedStep


class PEGE(LearnedStep):
    """Progressive replacement, element-wise gradient, discretization error.

    Args:
        kappa: how fast the curriculum starts, > 0.
        delta: strength of the element-wise gradient scaling, >= 0; 0 is the STE.
        weight: λ, weight of the discretization error in the objective, >= 0.
        curriculum: share of the training steps over which p goes from 0 to 1, in [0, 1].

    Without a :class:`fxquant.Controller` the curriculum counts as over (p = 1).
    """

    name = "pege"

    def __init__(
        self,
        bits: Bits = 8,
        *,
        kappa: float = 10.0,
        delta: float = 0.1,
        weight: float = 0.01,
        curriculum: float = 0.5,
        **options,
    ):
        for what, value in {"delta": delta, "weight": weight}.items():
            if not value >= 0:
                raise SpecError(f"{what}={value!r} was asked for; it must be at least 0")
        if not 0 <= curriculum <= 1:
            raise SpecError(f"curriculum={curriculum!r} was asked for; it is a share of the steps, 0 to 1")
        logarithmic(kappa, 1)  # checks kappa
        super().__init__(bits, **options)
        self.kappa, self.delta, self.weight, self.curriculum = kappa, delta, weight, curriculum
        self.replaced = 1.0  # p(t)
        self._error: Tensor | None = None

    def schedules(self, total_steps: int) -> dict[str, Schedule]:
        return {"replaced": logarithmic(self.kappa, self.curriculum * total_steps)}

    def train_forward(self, x: Tensor) -> Tensor:
        if self.weight:
            self._error = self.discretization_error(x)
        mask = torch.rand_like(x) < self.replaced if self.replaced < 1 else None
        return self.straight_through(x, delta=self.delta, gradient_scale=self.step_gradient_scale(x), replaced=mask)

    def discretization_error(self, x: Tensor) -> Tensor:
        """``mean(((x - Q(x))/Δ)²)``, a scalar; differentiable in x, with Δ held (a larger step is no cure)."""
        with torch.no_grad():
            step, zero = self._viewed(self.scale(), x), self._viewed(self.zero_point(), x)
            nearest = grid.dequantize(self._quantize(x, step, zero), step, zero)
        return ((x - nearest) / step).square().mean()

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
