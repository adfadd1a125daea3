"""Baseline: element-wise gradient scaling (Lee, Kim & Ham, CVPR 2021, arXiv 2104.00903)."""

from __future__ import annotations

from torch import Tensor

from .base import Bits, LearnedStep, at_least_zero


class EWGS(LearnedStep):
    """Learned step; the input's gradient is ``g * (1 + delta * sign(g) * (x_n - x_q))`` (equation 6).

    Args:
        delta: scaling factor, >= 0; 0 is LSQ. The paper's usual value without its Hessian schedule is 1e-3 to
            0.2; 0.1 is the default here.
    """

    name = "ewgs"

    def __init__(self, bits: Bits = 8, *, delta: float = 0.1, **options):
        super().__init__(bits, **options)
        self.delta = at_least_zero(delta, "delta")

    @property
    def scales_gradients(self) -> bool:
        return self.delta > 0

    def train_forward(self, x: Tensor) -> Tensor:
        return self.straight_through(x, delta=self.delta, gradient_scale=self.step_gradient_scale(x))
