"""One contender in this process: opened once, then timed in bursts when the parent asks; asleep in between.

Requests and answers are lines of JSON, over the standard input and output. The first request is the job; the answer to
it comes when the model is ready. Between requests the process blocks on reading.
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from typing import IO, Any

import torch

from ..errors import in_short
from .artefacts import build
from .contender import Contender
from .job import Job
from .runners import Call, Opened, open_contender

_WARM_CALLS = 3


def main() -> None:
    """Serve the parent until it closes the pipe."""
    serve(sys.stdin, claim_output())


def claim_output() -> IO[str]:
    """The pipe to the parent. What libraries print goes to the standard error, and is not taken for an answer."""
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)
    warnings.filterwarnings("ignore")
    torch.set_num_interop_threads(1)
    return channel


def serve(requests: IO[str], answers: IO[str]) -> None:
    """Open a contender at the first request, time it at those that follow."""
    timing: Timing | None = None

    def respond(request: dict[str, Any]) -> dict[str, Any]:
        nonlocal timing
        if "build" in request:
            build(request["build"], _job(request))
            return {}
        if timing is None:
            timing = Timing(_open(request), _job(request))
            return {"size": timing.opened.size, "note": timing.opened.note}
        return timing(request)

    answer_all(requests, answers, respond)


def answer_all(requests: IO[str], answers: IO[str], respond: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Answer requests, line by line; an error becomes an answer with ``failed``."""
    for line in requests:
        try:
            answer = respond(json.loads(line))
        except ImportError as error:
            answer = {"absent": in_short(error)}
        except Exception as error:  # of any runtime, on any model: the row's reason
            answer = {"failed": in_short(error)}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _job(request: dict[str, Any]) -> Job:
    job = Job(**{**request["job"], "input_shape": tuple(request["job"]["input_shape"])})
    torch.set_num_threads(job.threads)
    return job


def _open(request: dict[str, Any]) -> Opened:
    fields = {key: tuple(value) if isinstance(value, list) else value for key, value in request["contender"].items()}
    return open_contender(Contender(**fields), _job(request))


class Timing:
    """Binds batches, and times bursts of calls on them."""

    def __init__(self, opened: Opened, job: Job):
        self.opened, self.job = opened, job
        self.clock = time.perf_counter if job.wall else time.process_time
        self.calls: dict[int, Call] = {}

    def __call__(self, request: dict[str, int]) -> dict[str, Any]:
        with torch.no_grad():
            return self.warm(request["warm"]) if "warm" in request else self.burst(request["burst"], request["calls"])

    def warm(self, batch: int) -> dict[str, Any]:
        """Bind a batch size and run it until caches and lazy work are done; milliseconds of the last call."""
        call, note = self.opened.bind(self.job.batch(batch))
        for _ in range(_WARM_CALLS):
            call()
        self.calls[batch] = call
        return {**self.burst(batch, 1), "note": note}

    def burst(self, batch: int, calls: int) -> dict[str, float]:
        """Milliseconds a call, over so many after one that is not timed: others had the caches in between."""
        call = self.calls[batch]
        call()
        begun = self.clock()
        for _ in range(calls):
            call()
        return {"milliseconds": 1000 * (self.clock() - begun) / calls}
