"""What a run does about a divergence: ``[divergence]`` of a recipe carried out."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from ..errors import DivergenceError, NonFiniteError
from ..recipe import DivergenceSection
from .divergence import all_finite, first_not_finite, furthest, weights_of

Place = tuple[str, int, int]
"""Stage, epoch and step of the stage, these two from 1."""


class Diverged(Exception):
    """A stage of training diverged; :meth:`Guard.roll_back` says what is to be done.

    Attributes:
        stage, epoch, step: where (:data:`Place`).
        cause: what was seen and which layer went first, in words.
    """

    def __init__(self, stage: str, epoch: int, step: int, cause: str):
        self.stage, self.epoch, self.step, self.cause = stage, epoch, step, cause

    def __str__(self) -> str:
        return f"in epoch {self.epoch} of {self.stage} training, step {self.step}, {self.cause}"


class Guard:
    """Watches the losses of a run, and counts its rollbacks.

    A loss that is NaN or infinite has diverged; so have parameters that are at the end of an epoch, so that no
    checkpoint holds any. A finite loss has where ``loss_factor`` is given and ``patience`` steps in a row were above
    that multiple of the lowest mean loss of an epoch of the stage (before its first epoch ends: of its first loss).

    A rollback goes on from the last checkpoint, in the way of a run that was killed and is resumed, with learning rates
    times ``lr_factor`` to the end of the stage. It is kept in the next checkpoint: a run killed before that diverges
    again, and is rolled back again, at the same step.
    """

    def __init__(self, section: DivergenceSection):
        self.section = section
        self.rollbacks: list[dict[str, Any]] = []
        self._begin()

    def _begin(self, lowest: float | None = None, above: int = 0) -> None:
        self.lowest, self.above = lowest, above
        self.losses: list[float] = []
        self.weights: dict[str, Tensor] = {}

    def lr_scale(self, stage: str) -> float:
        """Factor of the learning rates of a stage, 1 without rollbacks."""
        return math.prod(rollback["lr_factor"] for rollback in self.rollbacks if rollback["stage"] == stage)

    def begin_stage(self) -> None:
        """A stage begins, not from a checkpoint of its own."""
        self._begin()

    def begin_epoch(self, model: nn.Module) -> None:
        """An epoch begins."""
        self.losses = []
        self.weights = weights_of(model) if self.section.loss_factor else {}

    @contextlib.contextmanager
    def watch(self, place: Place, model: nn.Module, images: Tensor) -> Iterator[None]:
        """Around a step and what follows on it: where a whole width or a range is made of what is no number, it fails
        before there is a loss.

        Raises:
            Diverged: in the place of NonFiniteError, and of any error of a model whose weights are not finite.
        """
        try:
            yield
        except Diverged:
            raise
        except Exception as error:
            if not all_finite(model):
                raise Diverged(*place, first_not_finite(model, images)) from error
            if isinstance(error, NonFiniteError):
                raise Diverged(*place, str(error)) from error
            raise

    def check(self, place: Place, model: nn.Module, images: Tensor, shown: dict[str, float]) -> None:
        """Judge the loss of a step before it is taken.

        Args:
            model, images: to find the layer with.
            shown: of the batch: the loss, as ``total`` or, where it is of one part, as ``loss``, and what is beside it.

        Raises:
            Diverged: with the layer that went first.
        """
        loss = shown.get("total", shown.get("loss", 0.0))  # a part that is 0 is not shown
        if not all(map(math.isfinite, shown.values())):
            raise Diverged(*place, f"the loss is NaN or infinite: {first_not_finite(model, images)}")
        self.losses.append(loss)
        if self.section.loss_factor is None:
            return
        lowest = self.losses[0] if self.lowest is None else self.lowest
        self.above = self.above + 1 if loss > self.section.loss_factor * lowest else 0
        if self.above >= self.section.patience:
            cause = f"the loss explodes ({loss:.3g} after {lowest:.3g}): {furthest(model, self.weights)}"
            raise Diverged(*place, cause)

    def end_epoch(self, place: Place, model: nn.Module, images: Tensor) -> None:
        """The last step of an epoch was taken; a checkpoint is to be written.

        Raises:
            Diverged: where it would hold NaN or infinity.
        """
        if not all_finite(model):
            raise Diverged(*place, f"the weights are NaN or infinite: {first_not_finite(model, images)}")
        mean = math.fsum(self.losses) / len(self.losses)
        self.lowest = mean if self.lowest is None else min(mean, self.lowest)

    def roll_back(self, diverged: Diverged) -> str:
        """Note a rollback; returns what is told of it.

        Raises:
            DivergenceError: where the recipe says to stop, or it has been rolled back as often as it says.
        """
        own = [rollback for rollback in self.rollbacks if rollback["stage"] == diverged.stage]
        section = "float" if diverged.stage == "float" else "train"
        lower = f"Lower {section}.lr" + ("" if section == "float" else " or train.quantizer_lr")
        if self.section.action == "stop":
            raise DivergenceError(
                f"{diverged}. {lower} and run anew, or resume with --set divergence.action=rollback: it goes on from "
                f"the last checkpoint with learning rates times {self.section.lr_factor:g}"
            )
        if len(own) >= self.section.max_rollbacks:
            raise DivergenceError(
                f"{diverged}, after {len(own)} rollbacks (divergence.max_rollbacks), with learning rates times "
                f"{self.lr_scale(diverged.stage):g}. {lower} and run anew"
            )
        self.rollbacks.append(
            {
                "stage": diverged.stage,
                "epoch": diverged.epoch,
                "step": diverged.step,
                "cause": diverged.cause,
                "lr_factor": self.section.lr_factor,
            }
        )
        return (
            f"{diverged}; back to the last checkpoint, with learning rates times {self.lr_scale(diverged.stage):g} "
            f"(rollback {len(own) + 1} of at most {self.section.max_rollbacks})"
        )

    def state_dict(self) -> dict[str, Any]:
        return {"rollbacks": self.rollbacks, "lowest": self.lowest, "above": self.above}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint; rollbacks since it was written stay."""
        self._begin(state["lowest"], state["above"])
        self.rollbacks = max(self.rollbacks, list(state["rollbacks"]), key=len)
