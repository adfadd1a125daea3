"""The parent's side of the workers' pipes."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from ..errors import FxQuantError
from .contender import Contender
from .job import Job

_OPEN_SECONDS = 1800  # compilers and quantizers on a large model, on a busy machine
_BURST_SECONDS = 600


class WorkerError(FxQuantError):
    """A contender that cannot be opened or run.

    Attributes:
        absent: whether that is because something is not installed.
    """

    def __init__(self, reason: str, absent: bool = False):
        super().__init__(reason)
        self.absent = absent


class Worker:
    """A process that opens one contender, then waits to be asked for bursts."""

    def __init__(self, job: Job, contender: Contender):
        self._process = Process(job.threads)
        try:
            opened = self._process.ask({"job": asdict(job), "contender": asdict(contender)}, _OPEN_SECONDS)
        except WorkerError:
            self.close()
            raise
        self.size: int = opened["size"]
        self.note: str = opened["note"]

    def warm(self, batch: int) -> tuple[float, str]:
        """Make ready for a batch size: milliseconds of a call, and a note on how it runs."""
        answer = self._process.ask({"warm": batch}, _OPEN_SECONDS)
        return answer["milliseconds"], answer["note"]

    def burst(self, batch: int, calls: int) -> float:
        """Milliseconds a call, over that many calls."""
        return self._process.ask({"burst": batch, "calls": calls}, _BURST_SECONDS)["milliseconds"]

    def close(self) -> None:
        self._process.close()


class Builder:
    """A process that makes shared files, none of which is tried twice. One that dies costs one file."""

    def __init__(self, job: Job, made: Sequence[str] = ()):
        self._job = job
        self._made: dict[str, WorkerError | None] = dict.fromkeys(made)
        self._process: Process | None = None

    def require(self, name: str) -> None:
        """Make a file if it is not there.

        Raises:
            WorkerError: with the reason why it cannot be made.
        """
        if name not in self._made:
            self._made[name] = self._make(name)
        if (error := self._made[name]) is not None:
            raise error

    def _make(self, name: str) -> WorkerError | None:
        self._process = self._process or Process(self._job.threads)
        try:
            self._process.ask({"job": asdict(self._job), "build": name}, _OPEN_SECONDS)
        except WorkerError as error:
            self.close()
            return error
        return None

    def close(self) -> None:
        if self._process is not None:
            self._process.close()
        self._process = None


class Process:
    """``python -m`` of a module that answers, asked over pipes."""

    def __init__(self, threads: int, module: str = "fxquant.bench"):
        count = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed in close()
        self.process = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            bufsize=0,
            env={**os.environ, **count},
        )

    def ask(self, request: dict[str, Any], seconds: float) -> dict[str, Any]:
        """The answer to one request.

        Raises:
            WorkerError: where it is a reason, where there is none in time, or the process ended.
        """
        try:
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
        except BrokenPipeError:
            raise WorkerError(self._ended()) from None
        line = self._line(seconds)
        answer = json.loads(line)
        for state in ("failed", "absent"):
            if state in answer:
                raise WorkerError(answer[state], absent=state == "absent")
        return answer

    def _line(self, seconds: float) -> bytes:
        line, pipe, until = b"", self.process.stdout, time.monotonic() + seconds
        while not line.endswith(b"\n"):
            if not select.select([pipe], [], [], max(until - time.monotonic(), 0))[0]:
                self.process.kill()
                raise WorkerError(f"took more than {seconds:.0f} s")
            part = os.read(pipe.fileno(), 65536)
            if not part:
                raise WorkerError(self._ended())
            line += part
        return line

    def _ended(self) -> str:
        status = self.process.wait()
        self.errors.seek(0)
        last = (self.errors.read().decode(errors="replace").strip().splitlines() or ["no message"])[-1]
        return f"its process ended with status {status}: {last[:200]}"

    def close(self) -> None:
        """End the process: at the end of its input, or at once where it does not."""
        try:
            self.process.stdin.close()
            self.process.wait(10)
        except (OSError, subprocess.TimeoutExpired):
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()
        self.errors.close()
