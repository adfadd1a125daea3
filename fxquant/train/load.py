"""A finished run, read back from its files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import fx, nn

from .. import checkpoint
from ..convert import convert, load_tensors
from ..data import Data
from ..errors import CheckpointError
from ..freeze import freeze
from ..lower import packed
from ..recipe import Recipe
from .allocation import rules_of
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
    content, recipe = read_quantized(path)
    done = content["epochs_done"] if content["stage"] == "quantized" else 0
    if done < recipe.train.epochs:
        raise CheckpointError(
            f"the run of {path} has done {done} of {recipe.train.epochs} quantized epochs; finish it with "
            "fxquant run ... --resume"
        )
    float_model, data = model_and_data(recipe)
    model = restored(path, content, recipe, float_model, data)
    freeze(model, recipe.built_budget(), calibration=statistics_images(recipe, data))
    return _loaded(recipe, convert(model), data)


def read_quantized(path: Path) -> tuple[dict[str, Any], Recipe]:
    """The checkpoint of a run that trains quantized, and its recipe.

    Raises:
        CheckpointError: where it cannot be read, or the run trained in float alone.
    """
    content = checkpoint.load_checkpoint(path)
    recipe = checkpoint.stored_recipe(content["recipe"], path)
    if not recipe.quantizes:
        raise CheckpointError(f"the run of {path} trained in float alone; there are no integers in it")
    return content, recipe


def restored(path: Path, content: dict[str, Any], recipe: Recipe, float_model: nn.Module, data: Data) -> fx.GraphModule:
    """The prepared model of a checkpoint, with the rules it was trained with and the weights that ship.

    Raises:
        CheckpointError: where the checkpoint does not fit the model of its recipe.
    """
    model = prepared_without_data(recipe, float_model, rules_of(recipe, content), data)
    kept = content["keeper"]["kept"] or content["model"]
    load_tensors(model, kept, f"{path} does not fit the model of its own recipe ({recipe.model.name})")
    model.meta["fxquant"].calibration = data.plain()
    return model


def _loaded(recipe: Recipe, reference: fx.GraphModule, data: Data) -> LoadedRun:
    reference.meta["fxquant"].calibration = data.plain()
    return LoadedRun(recipe, reference, data)
