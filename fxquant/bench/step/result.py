"""What was measured of training steps: medians, spread, ratios to the float model's; as JSON and as a table."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.table import Table

from ..result import Spread, spread
from ..table import digits, times
from .job import FLOAT, StepJob, StepSettings


@dataclass
class StepEntry:
    """One contender's row.

    Attributes:
        name: of the contender.
        rounds: milliseconds a step, of each round.
        peak: bytes at the highest point of a step, beyond what the process held before the model was built.
        failed: why it was not measured to the end, if it was not.
    """

    name: str
    rounds: list[float] = field(default_factory=list)
    peak: int = 0
    failed: str = ""

    @property
    def measured(self) -> bool:
        return bool(self.rounds) and not self.failed


@dataclass
class StepResult:
    """All entries of one job, with what it takes to judge them."""

    job: StepJob
    settings: StepSettings
    machine: dict[str, Any]
    entries: list[StepEntry]

    @property
    def clock(self) -> str:
        """What a millisecond is."""
        if self.job.device != "cpu":
            return f"device time, {self.job.device}"
        return "CPU time, 1 thread" if self.job.threads == 1 else f"wall time, {self.job.threads} threads"

    @property
    def title(self) -> str:
        """Model, batch, widths and clock."""
        size = f" of {self.job.image_size}x{self.job.image_size}" if self.job.image_size else ""
        cast = f", autocast {self.job.autocast}" if self.job.autocast else ""
        cast += ", channels last" if self.job.channels_last else ""
        cast += ", our quantizers compiled" if self.job.compiled else ""
        bits = self.job.bits
        return f"{self.job.model}, batch {self.job.batch}{size}, W{bits}A{bits}{cast}, {self.clock}"

    def base(self) -> StepEntry | None:
        """The float model's entry, where it was measured."""
        return next((entry for entry in self.entries if entry.name == FLOAT and entry.measured), None)

    def ratio(self, entry: StepEntry) -> Spread | None:
        """Times the float step, each round against float's burst in the same round: median and quartiles."""
        base = self.base()
        if base is None or not entry.measured:
            return None
        return spread([own / other for own, other in zip(entry.rounds, base.rounds, strict=True)])

    def memory_ratio(self, entry: StepEntry) -> float | None:
        """Times the float step's peak memory."""
        base = self.base()
        return entry.peak / base.peak if base and base.peak and entry.measured else None

    def to_json(self) -> dict[str, Any]:
        """All of it, medians and ratios included."""
        return {
            "job": asdict(self.job),
            "settings": asdict(self.settings),
            "clock": self.clock,
            "weights": "random",
            "machine": self.machine,
            "contenders": [self._row(entry) for entry in self.entries],
        }

    def _row(self, entry: StepEntry) -> dict[str, Any]:
        row: dict[str, Any] = {"name": entry.name, "failed": entry.failed}
        if entry.measured:
            row |= {f"{key}_ms": value for key, value in asdict(spread(entry.rounds)).items()}
            ratio = self.ratio(entry)
            row |= {f"{key}_vs_float": value for key, value in asdict(ratio).items()} if ratio else {}
            row |= {"peak_bytes": entry.peak, "peak_vs_float": self.memory_ratio(entry), "rounds_ms": entry.rounds}
        return row

    def table(self) -> Table:
        """For a terminal."""
        table = Table(title=self.title, title_justify="left")
        table.add_column("", no_wrap=True)
        for heading in ("ms", "x float", "quartiles", "images/s", "peak MiB", "x float"):
            table.add_column(heading, justify="right", no_wrap=True)
        for entry in filter(lambda entry: entry.measured, self.entries):
            milliseconds, ratio = statistics.median(entry.rounds), self.ratio(entry)
            table.add_row(
                entry.name,
                digits(milliseconds),
                times(ratio.median if ratio else None),
                f"{ratio.lower:.2f}-{ratio.upper:.2f}" if ratio else "-",
                f"{1000 * self.job.batch / milliseconds:.0f}",
                f"{entry.peak / 2**20:.0f}",
                times(self.memory_ratio(entry)),
            )
        return table

    def remarks(self) -> list[str]:
        """What could not be measured, and why."""
        return [f"{entry.name}: {entry.failed}" for entry in self.entries if entry.failed]
