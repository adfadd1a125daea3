"""``fxquant bench accuracy``: runs of several recipes and seeds, and the one table they make.

What is finished in the folder is kept, what was cut is resumed, what is missing is run; the table is made of the
``result.json`` files, so that it can be made again from them alone.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import checkpoint
from ..errors import FxQuantError, ParityError, SpecError, WriteError
from ..files import write_text
from ..recipe import Recipe, RecipeError, load_recipe
from ..report import mean_deviation
from ..spec import get_backend
from ..train import Progress, run

MARKDOWN, CSV = "accuracy.md", "accuracy.csv"


def recipes_of(
    paths: Sequence[Path], seeds: int, overrides: Sequence[str] | None = None, epochs: int | None = None
) -> list[Recipe]:
    """The recipe of each run, of each path ``seeds`` ones: seeds 0, 1, ...

    Args:
        overrides: ``section.key=value``; those of ``[train]`` pass by a recipe that trains in float alone.
        epochs: of the quantized training, or of the float one where a recipe has no other.

    Raises:
        SpecError: for fewer seeds than one, or two recipes of one name.
        RecipeError: as :func:`fxquant.recipe.load_recipe`.
    """
    if seeds < 1:
        raise SpecError(f"--seeds {seeds} was asked for; a row is the mean over at least one")
    loaded = []
    for path in paths:
        changed = _applicable(path, list(overrides or []))
        if epochs is not None:
            changed.append(f"{'train' if load_recipe(path, changed).quantizes else 'float'}.epochs={epochs}")
        loaded += [load_recipe(path, changed, seed) for seed in range(seeds)]
    names = [recipe.name for recipe in loaded if recipe.seed == 0]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise SpecError(f"the recipe {twice[0]!r} was given more than once; a row has a name of its own")
    return loaded


def _applicable(path: Path, overrides: list[str]) -> list[str]:
    of_both = [override for override in overrides if not override.startswith("train.")]
    try:
        return overrides if load_recipe(path, of_both).quantizes else of_both
    except RecipeError:  # one that is whole with all of them alone, or never
        return overrides


def folder_of(recipe: Recipe, output: Path) -> Path:
    """Where a run's files lie: ``OUTPUT/<recipe>/seed<N>``."""
    return output / recipe.name / f"seed{recipe.seed}"


def carry_out(
    recipes: Sequence[Recipe],
    output: Path,
    *,
    progress: Progress | None = None,
    watch: Callable[[str], None] = lambda line: None,
    so_far: Callable[[list[dict[str, Any]]], None] = lambda results: None,
) -> list[dict[str, Any]]:
    """The results of all recipes, in their order: read where there is one, else from a run or the rest of one.

    Args:
        watch: told of each run.
        so_far: given the results up to then after each run. A run that fails does not keep those behind it from theirs.

    Raises:
        CheckpointError: where a folder holds a run of another recipe, before anything is run.
        WriteError: where nothing more can be written.
        FxQuantError: after all others, where runs failed: which, and why.
    """
    begun = [checkpoint.holds_run_of(folder_of(recipe, output), recipe) for recipe in recipes]
    results: list[dict[str, Any]] = []
    failed: list[str] = []
    for recipe, resume in zip(recipes, begun, strict=True):
        folder = folder_of(recipe, output)
        if not (folder / checkpoint.RESULT).exists():
            watch(f"{'going on with' if resume else 'running'} {recipe.name}, seed {recipe.seed}")
            try:
                run(recipe, folder, resume=resume, progress=progress)
            except WriteError:
                raise
            except FxQuantError as error:
                failed.append(f"{recipe.name}, seed {recipe.seed}: {error}")
                watch(failed[-1])
                continue
        results.append(checkpoint.read_result(folder) | {"file_bytes": _file_bytes(folder)})
        so_far(results)
    if failed:
        raise FxQuantError(f"{len(failed)} of {len(recipes)} runs failed. {'. '.join(failed)}")
    return results


def _file_bytes(folder: Path) -> int:
    """Size of what the run ships."""
    shipped = [folder / name for name in (checkpoint.PACKED_MODEL, checkpoint.FLOAT_MODEL)]
    return next(path.stat().st_size for path in shipped if path.exists())


@dataclass(frozen=True)
class Row:
    """One recipe of the table; accuracies in per cent, one value a seed.

    Attributes:
        start: of the float model that the quantized training began with.
        fake_quant: evaluated in float, before scales are frozen.
        reference: of the integers.
        lowered: of the first backend that the recipe lowers to.
        gap: reference less the float recipe of the same model, data set, epochs and seed, where the table has one.
        bops: bit operations an image.
        file_bytes: of ``model.fxq``, or of the float weights.
        exact: whether the reference equals what trained, and every backend agrees with it as far as it must.
    """

    recipe: str
    estimator: str
    weight_bits: float
    activation_bits: float
    epochs: int
    seeds: int
    start: list[float]
    fake_quant: list[float]
    reference: list[float]
    lowered: list[float]
    gap: list[float]
    bops: float | None
    file_bytes: int
    exact: bool


