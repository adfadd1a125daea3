"""Learned widths to whole ones, inside a hard budget."""

from __future__ import annotations

import math

from torch import nn

from . import cost
from .errors import SpecError
from .estimators import Estimator
from .layers import QATLayer
from .prepare import prepared_info
from .spec import Budget


def fix_widths(
    model: nn.Module, budget: Budget | None = None, *, keep_learning: bool = False
) -> dict[str, tuple[int, int]]:
    """Give every quantizer that still learns its width the whole one nearest to it that the budget allows.

    Starts from the learned widths rounded up, then takes single bits away, each time the one whose removal strays
    least from the learned width for what it saves, until the budget holds, and hands out again what a last step left
    over. A width never leaves its rule's interval.

    Args:
        model: a prepared model.
        budget: what the whole widths must keep to.
        keep_learning: leave those that learn within an interval as they are; fix the others.

    Returns:
        (weight bits, activation bits) of each quantized layer, by name.

    Raises:
        SpecError: where even the lowest widths exceed the budget.
    """
    require_reachable(model, budget)
    layers = cost.qat_layers(model)
    choices = _choices(model)
    limits = list(_limits(budget, prepared_info(model).costs, choices)) if budget else []
    for _, limit, spent, saved in limits:
        while spent() > limit + 1e-9:
            movable = [(key, c) for key, c in choices.items() if c.bits > c.lowest and saved(key) > 0]
            _, choice = min(movable, key=lambda item: item[1].strain() / saved(item[0]))
            choice.bits -= 1
    _spend_what_is_left(limits, choices)
    for choice in choices.values():
        interval = isinstance(choice.estimator.bits, tuple)
        if not choice.estimator.settled and not (keep_learning and interval):
            choice.estimator.fix_width(choice.bits)
    return {name: (choices[name, "weight"].bits, choices[name, "activation"].bits) for name in layers}


def require_reachable(model: nn.Module, budget: Budget | None) -> None:
    """Raises :class:`SpecError` where even the lowest widths that a prepared model's rules allow exceed ``budget``."""
    if not budget:
        return
    choices = _choices(model)
    for choice in choices.values():
        choice.bits = choice.lowest
    for what, limit, spent, _ in _limits(budget, prepared_info(model).costs, choices):
        if spent() > limit + 1e-9:
            raise SpecError(
                f"budget {what}={limit:g} was asked for, but the lowest widths that the rules allow (and those "
                f"that are fixed already) take {spent():g}; raise the budget, or lower the rules' widths"
            )


def _choices(model: nn.Module) -> dict[tuple[str, str], _Choice]:
    return {
        (name, kind): _Choice(estimator)
        for name, layer in cost.qat_layers(model).items()
        for kind, estimator in (("weight", layer.weight_fake_quant), ("activation", layer.input_fake_quant))
    }


def _spend_what_is_left(limits: list, choices: dict[tuple[str, str], _Choice]) -> None:
    """Give bits back to those that lost most of their learned width, as long as the budget holds."""
    short = sorted((c for c in choices.values() if c.bits < c.highest), key=lambda c: c.bits - c.learned)
    while limits and short:
        for choice in short:
            choice.bits += 1
            if all(spent() <= limit + 1e-9 for _, limit, spent, _ in limits):
                break
            choice.bits -= 1
        else:
            return
        short = sorted((c for c in short if c.bits < c.highest), key=lambda c: c.bits - c.learned)


_ALL_POSITIVE = 100.0  # above any decrease of a squared distance between widths


class _Choice:
    """The whole width of one quantizer while it is being chosen."""

    def __init__(self, estimator: Estimator):
        self.estimator = estimator
        self.learned = float(estimator.bit_width().detach().mean())
        if not estimator.learns_width:
            self.bits = self.lowest = self.highest = estimator.whole_bits
        elif isinstance(estimator.bits, int):  # squeezed towards one target: that is the width
            self.bits = self.lowest = self.highest = estimator.bits
        else:
            self.lowest, self.highest = estimator.bits
            self.bits = min(max(math.ceil(self.learned - 1e-6), self.lowest), self.highest)
            self.highest = self.bits  # a rest of the budget goes back to whom it was taken from, to no one else

    def strain(self) -> float:
        """How much one bit less adds to the squared distance from the learned width; made positive."""
        added = (self.bits - 1 - self.learned) ** 2 - (self.bits - self.learned) ** 2
        return added + _ALL_POSITIVE


def _limits(budget: Budget, costs: dict[str, cost.LayerCost], choices: dict[tuple[str, str], _Choice]):
    """For each bound of the budget: its name, its value, what the choices spend, what one bit less saves."""

    def mean(kind, elements):
        total = sum(elements(costs[name]) for name, k in choices if k == kind)

        def spent():
            return sum(c.bits * elements(costs[name]) for (name, k), c in choices.items() if k == kind) / total

        def saved(key):
            return elements(costs[key[0]]) / total if key[1] == kind else 0.0

        return spent, saved

    if budget.mean_weight_bits is not None:
        yield "mean_weight_bits", budget.mean_weight_bits, *mean("weight", lambda c: c.weights)
    if budget.mean_activation_bits is not None:
        yield "mean_activation_bits", budget.mean_activation_bits, *mean("activation", lambda c: c.inputs)
    if budget.bops is not None:

        def spent():
            return sum(
                costs[name].macs * choices[name, "weight"].bits * choices[name, "activation"].bits
                for name, kind in choices
                if kind == "weight"
            )

        def saved(key):
            name, kind = key
            other = choices[name, "activation" if kind == "weight" else "weight"]
            return float(costs[name].macs * other.bits)

        yield "bops", budget.bops, spent, saved


def layer_widths(layer: QATLayer) -> tuple[float, float]:
    """Width of a layer's weight and of its input at this moment, as plain numbers."""
    return float(cost.weight_bits(layer).detach()), float(cost.activation_bits(layer).detach())
