"""``[allocation]`` of a recipe carried out, and the rules that result kept for whoever goes on with the run."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from torch import fx

from ..allocate import Allocation, allocate
from ..recipe import AllocationSection, Recipe
from ..spec import Rule


class ChosenRules:
    """The rules that a run trains with, as a part of its checkpoint."""

    def __init__(self, rules: Sequence[Rule]):
        self.rules = list(rules)

    def state_dict(self) -> list[dict[str, Any]]:
        return [dataclasses.asdict(rule) for rule in self.rules]

    def load_state_dict(self, state: list[dict[str, Any]]) -> None:
        self.rules = [Rule(**rule) for rule in state]


def rules_of(recipe: Recipe, state: dict[str, Any] | None) -> list[Rule]:
    """The rules that a checkpoint was trained with; the recipe's own where it keeps none, or there is none."""
    chosen = ChosenRules(recipe.built_rules())
    if state is not None and "rules" in state:
        chosen.load_state_dict(state["rules"])
    return chosen.rules


def allocate_for(recipe: Recipe, model: fx.GraphModule, **changed: Any) -> Allocation:
    """What a recipe's ``[allocation]`` comes to on a prepared model; ``changed`` replaces keys of it.

    Raises:
        SpecError: as :func:`fxquant.allocate`.
    """
    section = (recipe.allocation or AllocationSection()).model_dump() | changed
    return allocate(model, recipe.built_budget(), max_batches=section.pop("batches"), **section)
