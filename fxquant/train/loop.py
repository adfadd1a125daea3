"""Epochs of one stage of training, with a checkpoint after each from which it goes on exactly."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from .. import checkpoint
from ..data import Loader
from ..recipe import Recipe
from ..schedule import Schedule, cosine, linear
from .build import make_optimizer
from .guard import Guard
from .keeper import Keeper
from .progress import Progress

if TYPE_CHECKING:
    from accelerate import Accelerator

Objective = Callable[[nn.Module, Tensor, Tensor], tuple[Tensor, dict[str, Tensor]]]
"""(model, images, labels) to the loss and to what is shown beside the bar."""


class Stateful(Protocol):
    """What a checkpoint keeps beside model and optimizer; plain values and tensors."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> Any: ...


class History:
    """What was shown at the last step of each epoch."""

    def __init__(self):
        self.epochs: list[dict[str, float]] = []

    def state_dict(self) -> dict[str, Any]:
        return {"epochs": self.epochs}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epochs = list(state["epochs"])


@dataclass
class Stage:
    """One stage of training.

    Attributes:
        name: in progress, messages and checkpoints.
        model: what is trained.
        groups: parameter groups that carry their own lr and weight_decay.
        optimizer: timm's name of it.
        epochs: how many, over ``loader``.
        schedule: factor of the learning rates at a step.
        loader: training images, by epoch.
        objective: loss of a batch.
        autocast: floating type that ``objective`` computes in where it may; quantizers and losses stay in float32.
        after_step: called after every optimizer step.
        after_epoch: called after every epoch with its number, from 1, before the checkpoint is written.
        keeper: which of the weights ship; at the end the model has them.
        kept: what the checkpoint keeps beside these, by name.
        history: of the epochs; it is kept as well.
    """

    name: str
    model: nn.Module
    groups: list[dict]
    optimizer: str
    epochs: int
    schedule: Schedule
    loader: Loader
    objective: Objective
    keeper: Keeper
    autocast: torch.dtype = torch.float32
    after_step: Callable[[], None] = lambda: None
    after_epoch: Callable[[int], None] = lambda epoch: None
    kept: dict[str, Stateful] = field(default_factory=dict)
    history: History = field(default_factory=History)


class Loop:
    """Trains stages.

    Args:
        recipe: kept in every checkpoint.
        output: folder of the run.
        accelerator: device and wrapping of model and optimizer.
        progress: who watches.
        started: ``time.perf_counter()`` at which the run began, less what it took before it was cut.
        guard: of the run, against divergence.
    """

    def __init__(
        self,
        recipe: Recipe,
        output: Path,
        accelerator: Accelerator,
        progress: Progress,
        started: float,
        guard: Guard,
    ):
        self.recipe, self.output, self.accelerator, self.progress = recipe, output, accelerator, progress
        self.started, self.guard = started, guard

    def train(self, stage: Stage, state: dict[str, Any] | None = None) -> None:
        """Train a stage to its end, from its beginning or from the checkpoint ``state``.

        Raises:
            Diverged: where the loss is no number any more, or explodes, with the layer.
        """
        optimizer = make_optimizer(stage.groups, stage.optimizer)
        guard = self.guard

        def scaled(step: int) -> float:
            return guard.lr_scale(stage.name) * stage.schedule(step)

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, scaled)
        parts = {"model": stage.model, "optimizer": optimizer, "scheduler": scheduler, "history": stage.history}
        parts |= {"keeper": stage.keeper, "divergence": guard, **stage.kept}
        first = 0
        guard.begin_stage()
        if state:
            state = {"divergence": guard.state_dict()} | state  # an older version's checkpoint has none
            for name, part in parts.items():
                part.load_state_dict(state[name])
            for group, lr in zip(optimizer.param_groups, scheduler.base_lrs, strict=True):
                group["lr"] = lr * scaled(scheduler.last_epoch)  # after a rollback not what the checkpoint says
            _restore_random(state["random"])
            first = state["epochs_done"]
        wrapped, prepared = self.accelerator.prepare(stage.model, optimizer)
        self.progress.start(stage.name, stage.epochs * len(stage.loader), first * len(stage.loader))
        for epoch in range(first, stage.epochs):
            stage.loader.epoch = epoch
            wrapped.train()
            guard.begin_epoch(stage.model)
            for images, labels in stage.loader:
                place = (stage.name, epoch + 1, scheduler.last_epoch + 1)
                with guard.watch(place, stage.model, images):
                    shown = self._step(stage, place, wrapped, prepared, images, labels)
                    scheduler.step()
                    stage.after_step()
                self.progress.step(shown)
            guard.end_epoch(place, stage.model, images)
            shown |= stage.keeper.after_epoch(epoch + 1)
            stage.history.epochs.append({"epoch": epoch + 1, **shown})
            stage.after_epoch(epoch + 1)
            saved = {name: part.state_dict() for name, part in parts.items()}
            saved |= {"stage": stage.name, "epochs_done": epoch + 1, "random": _random_state()}
            saved["seconds"] = time.perf_counter() - self.started
            checkpoint.save_checkpoint(self.output, self.recipe, saved)
        stage.keeper.restore()

    def _step(self, stage, place, model, optimizer, images, labels) -> dict[str, float]:
        device = self.accelerator.device
        images, labels = images.to(device), labels.to(device)
        with torch.autocast(device.type, stage.autocast, enabled=stage.autocast != torch.float32):
            loss, shown = stage.objective(model, images, labels)
        shown = _numbers(shown)
        self.guard.check(place, stage.model, images, shown)
        optimizer.zero_grad()
        self.accelerator.backward(loss)
        optimizer.step()
        return shown


def learning_rate(steps: int, warmup: float, hold: float = 0.0) -> Schedule:
    """Factor that rises to 1 over the share ``warmup`` of the steps, stays there up to the share ``hold`` (where that
    is later), then falls to 0 by half a cosine."""
    rise = max(round(warmup * steps), 1)
    stay = max(round(hold * steps), rise)
    up, down = linear(1 / rise, 1.0, rise), cosine(1.0, 0.0, max(steps - stay, 1), stay)
    return lambda step: up(step) if step < rise else down(step)


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _numbers(scalars: dict[str, Tensor]) -> dict[str, float]:
    """Scalars as numbers, with one wait for the device; parts of the objective that are 0, being off, are left out."""
    values = torch.stack([value.detach().float() for value in scalars.values()]).tolist()
    return {name: value for name, value in zip(scalars, values, strict=True) if name == "total" or value != 0}


def _random_state() -> dict[str, Any]:
    """Of every generator there is, in plain values: numpy's keys are an array, which no checkpoint holds."""
    name, keys, *rest = np.random.get_state()
    states = {"torch": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()}
    return states | {"python": random.getstate(), "numpy": (name, keys.tolist(), *rest)}


def _restore_random(state: dict[str, Any]) -> None:
    if "python" in state:  # an older version's checkpoint has torch's alone
        random.setstate(state["python"])
        np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
