"""Baseline: element-wise gradient scaling (Lee, Kim & Ham, CVPR 2021, arXiv 2104.00903)."""

from __future__ import annotations

from torch import Tensor

from .base import Bits, LearnedStep, at_least_zero


class EWGS(LearnedStep):
    """Learned step; the input's gradient is ``g * (1 + delta * sign(g) * (x_n - x_q))`` (equation 6).

    Args:
        delta: scaling factor, >= 0; 0 is LSQ. The distance ``x_n - x_q`` is in steps here; in the authors' code it is
            in shares of the range, so that their delta is this one times ``2^b - 1``. They take 1e-3 on CIFAR-10 where
            it is fixed (W1A1, where the two units agree).
    """

    name = "ewgs"

    def __init__(self, bits: Bits = 8, *, delta: float = 1e-3, **options):
        super().__init__(bits, **options)
        self.delta = at_least_zero(delta, "delta")

    @property
    def scales_gradients(self) -> bool:
        return self.delta > 0

    def train_forward(self, x: Tensor) -> Tensor:
        return self.straight_through(x, delta=self.delta, gradient_scale=self.step_gradient_scale(x))
