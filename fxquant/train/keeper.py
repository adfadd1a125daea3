"""Which weights of a training ship: of the last or of the best epoch, averaged or as they are."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ..data import Loader
from .average import WeightAverage
from .evaluate import accuracy, predictions


class Keeper:
    """Keeps a copy of the weights that ship, where these are not simply the last ones.

    Args:
        model: what is trained.
        average: its weights' average, which takes their place, if any.
        validation: images to choose the best epoch by, if it is to be chosen.
        final: whether the model already computes at the widths that ship; only then an epoch may be chosen (without
            one, it is the last).
    """

    def __init__(
        self,
        model: nn.Module,
        average: WeightAverage | None = None,
        validation: Loader | None = None,
        final: Callable[[], bool] = lambda: True,
    ):
        self.model, self.average, self.validation, self.final = model, average, validation, final
        self.kept: dict[str, Tensor] | None = None
        self.epoch = 0
        self.best: float | None = None

    def after_step(self, restart: bool = False) -> None:
        """An optimizer step was taken; ``restart`` where weights mean something else since (another width)."""
        if self.average is not None:
            self.average.restart() if restart else self.average.update()

    def after_epoch(self, epoch: int) -> dict[str, float]:
        """Judge the weights at the end of an epoch; returns what is shown of it."""
        if self.average is None and self.validation is None:
            return {}
        state = self.model.state_dict()
        if self.average is not None:
            state |= self.average.values
        state = {name: tensor.detach().clone() for name, tensor in state.items()}
        if self.validation is None:
            self.kept, self.epoch = state, epoch
            return {}
        candidate = copy.deepcopy(self.model)
        candidate.load_state_dict(state)
        reached = accuracy(*predictions(candidate.eval(), self.validation))
        final = self.final()
        if self.best is None or (final and reached > self.best):
            self.kept, self.epoch, self.best = state, epoch, reached if final else None
        return {"validation": reached}

    def restore(self) -> None:
        """Give the model the weights that ship."""
        if self.kept is not None:
            self.model.load_state_dict(self.kept)

    def state_dict(self) -> dict[str, Any]:
        average = None if self.average is None else self.average.state_dict()
        return {"average": average, "kept": self.kept, "epoch": self.epoch, "best": self.best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.kept, self.epoch, self.best = state["kept"], state["epoch"], state["best"]
