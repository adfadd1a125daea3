"""A bench as a picture; matplotlib is imported here alone, and only when one is drawn."""

from __future__ import annotations

import importlib.util
import io
from pathlib import Path

from ..files import write_bytes
from .contender import ORT
from .result import Result


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def draw(result: Result, path: Path) -> None:
    """Write a PNG: one panel a batch size, one bar a contender, quartiles as whiskers, onnxruntime fp32 as a line.

    Raises:
        OutputFolderError: where it cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [entry for entry in result.entries if any(entry.spread(batch) for batch in result.batches)]
    figure = Figure(figsize=(5.5 * len(result.batches), 1.2 + 0.32 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(result.batches), squeeze=False, sharey=True)[0]
    for panel, batch in zip(panels, result.batches, strict=True):
        for place, entry in enumerate(rows):
            if (own := entry.spread(batch)) is None:
                continue
            whiskers = [[own.median - own.lower], [own.upper - own.median]]
            colour = "#2a6f97" if entry.backend else "#e09f3e" if entry.counterpart else "#8d99ae"
            panel.barh(place, own.median, xerr=whiskers, color=colour, ecolor="#333333", capsize=2)
        base = next((e.spread(batch) for e in rows if e.name == ORT), None)
        if base is not None:
            panel.axvline(base.median, color="#333333", linewidth=0.8, linestyle="--")
        panel.set_yticks(range(len(rows)), [entry.name for entry in rows])
        panel.set_xlabel(f"ms a call, batch {batch}")
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].invert_yaxis()
    figure.suptitle(f"{result.run or result.model}: {result.clock}, median and quartiles", fontsize=10)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=150)
    write_bytes(path, image.getbuffer())
