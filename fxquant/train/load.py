"""A finished run, read back from its files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import fx

from .. import checkpoint
from ..convert import convert, load_tensors
from ..data import Data
from ..errors import CheckpointError
from ..freeze import freeze
from ..lower import packed
from ..recipe import Recipe
from .build import model_and_data, prepared_without_data, statistics_images


@dataclass
class LoadedRun:
    """An integer model read back from disk, with the data it is checked on."""

    recipe: Recipe
    reference: fx.GraphModule
    data: Data


def load_run(path: Path) -> LoadedRun:
    """The reference graph of a finished run: from its folder, its ``model.fxq`` or its ``checkpoint.pt``.

    Raises:
        CheckpointError: where the file is missing, damaged, foreign, unfinished, or does not fit its own recipe.
    """
    path = path / checkpoint.PACKED_MODEL if path.is_dir() else path
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; give the folder of a finished run, or a file of it")
    if path.suffix == Path(checkpoint.CHECKPOINT).suffix:
        return _from_checkpoint(path)
    notes = packed.read_notes(path)
    if "recipe" not in notes:
        raise CheckpointError(
            f"{path} was not left by fxquant run, so nothing tells its model and data; load it with fxquant.load"
        )
    recipe = checkpoint.stored_recipe(notes["recipe"], path)
    float_model, data = model_and_data(recipe)
    reference = packed.load(path, float_model)
    return _loaded(recipe, reference, data)


def _from_checkpoint(path: Path) -> LoadedRun:
    content = checkpoint.load_checkpoint(path)
    recipe = checkpoint.stored_recipe(content["recipe"], path)
    if not recipe.quantizes:
        raise CheckpointError(f"the run of {path} trained in float alone; there are no integers in it")
    done = content["epochs_done"] if content["stage"] == "quantized" else 0
    if done < recipe.train.epochs:
        raise CheckpointError(
            f"the run of {path} has done {done} of {recipe.train.epochs} quantized epochs; finish it with "
            "fxquant run ... --resume"
        )
    float_model, data = model_and_data(recipe)
    model = prepared_without_data(recipe, float_model, data)
    load_tensors(
        model,
        content["keeper"]["kept"] or content["model"],
        f"{path} does not fit the model of its own recipe ({recipe.model.name})",
    )
    freeze(model, recipe.built_budget(), calibration=statistics_images(recipe, data))
    return _loaded(recipe, convert(model), data)


def _loaded(recipe: Recipe, reference: fx.GraphModule, data: Data) -> LoadedRun:
    reference.meta["fxquant"].calibration = data.plain()
    return LoadedRun(recipe, reference, data)
