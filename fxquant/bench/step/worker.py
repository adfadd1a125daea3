"""One contender in this process: built once, then timed in bursts when the parent asks; asleep in between."""

from __future__ import annotations

import math
import sys
from typing import Any

import torch

from ...errors import NonFiniteError
from ...estimators.passes import compiled_quantizers
from ...meter import meter
from ..worker import answer_all, claim_output
from .job import FLOAT, PEERS, StepJob
from .steps import build

_WARM_STEPS = 3


def main() -> None:
    """Serve the parent until it closes the pipe."""
    answer_all(sys.stdin, claim_output(), StepWorker())


class StepWorker:
    """Answers ``{"job": ..., "contender": ...}`` first, then ``{"burst": steps}`` and ``{"peak": true}``."""

    def __init__(self):
        self._step = None
        self._compiled = False

    def __call__(self, request: dict[str, Any]) -> dict[str, Any]:
        if self._step is None:
            return self._open(StepJob(**request["job"]), request["contender"])
        return {"bytes": self._meter.peak()} if "peak" in request else self._burst(request["burst"])

    def _open(self, job: StepJob, contender: str) -> dict[str, Any]:
        """Build, and run until caches and lazy work are done; milliseconds of a step."""
        torch.set_num_threads(job.threads)
        self._meter = meter(job.device, job.threads)
        step = build(contender, job)
        self._compiled = job.compiled and contender not in (FLOAT, *PEERS)
        with compiled_quantizers(self._compiled):
            for _ in range(_WARM_STEPS):
                step()
        self._meter.reset_peak()
        self._step = step
        return self._burst(1)

    def _burst(self, steps: int) -> dict[str, Any]:
        losses = []
        with compiled_quantizers(self._compiled):  # outside of what is timed
            milliseconds = self._meter.milliseconds(lambda: losses.append(self._step()), steps)
        if not math.isfinite(float(losses[-1])):
            raise NonFiniteError(f"the loss became {float(losses[-1])}: what follows would not be a training step")
        return {"milliseconds": milliseconds}
