"""A bench for a terminal."""

from __future__ import annotations

from collections.abc import Iterator

from rich.table import Table

from .contender import EAGER, ORT
from .result import TOLERANCE, Result


def tables(result: Result) -> Iterator[Table]:
    """One table a batch size, of what was measured."""
    for batch in result.batches:
        sides = "x".join(map(str, result.input_shape))
        table = Table(title=f"{result.run or result.model}, batch {batch} of {sides}, {result.clock}")
        table.title_justify = "left"
        table.add_column("", no_wrap=True)
        for heading in ("MiB", "ms", "quartiles", "x ort fp32", "x eager fp32"):
            table.add_column(heading, justify="right")
        for entry in result.entries:
            if (own := entry.spread(batch)) is None:
                continue
            table.add_row(
                entry.name,
                f"{entry.size / 2**20:.2f}",
                digits(own.median),
                f"{digits(own.lower)}-{digits(own.upper)}",
                times(result.speed(entry, ORT, batch)),
                times(result.speed(entry, EAGER, batch)),
            )
        yield table


def remarks(result: Result) -> list[str]:
    """What the tables do not show: notes, what was not measured and why, peers beside us."""
    lines = [] if result.run else ["weights are random: latency and size do not depend on them"]
    for entry in result.entries:
        notes = [entry.note, *(f"batch {batch}: {note}" for batch, note in entry.batch_notes.items())]
        if entry.failed:
            lines.append(f"{entry.name}: {entry.state}, {entry.failed}")
        elif any(notes):
            lines.append(f"{entry.name}: {', '.join(filter(None, notes))}")
    for row in result.peers():
        verdict = f"MORE than {TOLERANCE - 1:.0%} faster" if row["faster_than_ours"] else "not faster"
        lines.append(
            f"{row['peer']} runs at {row['speed_vs_ours']:.2f} times the speed of {row['ours']}, batch {row['batch']}: "
            f"{verdict}"
        )
    return lines


def digits(milliseconds: float) -> str:
    """Three digits, or all before the point."""
    return f"{milliseconds:.3g}" if milliseconds < 100 else f"{milliseconds:.0f}"


def times(ratio: float | None) -> str:
    """A ratio, or a dash for none."""
    return "-" if ratio is None else f"{ratio:.2f}"
