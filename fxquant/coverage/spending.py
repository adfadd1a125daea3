"""Time and memory that the stages of one model take."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from ..meter import CpuMeter
from .row import Row


class Spending:
    """Writes into a row what its stages take; made before the model is."""

    def __init__(self, row: Row):
        self.row = row
        self._meter = CpuMeter(threads=1)  # for its memory

    @contextmanager
    def on(self, stage: str) -> Iterator[None]:
        """Around what belongs to a stage, one of :data:`~fxquant.coverage.row.TIMED`."""
        self._meter.reset_peak()
        begun = time.perf_counter()
        yield
        seconds, megabytes = time.perf_counter() - begun, self._meter.peak() / 2**20
        setattr(self.row, f"{stage}_seconds", round(seconds, 2))
        setattr(self.row, f"{stage}_mb", round(megabytes))
        self.row.peak_mb = max(self.row.peak_mb, round(megabytes))
