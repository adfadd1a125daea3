"""What a run tells whoever watches it."""

from __future__ import annotations

from typing import Protocol

from torch import fx


class Progress(Protocol):
    """What a run tells whoever watches it."""

    def start(self, stage: str, steps: int, done: int = 0) -> None:
        """A stage of that many steps begins, ``done`` of them already taken."""

    def step(self, values: dict[str, float]) -> None:
        """A step was taken; what to show beside the bar."""

    def prepared(self, model: fx.GraphModule) -> None:
        """The model is prepared: who got which bits can be shown before training."""

    def note(self, text: str) -> None:
        """Something happened that is worth a line."""


class Silent:
    """Tells nobody."""

    def start(self, stage: str, steps: int, done: int = 0) -> None:
        pass

    def step(self, values: dict[str, float]) -> None:
        pass

    def prepared(self, model: fx.GraphModule) -> None:
        pass

    def note(self, text: str) -> None:
        pass
