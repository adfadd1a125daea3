"""Epochs of one stage of training, with a checkpoint after each from which it goes on exactly."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .. import checkpoint
from ..data import Loader
from ..distributed import even_parts, mean_over_processes, whole_batch
from ..recipe import Recipe
from ..schedule import Schedule, cosine, linear
from .build import make_optimizer
from .guard import Guard
from .keeper import Keeper
from .layout import lay_out
from .processes import Processes
from .progress import Progress

Objective = Callable[[nn.Module, Tensor, Tensor, float], tuple[Tensor, dict[str, Tensor]]]
"""(model, images, labels, share of the step that they are) to the loss and to what is shown beside the bar, both of
which add up over the parts of a step."""


class Stateful(Protocol):
    """What a checkpoint keeps beside model and optimizer; plain values and tensors."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> Any: ...


class History:
    """What was shown at the steps of each epoch, in the mean; and what was found after it."""

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
        loader: training images, by epoch; this process's share of them.
        objective: loss of a batch, or of a part of one.
        accumulate: parts in which a process computes its images of a step.
        sync_batch_norm: whether BatchNorm's statistics are of the images of all processes.
        parameters_retire: whether parameters go out of use while it trains.
        memory_format: of images and convolutions' weights while it trains.
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
    accumulate: int = 1
    sync_batch_norm: bool = True
    parameters_retire: bool = False
    memory_format: torch.memory_format = torch.contiguous_format
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
        processes: that train together.
        progress: who watches.
        started: ``time.perf_counter()`` at which the run began, less what it took before it was cut.
        guard: of the run, against divergence.
    """

    def __init__(
        self,
        recipe: Recipe,
        output: Path,
        processes: Processes,
        progress: Progress,
        started: float,
        guard: Guard,
    ):
        self.recipe, self.output, self.processes, self.progress = recipe, output, processes, progress
        self.started, self.guard = started, guard

    def train(self, stage: Stage, state: dict[str, Any] | None = None) -> None:
        """Train a stage to its end, from its beginning or from the checkpoint ``state``.

        Raises:
            Diverged: where the loss is no number any more, or explodes, with the layer.
        """
        lay_out(stage.model, stage.memory_format)
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
            self.processes.restore_random(state["random"], self.recipe.seed)
            first = state["epochs_done"]
        else:
            self.processes.seed_apart(self.recipe.seed)
        wrapped, prepared = self.processes.wrap(stage.model, optimizer, parameters_retire=stage.parameters_retire)
        self.progress.start(stage.name, stage.epochs * len(stage.loader), first * len(stage.loader))
        for epoch in range(first, stage.epochs):
            stage.loader.epoch = epoch
            wrapped.train()
            guard.begin_epoch(stage.model)
            sums: Counter[str] = Counter()
            for images, labels in stage.loader:
                place = (stage.name, epoch + 1, scheduler.last_epoch + 1)
                with guard.watch(place, stage.model, images):
                    shown = self._step(stage, place, wrapped, prepared, images, labels)
                    scheduler.step()
                    stage.after_step()
                self.progress.step(shown)
                sums.update(shown)
            guard.end_epoch(place, stage.model, images)
            with whole_batch():
                found = stage.keeper.after_epoch(epoch + 1)
            means = {name: total / len(stage.loader) for name, total in sums.items()}
            stage.history.epochs.append({"epoch": epoch + 1, **means, **found})
            stage.after_epoch(epoch + 1)
            saved = {name: part.state_dict() for name, part in parts.items()}
            saved |= {"stage": stage.name, "epochs_done": epoch + 1, "random": self.processes.random_state()}
            saved["seconds"] = time.perf_counter() - self.started
            self.processes.only_first(partial(checkpoint.save_checkpoint, self.output, self.recipe, saved))
        stage.keeper.restore()
        lay_out(stage.model, torch.contiguous_format)
        if not stage.sync_batch_norm:
            self.processes.unify_buffers(stage.model)

    def _step(self, stage, place, model, optimizer, images, labels) -> dict[str, float]:
        device = self.processes.accelerator.device
        images, labels = images.to(device, memory_format=stage.memory_format), labels.to(device)
        optimizer.zero_grad()
        parts = zip(*(even_parts(all_of, stage.accumulate, "parts") for all_of in (images, labels)), strict=True)
        shown: dict[str, Tensor] = {}
        for number, part in enumerate(parts, 1):
            last = number == stage.accumulate
            with self.processes.part_of_step(model, last=last, sync_batch_norm=stage.sync_batch_norm):
                with torch.autocast(device.type, stage.autocast, enabled=stage.autocast != torch.float32):
                    loss, values = stage.objective(model, *part, 1 / stage.accumulate)
                self.processes.accelerator.backward(loss)
            shown = {name: shown.get(name, 0) + value.detach() for name, value in values.items()}
        shown = _numbers(shown)
        self.guard.check(place, stage.model, images, shown)
        optimizer.step()
        return shown


def learning_rate(steps: int, warmup: float, hold: float = 0.0) -> Schedule:
    """Factor that rises to 1 over the share ``warmup`` of the steps, stays there up to the share ``hold`` (where that
    is later), then falls to 0 by half a cosine."""
    rise = max(round(warmup * steps), 1)
    stay = max(round(hold * steps), rise)
    up, down = linear(1 / rise, 1.0, rise), cosine(1.0, 0.0, max(steps - stay, 1), stay)
    return lambda step: up(step) if step < rise else down(step)


def _numbers(scalars: dict[str, Tensor]) -> dict[str, float]:
    """Scalars as numbers, means over processes, with one wait for the device; parts of the objective that are 0, being
    off, are left out."""
    with whole_batch():
        values = mean_over_processes(torch.stack([value.float() for value in scalars.values()])).tolist()
    return {name: value for name, value in zip(scalars, values, strict=True) if name == "total" or value != 0}
