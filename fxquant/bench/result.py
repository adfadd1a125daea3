"""What was measured: entries, medians, ratios, and their JSON."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from .contender import EAGER, ORT, Contender, label
from .processes import WorkerError

TOLERANCE = 1.05
"""A peer may be this much faster than the same runtime fed by us before it is said to be faster."""


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of milliseconds a call, over rounds."""

    median: float
    lower: float
    upper: float


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles, interpolated between values.

    >>> spread([4.0, 1.0, 2.0, 3.0, 5.0])
    Spread(median=3.0, lower=2.0, upper=4.0)
    """
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, lower, upper)


@dataclass
class Entry:
    """One contender's row.

    Attributes:
        name, backend, counterpart: the contender's.
        size: bytes of what would be shipped.
        rounds: milliseconds a call of each round, by batch size.
        note, batch_notes: what a reader has to know; by batch size.
        failed: why it was not measured, if it was not; ``absent`` where that is for want of a package or an engine.
    """

    name: str
    backend: str = ""
    counterpart: str = ""
    size: int | None = None
    rounds: dict[int, list[float]] = field(default_factory=dict)
    note: str = ""
    batch_notes: dict[int, str] = field(default_factory=dict)
    failed: str = ""
    absent: bool = False

    @classmethod
    def of(cls, contender: Contender) -> Entry:
        return cls(contender.name, contender.backend, contender.counterpart)

    def stop(self, error: WorkerError) -> None:
        """Give it a reason in place of a measurement."""
        self.failed, self.absent = str(error), error.absent

    @property
    def state(self) -> str:
        return "absent" if self.absent else "failed" if self.failed else "measured"

    def spread(self, batch: int) -> Spread | None:
        """Of one batch size, where it was measured to the end."""
        values = self.rounds.get(batch)
        return spread(values) if values and not self.failed else None


@dataclass
class Result:
    """All entries of one model, with what it takes to judge them."""

    model: str
    input_shape: tuple[int, int, int]
    settings: dict[str, Any]
    machine: dict[str, Any]
    entries: list[Entry]
    run: str = ""

    @property
    def batches(self) -> list[int]:
        return list(self.settings["batches"])

    @property
    def clock(self) -> str:
        """What a millisecond is."""
        threads = self.settings["threads"]
        return f"{'wall' if self.settings['wall'] else 'CPU'} time, {threads} thread{'s' if threads > 1 else ''}"

    def speed(self, entry: Entry, base: str, batch: int) -> float | None:
        """Times as fast as the entry of that name: the ratio of medians."""
        other = next((e.spread(batch) for e in self.entries if e.name == base), None)
        own = entry.spread(batch)
        return other.median / own.median if other and own else None

    def peers(self) -> list[dict[str, Any]]:
        """Each peer's speed as a multiple of the same runtime's fed by us: the ratio of medians, at 8 bits."""
        found = []
        for entry in self.entries:
            ours = label(entry.counterpart, self.run or 8)
            for batch in self.batches if entry.counterpart else ():
                speed = self.speed(entry, ours, batch)
                if speed is not None:
                    row = {"peer": entry.name, "ours": ours, "batch": batch, "speed_vs_ours": speed}
                    found.append({**row, "faster_than_ours": speed > TOLERANCE})
        return found

    def to_json(self) -> dict[str, Any]:
        """All of it, medians and ratios included, milliseconds a call of a whole batch."""
        return {
            "model": self.model,
            "run": self.run,
            "input_shape": list(self.input_shape),
            "weights": "of the run" if self.run else "random: latency and size do not depend on them",
            "settings": self.settings,
            "clock": self.clock,
            "machine": self.machine,
            "contenders": [self._row(entry) for entry in self.entries],
            "peers": self.peers(),
        }

    def _row(self, entry: Entry) -> dict[str, Any]:
        batches = {}
        for batch in self.batches:
            if (own := entry.spread(batch)) is not None:
                batches[str(batch)] = {
                    **{f"{key}_ms": value for key, value in asdict(own).items()},
                    "speed_vs_onnxruntime_fp32": self.speed(entry, ORT, batch),
                    "speed_vs_eager_fp32": self.speed(entry, EAGER, batch),
                    "note": entry.batch_notes.get(batch, ""),
                    "rounds_ms": entry.rounds[batch],
                }
        kept = {key: getattr(entry, key) for key in ("name", "backend", "counterpart", "state", "note")}
        return {**kept, "bytes": entry.size, "reason": entry.failed, "batches": batches}
