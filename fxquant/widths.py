"""Learned widths to whole ones, inside a hard budget."""

from __future__ import annotations

from torch import nn

from . import cost
from .budget import BudgetBound, budget_bounds
from .estimators import Estimator
from .estimators.base import rounded_up
from .layers import QATLayer
from .spec import Budget


def fix_widths(
    model: nn.Module, budget: Budget | None = None, *, keep_learning: bool = False
) -> dict[str, tuple[int, int]]:
    """Give every quantizer that still learns its width the whole one above it, or less where the budget says so.

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
    choices = _choices(model)
    bounds = budget_bounds(model, budget)
    for bound in bounds:
        while not bound.holds(_widths(choices)):
            savings = {key: _saved(bound, choices, key) for key, c in choices.items() if c.bits > c.lowest}
            key = min((k for k, saved in savings.items() if saved > 0), key=lambda k: choices[k].strain() / savings[k])
            choices[key].bits -= 1
    _spend_what_is_left(bounds, choices)
    for choice in choices.values():
        interval = isinstance(choice.estimator.bits, tuple)
        if not choice.estimator.settled and not (keep_learning and interval):
            choice.estimator.fix_width(choice.bits)
    return _widths(choices)


def require_reachable(model: nn.Module, budget: Budget | None) -> None:
    """Raises :class:`SpecError` where even the lowest widths that a prepared model's rules allow exceed ``budget``."""
    choices = _choices(model)
    for choice in choices.values():
        choice.bits = choice.lowest
    for bound in budget_bounds(model, budget):
        bound.require(_widths(choices))


def _choices(model: nn.Module) -> dict[tuple[str, str], _Choice]:
    return {
        (name, kind): _Choice(estimator)
        for name, layer in cost.qat_layers(model).items()
        for kind, estimator in (("weight", layer.weight_fake_quant), ("activation", layer.input_fake_quant))
    }


def _widths(choices: dict[tuple[str, str], _Choice]) -> dict[str, tuple[int, int]]:
    names = dict.fromkeys(name for name, _ in choices)
    return {name: (choices[name, "weight"].bits, choices[name, "activation"].bits) for name in names}


def _saved(bound: BudgetBound, choices: dict[tuple[str, str], _Choice], key: tuple[str, str]) -> float:
    """What a bit less of one tensor saves: the mean down to its lowest width, for bytes come whole."""
    name, kind = key
    choice, now = choices[key], (choices[name, "weight"].bits, choices[name, "activation"].bits)
    least = (choice.lowest, now[1]) if kind == "weight" else (now[0], choice.lowest)
    return (bound.of_layer(name, *now) - bound.of_layer(name, *least)) / (choice.bits - choice.lowest)


def _spend_what_is_left(bounds: list[BudgetBound], choices: dict[tuple[str, str], _Choice]) -> None:
    """Give bits back to those that lost most of their learned width, as long as the budget holds."""
    short = sorted((c for c in choices.values() if c.bits < c.highest), key=lambda c: c.bits - c.learned)
    while bounds and short:
        for choice in short:
            choice.bits += 1
            if all(bound.holds(_widths(choices)) for bound in bounds):
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
            self.bits = rounded_up(self.learned, estimator.bits)
            self.highest = self.bits  # a rest of the budget goes back to whom it was taken from, to no one else

    def strain(self) -> float:
        """How much one bit less adds to the squared distance from the learned width; made positive."""
        added = (self.bits - 1 - self.learned) ** 2 - (self.bits - self.learned) ** 2
        return added + _ALL_POSITIVE


def layer_widths(layer: QATLayer) -> tuple[float, float]:
    """Width of a layer's weight and of its input at this moment, as plain numbers."""
    return float(cost.weight_bits(layer).detach()), float(cost.activation_bits(layer).detach())
