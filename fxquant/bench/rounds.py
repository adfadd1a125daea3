"""Bursts of all contenders in turn, shuffled anew every round, so that the machine's noise falls on all alike."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from ..errors import SpecError
from .contender import Contender
from .job import Job
from .processes import Builder, Worker, WorkerError
from .result import Entry

Item = TypeVar("Item", bound=Hashable)


@dataclass(frozen=True)
class Settings:
    """How it is measured.

    Args:
        batches: batch sizes.
        rounds: bursts of each contender at each batch size.
        threads: of every runtime.
        wall: wall time; the CPU time of the process otherwise.
        seed: of weights, images and order.
        burst: milliseconds that a burst is to take, from which its number of calls follows.

    Raises:
        SpecError: for what cannot be measured.
    """

    batches: tuple[int, ...] = (1, 16)
    rounds: int = 20
    threads: int = 1
    wall: bool = False
    seed: int = 0
    burst: float = 200.0

    def __post_init__(self):
        if not self.batches or min(self.batches) < 1 or len(set(self.batches)) < len(self.batches):
            raise SpecError(f"batches {list(self.batches)} were asked for; give different sizes of at least 1")
        for name, least in (("rounds", 1), ("threads", 1), ("burst", 1)):
            if getattr(self, name) < least:
                raise SpecError(f"{name}={getattr(self, name)} was asked for; it must be at least {least}")
        if self.threads > 1 and not self.wall:
            raise SpecError(
                f"{self.threads} threads were asked for with CPU time, which adds up over threads; ask for wall time "
                "too (--wall)"
            )


def order(items: Sequence[Item], rounds: int, seed: int) -> list[list[Item]]:
    """Every item once a round, shuffled anew in each."""
    drawn = random.Random(seed)
    return [drawn.sample(list(items), len(items)) for _ in range(rounds)]


def measure(
    job: Job,
    chosen: Sequence[Contender],
    settings: Settings,
    *,
    built: Sequence[str] = (),
    watch: Callable[[str], None] = lambda text: None,
) -> list[Entry]:
    """One entry a contender, in order; what cannot run has its reason.

    Args:
        job: the model, and where shared files go.
        chosen: from :func:`fxquant.bench.contenders`.
        settings: batch sizes, rounds and clock.
        built: shared files that are there already.
        watch: told of each step.
    """
    entries = {contender.name: Entry.of(contender) for contender in chosen}
    workers: dict[str, Worker] = {}
    with contextlib.ExitStack() as stack:
        builder = Builder(job, built)
        stack.callback(builder.close)
        for contender in chosen:
            watch(f"opening {contender.name}")
            entry = entries[contender.name]
            try:
                worker = _open(job, contender, builder)
            except WorkerError as error:
                entry.stop(error)
                continue
            stack.callback(worker.close)
            workers[contender.name] = worker
            entry.size, entry.note = worker.size, worker.note
        builder.close()
        calls = _warm(workers, entries, settings)
        for number, turn in enumerate(order(list(calls), settings.rounds, settings.seed), 1):
            watch(f"round {number} of {settings.rounds}")
            for name, batch in turn:
                if entries[name].failed:
                    continue
                try:
                    entries[name].rounds[batch].append(workers[name].burst(batch, calls[name, batch]))
                except WorkerError as error:
                    entries[name].stop(error)
    return list(entries.values())


def _open(job: Job, contender: Contender, builder: Builder) -> Worker:
    """A worker, after the shared files it needs."""
    if reason := contender.absence():
        raise WorkerError(reason, absent=True)
    for name in contender.needs:
        builder.require(name)
    return Worker(job, contender)


def _warm(workers: dict[str, Worker], entries: dict[str, Entry], settings: Settings) -> dict[tuple[str, int], int]:
    """Calls in a burst, for every contender and batch size that run."""
    calls = {}
    for name, worker in workers.items():
        for batch in settings.batches:
            try:
                milliseconds, note = worker.warm(batch)
            except WorkerError as error:
                entries[name].stop(error)
                break
            calls[name, batch] = max(1, round(settings.burst / max(milliseconds, 1e-3)))
            entries[name].rounds[batch] = []
            if note:
                entries[name].batch_notes[batch] = note
    return calls
