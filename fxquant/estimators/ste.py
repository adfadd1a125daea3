"""Baseline: the straight-through estimator on a range fixed by calibration (Bengio et al., arXiv 1308.3432)."""

from __future__ import annotations

from torch import Tensor

from .base import Bits, LearnedStep


class STE(LearnedStep):
    """True rounding forward; gradient 1 inside the range, 0 outside; the range never moves."""

    name = "ste"
    learns_zero_point = False

    def __init__(self, bits: Bits = 8, **options):
        super().__init__(bits, **options)
        self.log2_scale.requires_grad_(False)
        if self.zero_fraction is not None:
            self.zero_fraction.requires_grad_(False)

    def train_forward(self, x: Tensor) -> Tensor:
        return self.straight_through(x)