def rows(results: Sequence[dict[str, Any]]) -> list[Row]:
    """One row a recipe, in the order of the results.

    Raises:
        SpecError: two float recipes that the gap could be to.
    """
    floats: dict[tuple, float] = {}
    for result in (result for result in results if result["estimator"] is None):
        if _key(result) in floats:
            raise SpecError(
                f"two float recipes train {result['model']} for {_epochs(result)} epochs from seed {result['seed']}, "
                f"so the gap could be to either; leave one out ({result['recipe']!r}, or the one before it)"
            )
        floats[_key(result)] = result["float_accuracy"]
    groups: dict[str, list[dict]] = {}
    for result in results:
        groups.setdefault(result["recipe"], []).append(result)
    return [_row(recipe, runs, floats) for recipe, runs in groups.items()]


def _key(result: dict[str, Any]) -> tuple:
    """What two runs have in common of which one may stand beside the other; older ones do not say their data."""
    return result["model"], result.get("data"), _epochs(result), result["seed"]


def _epochs(result: dict[str, Any]) -> int:
    return sum(result["epochs"].values())


def _row(recipe: str, runs: list[dict], floats: dict[tuple, float]) -> Row:
    first = runs[0]
    if first["estimator"] is None:
        accuracies = [result["float_accuracy"] for result in runs]
        size = first["file_bytes"]
        return Row(recipe, "float", 32, 32, _epochs(first), len(runs), accuracies, [], [], [], [], None, size, True)
    backend = next(iter(first["lowered"]), None)
    return Row(
        recipe,
        first["estimator"],
        first["mean_weight_bits"],
        first["mean_activation_bits"],
        _epochs(first),
        len(runs),
        [result["float_accuracy"] for result in runs],
        [result["simulated"]["accuracy"] for result in runs],
        [result["reference_accuracy"] for result in runs],
        [result["lowered"][backend]["accuracy"] for result in runs] if backend else [],
        [result["reference_accuracy"] - floats[_key(result)] for result in runs if _key(result) in floats],
        first["bops"],
        max(result["file_bytes"] for result in runs),
        all(_exact(result) for result in runs),
    )


def _exact(result: dict[str, Any]) -> bool:
    agreeing = [
        parity["argmax_agreement"] >= get_backend(backend).agreement for backend, parity in result["lowered"].items()
    ]
    return result["parity"]["reference_equals_fake_quant"] and all(agreeing)


def require_exact(table: Sequence[Row]) -> None:
    """Raises :class:`ParityError` where a run's integers do not compute what was trained."""
    if failed := [row.recipe for row in table if not row.exact]:
        raise ParityError(f"the integers of {', '.join(failed)} do not compute what was trained; see its result.json")


def markdown(table: Sequence[Row]) -> str:
    """The table in Markdown; accuracies and gaps as mean ± standard deviation over seeds."""
    headings = ["recipe", "estimator", "W bits", "A bits", "epochs", "seeds", "float", "fake-quant", "reference"]
    headings += ["lowered", "gap to float", "GBOPs", "kB"]
    lines = [headings, ["---"] * len(headings)]
    for row in table:
        bops = "-" if row.bops is None else f"{row.bops / 1e9:.3f}"
        widths = [f"{row.weight_bits:.2f}", f"{row.activation_bits:.2f}"]
        accuracies = [mean_deviation(v) for v in (row.start, row.fake_quant, row.reference, row.lowered)]
        gap = mean_deviation(row.gap, sign=True)
        lines.append([row.recipe, row.estimator, *widths, str(row.epochs), str(row.seeds), *accuracies, gap, bops])
        lines[-1].append(f"{row.file_bytes / 1000:.1f}")
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"


def comma_separated(table: Sequence[Row]) -> str:
    """The table as CSV, with what each seed reached in full."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(Row.__dataclass_fields__)
    for row in table:
        values = [getattr(row, name) for name in Row.__dataclass_fields__]
        writer.writerow([" ".join(map(str, value)) if isinstance(value, list) else value for value in values])
    return text.getvalue()


def write(table: Sequence[Row], output: Path) -> list[Path]:
    """Leave the table in ``output`` in both forms; returns the files."""
    files = [output / MARKDOWN, output / CSV]
    for path, text in zip(files, (markdown(table), comma_separated(table)), strict=True):
        write_text(path, text)
    return files
