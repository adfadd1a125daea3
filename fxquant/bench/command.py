"""What ``fxquant bench`` does: a job, its contenders, their rounds, and the files they leave."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from ..errors import SpecError
from ..files import write_json
from .artefacts import RUN, of_model, of_run
from .contender import contenders
from .machine import machine
from .plot import can_draw, draw
from .result import Result
from .rounds import Settings, measure
from .table import remarks, tables

__all__ = ["Settings", "bench", "numbers", "remarks", "tables", "write"]

_JSON, _PNG = "bench.json", "bench.png"


def numbers(text: str, option: str) -> tuple[int, ...]:
    """``1,16`` as whole numbers.

    Raises:
        SpecError: for something else, naming the option.
    """
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise SpecError(f"{option} {text} was asked for; give whole numbers with commas, such as 1,16") from None


def bench(
    settings: Settings,
    *,
    source: Path | None = None,
    model: str | None = None,
    image_size: int | None = None,
    bits: Sequence[int] = (8, 4),
    backends: Sequence[str] | None = None,
    peers: bool = False,
    watch: Callable[[str], None] = lambda text: None,
) -> Result:
    """Measure a finished run, or a random model, on every backend. What cannot run has a row with its reason.

    Args:
        settings: batch sizes, rounds, threads, clock and seed.
        source: a finished run; the other way is ``model``.
        model: a timm name, at ``image_size`` and each of ``bits``.
        image_size: pixels a side; the model's own when None.
        bits: widths of all layers but the first and the last, which have 8.
        backends: keys of :data:`fxquant.spec.BACKENDS`; all when None.
        peers: also other quantizers, on the same float model.
        watch: told of each step.

    Raises:
        FxQuantError: for a model, run, width or backend that does not exist.
    """
    chosen = contenders(bits, backends, peers=peers, run="run" if source else "")  # names are checked before work
    with tempfile.TemporaryDirectory(prefix="fxquant-bench-") as folder:
        how = {"seed": settings.seed, "threads": settings.threads, "wall": settings.wall}
        if source is not None:
            job, run = of_run(source, Path(folder), **how)
            chosen, built = contenders((), backends, peers=peers, run=run), [RUN]
        else:
            job, run, built = of_model(model, image_size, Path(folder), **how), "", []
        entries = measure(job, chosen, settings, built=built, watch=watch)
    return Result(job.model, job.input_shape, asdict(settings), machine(), entries, run)


def write(result: Result, output: Path | None = None) -> list[str]:
    """Leave ``bench.json`` and, where matplotlib is installed, ``bench.png``; what was written, in words.

    Raises:
        OutputFolderError: where they cannot be written.
    """
    folder = output or Path("runs") / "bench" / (result.run or result.model)
    write_json(folder / _JSON, result.to_json())
    if not can_draw():
        return [f"written to {folder / _JSON}; for a plot as well: pip install 'fxquant[bench]'"]
    draw(result, folder / _PNG)
    return [f"written to {folder / _JSON} and {folder / _PNG}"]
