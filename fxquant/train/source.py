"""What ``fxquant analyze`` opens: a recipe with float weights, or a run, as a model that is prepared and not frozen."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import fx, nn

from .. import checkpoint
from ..data import Data
from ..errors import CheckpointError, FxQuantError
from ..recipe import Recipe, load_recipe
from ..spec import Rule
from .allocation import rules_of
from .build import build_model, model_and_data, prepared_with
from .load import read_quantized, restored
from .processes import seed_everything


@dataclass
class Source:
    """What there is to analyse: a recipe, its float model, the quantized one, its rules and its data."""

    recipe: Recipe
    float_model: nn.Module
    model: fx.GraphModule
    rules: list[Rule]
    data: Data


def open_source(path: Path, overrides: list[str] | None = None) -> Source:
    """A prepared model, not frozen: of a run (its folder, or its ``checkpoint.pt``), or of a recipe with float weights.

    Raises:
        FxQuantError: a recipe that trains its float model first, overrides for a run, whatever cannot be read.
    """
    if path.suffix == ".toml":
        return _of_recipe(path, overrides)
    if overrides:
        raise FxQuantError(f"--set {overrides[0]} changes a recipe, but {path} is a run; leave it out")
    return _of_run(path / checkpoint.CHECKPOINT if path.is_dir() else path)


def _of_recipe(path: Path, overrides: list[str] | None) -> Source:
    recipe = load_recipe(path, overrides)
    if not recipe.quantizes:
        raise FxQuantError(f"{path} trains in float alone, so nothing in it is quantized; give a recipe with [[rules]]")
    if recipe.float_training.epochs:
        raise FxQuantError(
            f"{path} trains its float model first (float.epochs = {recipe.float_training.epochs}), so there are no "
            "weights to analyse yet; run it, and give the run's folder"
        )
    _, data = model_and_data(recipe)
    seed_everything(recipe.seed)
    float_model = build_model(recipe).eval()
    rules = recipe.built_rules()
    return Source(recipe, float_model, prepared_with(recipe, float_model, rules, data.plain()), rules, data)


def _of_run(path: Path) -> Source:
    content, recipe = read_quantized(path)
    if content["stage"] != "quantized":
        raise CheckpointError(
            f"the run of {path} has not begun to train quantized; finish it with fxquant run --resume"
        )
    float_model, data = model_and_data(recipe)
    model = restored(path, content, recipe, float_model, data)
    float_model.load_state_dict(content["float_model"])
    return Source(recipe, float_model.eval(), model, rules_of(recipe, content), data)
