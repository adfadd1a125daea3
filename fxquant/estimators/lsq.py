"""Baseline: learned step size quantization (Esser et al., ICLR 2020, arXiv 1902.08153).

The step's gradient is equation 3 of the paper with the scale ``1/sqrt(n * qmax)`` of its section 2.2. fxquant
learns the logarithm of the step, and an integer zero-point where the range is two-sided.
"""

from __future__ import annotations

from torch import Tensor

from .base import LearnedStep


class LSQ(LearnedStep):
    """Straight-through to the input, learned step."""

    name = "lsq"

    def train_forward(self, x: Tensor) -> Tensor:
        return self.straight_through(x, gradient_scale=self.step_gradient_scale(x))
