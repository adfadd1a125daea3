"""``fxquant bench accuracy``: runs of several recipes and seeds, and the one table they make.

What is finished in the folder is kept, what was cut is resumed, what is missing is run; the table is made of the
``result.json`` files, so that it can be made again from them alone.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import checkpoint
from ..errors import CheckpointError, FxQuantError, ParityError, SpecError, WriteError
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
        SpecError: for fewer seeds than one, two recipes of one name, or two float ones that the gap could be to.
        RecipeError: as :func:`fxquant.recipe.load_recipe`.
    """
    if seeded := [override for override in overrides or [] if override.split("=")[0].strip() == "seed"]:
        raise SpecError(f"--set {seeded[0]} was asked for; bench accuracy trains the seeds 0 to N - 1 of --seeds N")
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
    _by_training(
        (recipe.name, (recipe.model.name, recipe.data.name, recipe.float_training.epochs, recipe.seed))
        for recipe in loaded
        if not recipe.quantizes
    )
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
        result = checkpoint.read_result(folder)
        if "file_bytes" not in result:
            result["file_bytes"] = _file_bytes(folder)
        results.append(result)
        so_far(results)
    if failed:
        raise FxQuantError(f"{len(failed)} of {len(recipes)} runs failed. {'. '.join(failed)}")
    return results


def _file_bytes(folder: Path) -> int:
    """Size of what a run ships whose result does not say so (one of an older version).

    Raises:
        CheckpointError: where that is gone.
    """
    for name in (checkpoint.PACKED_MODEL, checkpoint.FLOAT_MODEL):
        if (folder / name).exists():
            return (folder / name).stat().st_size
    raise CheckpointError(
        f"{folder} holds neither {checkpoint.PACKED_MODEL} nor {checkpoint.FLOAT_MODEL}, the size of which is in the "
        f"table; remove {checkpoint.RESULT} there and the run is finished anew from its checkpoint"
    )


@dataclass(frozen=True)
class Row:
    """One recipe of the table; accuracies in per cent, and all that is a list has one value a seed.

    Attributes:
        weight_bits, activation_bits: mean widths.
        start: of the float model that the quantized training began with.
        fake_quant: evaluated in float, before scales are frozen.
        reference: of the integers.
        lowered: of the first backend that the recipe lowers to.
        gap: reference less the float recipe of the same model, data set, epochs and seed, where the table has one.
        bops: bit operations an image.
        file_bytes: of ``model.fxq``, or of the float weights; the largest of the seeds.
        computed_in: floating types that the runs trained in.
        exact: whether the reference equals what trained, and every backend agrees with it as far as it must.
    """

    recipe: str
    estimator: str
    weight_bits: list[float]
    activation_bits: list[float]
    epochs: int
    seeds: int
    start: list[float]
    fake_quant: list[float]
    reference: list[float]
    lowered: list[float]
    gap: list[float]
    bops: list[float]
    file_bytes: int
    computed_in: str
    exact: bool


def rows(results: Sequence[dict[str, Any]]) -> list[Row]:
    """One row a recipe, in the order of the results.

    Raises:
        SpecError: two float recipes that the gap could be to.
    """
    alone = {(result["recipe"], _key(result)): result for result in results if result["estimator"] is None}
    floats = {key: alone[name, key]["float_accuracy"] for key, name in _by_training(alone).items()}
    groups: dict[str, list[dict]] = {}
    for result in results:
        groups.setdefault(result["recipe"], []).append(result)
    return [_row(recipe, runs, floats) for recipe, runs in groups.items()]


def _by_training(alone: Iterable[tuple[str, tuple]]) -> dict[tuple, str]:
    """The float recipe of each kind of training: model, data, epochs and seed.

    Raises:
        SpecError: where there are two of one kind.
    """
    found: dict[tuple, str] = {}
    for name, training in alone:
        if training in found:
            model, _, epochs, seed = training
            raise SpecError(
                f"two float recipes train {model} for {epochs} epochs from seed {seed}, so the gap could be to either; "
                f"leave out {found[training]!r} or {name!r}"
            )
        found[training] = name
    return found


def _key(result: dict[str, Any]) -> tuple:
    """What two runs have in common of which one may stand beside the other; older ones do not say their data."""
    return result["model"], result.get("data"), _epochs(result), result["seed"]


def _epochs(result: dict[str, Any]) -> int:
    return sum(result["epochs"].values())


def _row(recipe: str, runs: list[dict], floats: dict[tuple, float]) -> Row:
    first, epochs, seeds = runs[0], _epochs(runs[0]), len(runs)
    starts = [result["float_accuracy"] for result in runs]
    size = max(result["file_bytes"] for result in runs)
    types = ", ".join(dict.fromkeys(_computed_in(result) for result in runs))
    if first["estimator"] is None:
        return Row(recipe, "float", [32.0], [32.0], epochs, seeds, starts, [], [], [], [], [], size, types, True)
    backend = next(iter(first["lowered"]), None)
    return Row(
        recipe,
        first["estimator"],
        [result["mean_weight_bits"] for result in runs],
        [result["mean_activation_bits"] for result in runs],
        epochs,
        seeds,
        starts,
        [result["simulated"]["accuracy"] for result in runs],
        [result["reference_accuracy"] for result in runs],
        [result["lowered"][backend]["accuracy"] for result in runs] if backend else [],
        [result["reference_accuracy"] - floats[_key(result)] for result in runs if _key(result) in floats],
        [result["bops"] for result in runs],
        size,
        types,
        all(_exact(result) for result in runs),
    )


def _computed_in(result: dict[str, Any]) -> str:
    """The type of the last stage; older results do not say theirs."""
    return list(result.get("computed_in", {"": "-"}).values())[-1]


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
    headings += ["lowered", "gap to float", "GBOPs", "kB", "trained in"]
    lines = [headings, ["---"] * len(headings)]
    for row in table:
        widths = [mean_deviation(_one_if_same(bits)) for bits in (row.weight_bits, row.activation_bits)]
        accuracies = [mean_deviation(v) for v in (row.start, row.fake_quant, row.reference, row.lowered)]
        gap = mean_deviation(row.gap, sign=True)
        bops = mean_deviation([bops / 1e9 for bops in _one_if_same(row.bops)], digits=3)
        lines.append([row.recipe, row.estimator, *widths, str(row.epochs), str(row.seeds), *accuracies, gap, bops])
        lines[-1] += [f"{row.file_bytes / 1000:.1f}", row.computed_in]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"


def _one_if_same(values: list[float]) -> list[float]:
    return values[:1] if len(set(values)) == 1 else values


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
