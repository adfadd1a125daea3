"""Bursts of all contenders in turn, each in a process of its own, shuffled anew every round."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import asdict

from ..machine import machine
from ..processes import Process, WorkerError
from ..rounds import order
from .job import StepJob, StepSettings
from .result import StepEntry, StepResult

_OPEN_SECONDS, _BURST_SECONDS = 1800, 600


def measure(
    job: StepJob,
    names: Sequence[str],
    settings: StepSettings,
    watch: Callable[[str], None] = lambda text: None,
) -> StepResult:
    """One entry a contender, in order; what cannot run has its reason.

    Args:
        job: the model and its batch.
        names: from :func:`fxquant.bench.step.contenders`.
        settings: rounds and length of bursts.
        watch: told of each step.
    """
    entries = {name: StepEntry(name) for name in names}
    running: dict[str, tuple[Process, int]] = {}
    with contextlib.ExitStack() as stack:
        for name in names:
            watch(f"opening {name}")
            process = Process(job.threads, "fxquant.bench.step")
            stack.callback(process.close)
            with _noting_failure(entries[name]):
                opened = process.ask({"job": asdict(job), "contender": name}, _OPEN_SECONDS)
                running[name] = process, max(1, round(settings.burst / max(opened["milliseconds"], 1e-3)))
        for number, turn in enumerate(order(list(running), settings.rounds, job.seed), 1):
            watch(f"round {number} of {settings.rounds}")
            for name in turn:
                process, steps = running[name]
                if not entries[name].failed:
                    with _noting_failure(entries[name]):
                        burst = process.ask({"burst": steps}, _BURST_SECONDS)
                        entries[name].rounds.append(burst["milliseconds"])
        for name, (process, _) in running.items():
            if not entries[name].failed:
                with _noting_failure(entries[name]):
                    entries[name].peak = process.ask({"peak": True}, _BURST_SECONDS)["bytes"]
    return StepResult(job, settings, machine(), list(entries.values()))


@contextlib.contextmanager
def _noting_failure(entry: StepEntry):
    try:
        yield
    except WorkerError as error:
        entry.failed = str(error)
