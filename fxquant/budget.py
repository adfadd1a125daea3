"""What whole widths spend of a budget: each bound is a sum over layers, agreeing with :mod:`fxquant.cost`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from . import cost
from .errors import SpecError
from .prepare import prepared_info
from .spec import Budget

Widths = Mapping[str, tuple[int, int]]
"""(weight bits, activation bits) of each quantized layer."""


@dataclass(frozen=True)
class BudgetBound:
    """One bound of a budget: a sum over layers of a function of their two widths.

    Attributes:
        name: the field of :class:`fxquant.Budget`.
        limit: its value.
        of_layer: what a layer spends at (name, weight bits, activation bits).
        base: what is spent at any widths.
    """

    name: str
    limit: float
    of_layer: Callable[[str, int, int], float]
    base: float = 0.0

    TOLERANCE: ClassVar[float] = 1e-9  # of sums of floats

    def spent(self, widths: Widths) -> float:
        """In the unit of the limit."""
        return self.base + sum(self.of_layer(name, *pair) for name, pair in widths.items())

    def holds(self, widths: Widths) -> bool:
        return self.spent(widths) <= self.limit + self.TOLERANCE

    def require(self, lowest: Widths) -> None:
        """Raises :class:`SpecError` where not even these widths keep to it."""
        if not self.holds(lowest):
            raise SpecError(
                f"budget {self.name}={self.limit:.12g} was asked for, but the lowest widths that the rules allow (and "
                f"those that are fixed already) take {self.spent(lowest):.12g}; raise the budget, or lower the rules' "
                "widths"
            )


def budget_bounds(model: nn.Module, budget: Budget | None) -> list[BudgetBound]:
    """The bounds of ``budget`` on a prepared model's layers."""
    if not budget:
        return []
    layers, costs = cost.qat_layers(model), prepared_info(model).costs
    weights, inputs = (sum(getattr(costs[name], size) for name in layers) for size in ("weights", "inputs"))
    spenders: dict[str, Callable[[str, int, int], float]] = {
        "mean_weight_bits": lambda name, w, a: w * costs[name].weights / weights,
        "mean_activation_bits": lambda name, w, a: a * costs[name].inputs / inputs,
        "bops": lambda name, w, a: costs[name].macs * w * a,
        "weight_bytes": lambda name, w, a: cost.packed_bytes(costs[name].weights, w),
    }
    base = {"weight_bytes": cost.unpacked_bytes(model)}
    limits = {name: limit for name, limit in vars(budget).items() if limit is not None}
    return [BudgetBound(name, limit, spenders[name], base.get(name, 0)) for name, limit in limits.items()]
