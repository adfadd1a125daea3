"""The processes that carry out one run: one, or as many as ``accelerate launch`` (or ``torchrun``) started.

Each has the whole model and trains on an even part of every batch. They hold the same numbers throughout: parameters,
because DistributedDataParallel gives all of them the same gradients; what is measured in forward by
:mod:`fxquant.distributed`; widths and schedules, because they follow from these and from the step. What is drawn at
random (noise of NIPQ and GDNSQ, PEGE's choice of elements, dropout) each draws for itself, as it would for images of
its own; that of a weight is drawn once a process then, and its gradients are averaged. Images and augmentation depend
on the recipe alone. The first process reads and writes the run's folder; the others have done with its last epoch.
"""

from __future__ import annotations

import contextlib
import functools
import os
import random
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
from torch import distributed as dist
from torch import nn

from ..distributed import Share, whole_batch
from ..errors import FxQuantError

_APART = 1_000_003  # from the seed of one process to that of the next
_T = TypeVar("_T")


class Processes:
    """All processes of a run, as one of them sees them.

    Attributes:
        accelerator: device, and wrapping of model and optimizer.
        share: what of the data this process reads.

    Raises:
        FxQuantError: for what a launcher was told and cannot be honoured.
    """

    def __init__(self) -> None:
        from accelerate import Accelerator, DistributedDataParallelKwargs

        options = DistributedDataParallelKwargs()
        _require_plain_launch()
        launched = int(os.environ.get("WORLD_SIZE", 1))
        # Where there are CPUs alone, accelerate takes launched processes for unrelated ones unless it is told.
        on_cpu = launched > 1 and not torch.accelerator.is_available()
        self.accelerator = Accelerator(cpu=on_cpu, mixed_precision="no", kwargs_handlers=[options])
        if self.accelerator.num_processes < launched:
            raise FxQuantError(
                f"{launched} processes were launched, but accelerate was set up for {self.accelerator.num_processes} "
                "in this program before; start the run by itself"
            )
        self.share = Share(self.accelerator.process_index, self.accelerator.num_processes)

    @property
    def count(self) -> int:
        """How many there are."""
        return self.share.count

    @property
    def is_first(self) -> bool:
        """Whether this is the one that reads and writes files, and says what there is to say."""
        return self.share.index == 0

    # ---- working together --------------------------------------------------------------------------------

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Work that each does by itself (nothing in it waits for another): where one fails, all do.

        Raises:
            FxQuantError: of the first process that failed, in all of them.
        """
        failed: FxQuantError | None = None
        try:
            yield
        except FxQuantError as error:
            if self.count == 1:
                raise
            failed = error
        if self.count == 1:
            return
        said = self.gather(None if failed is None else str(failed))
        where = next((index for index, text in enumerate(said) if text is not None), None)
        if where is not None:
            raise failed or FxQuantError(f"process {where} of {self.count}: {said[where]}")

    def from_first(self, read: Callable[[], _T]) -> _T:
        """What ``read`` gives in the first process, in all of them."""
        value = None
        with self.together():
            if self.is_first:
                value = read()
        if self.count == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value: _T) -> list[_T]:
        """A plain value of every process, in order."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value)
        return values

    def only_first(self, write: Callable[[], object]) -> None:
        """Let the first process write; where it cannot, all fail."""
        with self.together():
            if self.is_first:
                write()

    @contextlib.contextmanager
    def warnings_of_first(self) -> Iterator[None]:
        """Inside, only the first process warns: what it warns of holds for all."""
        with warnings.catch_warnings():
            if not self.is_first:
                warnings.simplefilter("ignore")
            yield

    # ---- a step ------------------------------------------------------------------------------------------

    def wrap(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, *, parameters_retire: bool
    ) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Model and optimizer as they train, in DistributedDataParallel where there are several processes.

        Args:
            parameters_retire: whether parameters go out of use while training; to look for them takes time.
        """
        self.accelerator.ddp_handler.find_unused_parameters = parameters_retire
        return self.accelerator.prepare(model, optimizer)

    def unify_buffers(self, model: nn.Module) -> None:
        """Give a model's buffers the values that they have in the first process."""
        for buffer in model.buffers() if self.count > 1 else ():
            dist.broadcast(buffer, src=0)

    @contextlib.contextmanager
    def part_of_step(self, model: nn.Module, *, last: bool, sync_batch_norm: bool) -> Iterator[None]:
        """Forward and backward of a part of a step; gradients are averaged over processes with the ``last``."""
        apart = contextlib.nullcontext() if last else self.accelerator.no_sync(model)
        with apart, whole_batch(batch_norm=sync_batch_norm):
            yield

    # ---- random numbers ----------------------------------------------------------------------------------

    def seed_apart(self, seed: int) -> None:
        """From here on each process draws for itself; the first goes on as if it were alone."""
        if not self.is_first:
            seed_everything(seed + _APART * self.share.index)

    def random_state(self) -> list[dict[str, Any]]:
        """Every generator of every process, in plain values: numpy's keys are an array, which no checkpoint holds."""
        cuda = [torch.cuda.get_rng_state()] if torch.cuda.is_available() else []
        name, keys, *rest = np.random.get_state()
        others = {"python": random.getstate(), "numpy": (name, keys.tolist(), *rest)}
        return self.gather({"torch": torch.get_rng_state(), "cuda": cuda, **others})

    def restore_random(self, states: list[dict[str, Any]] | dict[str, Any], seed: int) -> None:
        """Draw on where ``states`` were taken; a process that had no part then begins anew from ``seed``."""
        states = [states] if isinstance(states, dict) else states  # as a run of one process wrote it before
        if self.share.index >= len(states):
            self.seed_apart(seed)
            return
        own = states[self.share.index]
        if "python" in own:  # an older version's checkpoint has torch's alone
            random.setstate(own["python"])
            np.random.set_state(own["numpy"])
        torch.set_rng_state(own["torch"])
        if own["cuda"] and torch.cuda.is_available():
            torch.cuda.set_rng_state(own["cuda"][0])


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def leave() -> None:
    """Leave the process group, if there is one: this process has nothing more to do."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


@functools.cache
def first_to_fail() -> bool:
    """Whether this process is the first of all to end in an error: the one to say so. Asked when it ends.

    What launches several processes (torch's elastic agent, in ``accelerate launch`` and ``torchrun``) keeps a store
    that outlives them, with this count in it. Where none is to be reached, every process speaks for itself.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return True
    try:
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=5))
        return store.add("fxquant/failed", 1) == 1
    except (KeyError, RuntimeError):  # torch's DistError is one
        return True


def lost_another(error: BaseException) -> bool:
    """Whether an error of torch's says that another process is gone."""
    return isinstance(error, (dist.DistBackendError, dist.DistNetworkError)) or "by peer" in str(error)


def _require_plain_launch() -> None:
    """Raises where the launcher asks for what is the recipe's to say, or cannot be."""
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if asked not in ("", "no"):
        raise FxQuantError(
            f"accelerate was launched with --mixed_precision {asked}, but the recipe says what a run computes in: "
            "leave it out, and give --set train.autocast=bfloat16 (and float.autocast) for bf16"
        )
    for flag, (option, reason) in _NOT_OURS.items():
        if os.environ.get(flag, "no").lower() not in ("", "no", "false", "0"):
            raise FxQuantError(f"accelerate was launched with {option}, {reason}; launch it with --multi_gpu alone")


_NOT_OURS = {
    "ACCELERATE_USE_FSDP": (
        "--use_fsdp",
        "but the budget, the weights' average, checkpoints and freezing read parameters whole, outside of the layers "
        "that FSDP gathers them for",
    ),
    "ACCELERATE_USE_DEEPSPEED": ("--use_deepspeed", "which takes optimizer and precision into its own hands"),
    "ACCELERATE_USE_MEGATRON_LM": ("--use_megatron_lm", "which splits language models"),
    "ACCELERATE_DYNAMO_BACKEND": ("--dynamo_backend", "but quantizers in training are not compiled"),
}
