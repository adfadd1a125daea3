"""What a recipe names, built: the float model, its data, the prepared model, the optimizer."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import fx, nn

from ..data import Data, Loader, expanded, open_data
from ..errors import FxQuantError, UnknownNameError, in_short
from ..prepare import prepare, spread_constant_weights
from ..recipe import Recipe
from ..spec import Rule


def build_model(recipe: Recipe) -> nn.Module:
    """The float timm model of a recipe.

    Raises:
        UnknownNameError: for a name that timm does not have, with the nearest.
        FxQuantError: for options it does not take, or weights that cannot be loaded.
    """
    from .. import timm

    names = timm.list_models()
    if recipe.model.name.split(".")[0] not in names:
        raise UnknownNameError("timm model", recipe.model.name, names)
    section = recipe.model
    pretrained = section.pretrained and section.checkpoint is None
    loads = pretrained or "checkpoint_path" in section.options
    try:
        model = timm.create_model(section.name, pretrained=pretrained, **section.options)
    except Exception as error:  # whatever the model's own code makes of its arguments
        reason = in_short(error)
        if loads and not isinstance(error, (TypeError, ValueError, AssertionError)):
            raise FxQuantError(
                f"the weights of {section.name} cannot be loaded ({reason}). Pretrained ones come over the "
                "network once, where there are any; weights in a file are taken with model.checkpoint = FILE"
            ) from error
        raise FxQuantError(f"timm cannot build {section.name} with {section.options} ({reason})") from error
    if section.checkpoint is not None:
        _load_weights(model, section.name, expanded(section.checkpoint, "model.checkpoint"))
    return model


def _load_weights(model: nn.Module, name: str, path: Path) -> None:
    """Load a file of weights strictly, without running anything that may be in it."""
    from .. import timm

    if not path.is_file():
        raise FxQuantError(f"model.checkpoint = {str(path)!r} is no file; give one with the weights of {name}")
    try:
        timm.load_checkpoint(model, str(path), strict=True, weights_only=True)
    except Exception as error:  # whatever a damaged or foreign file makes the readers stumble over
        raise FxQuantError(
            f"the weights of {name} cannot be loaded from model.checkpoint = {str(path)!r} ({in_short(error)}). "
            "It takes a state dict of the same model, written by torch.save or safetensors"
        ) from error


def make_optimizer(groups: list[dict], name: str) -> torch.optim.Optimizer:
    """timm's optimizer of that name over parameter groups that carry their own lr and weight_decay."""
    from .. import timm

    try:
        return timm.create_optimizer_v2(groups, opt=name, lr=groups[0]["lr"], weight_decay=0.0)
    except (ValueError, AssertionError) as error:
        raise FxQuantError(f"optimizer {name!r} was asked for, which timm does not make: {error}") from None


def bare_model(recipe: Recipe) -> nn.Module:
    """The float model of a recipe without the weights that it begins with: no file, no network. Raises as
    :func:`build_model`."""
    options = {key: value for key, value in recipe.model.options.items() if key != "checkpoint_path"}
    section = recipe.model.model_copy(update={"pretrained": False, "checkpoint": None, "options": options})
    return build_model(recipe.model_copy(update={"model": section}))


def model_and_data(recipe: Recipe) -> tuple[nn.Module, Data]:
    """A recipe's model, without pretrained weights, and its data set, transformed as that model wants it."""
    from .. import timm

    model = bare_model(recipe)
    return model, open_data(**recipe.data.model_dump(), config=timm.resolve_model_data_config(model))


def prepared_with(recipe: Recipe, model: nn.Module, rules: Sequence[Rule], calibration: Loader) -> fx.GraphModule:
    """A recipe's model prepared with these rules, and ranges from ``calibration``."""
    return prepare(model, rules, calibration=calibration, **recipe.quantization.prepare_options)


def prepared_without_data(recipe: Recipe, model: nn.Module, rules: Sequence[Rule], data: Data) -> fx.GraphModule:
    """A recipe's model prepared with these rules: the right structure and no ranges yet, to load a file into.

    ``model`` is one whose weights mean nothing; those that are one number become others.
    """
    spread_constant_weights(model)
    return prepare(model, rules, example_inputs=(data.example,), **recipe.quantization.prepare_options)


def statistics_images(recipe: Recipe, data: Data) -> Iterable:
    """The batches that BatchNorm's statistics are re-estimated from, ``data.plain_batches`` of them; none where the
    recipe leaves the statistics alone.

    They are augmented as in training: weights have learned with the statistics of such images. On CIFAR-10, whose crops
    have black margins, those of plain images cost a float ResNet-20 5.8 points.
    """
    if not recipe.train.reestimate_batch_norm:
        return ()
    return itertools.islice(data.train(recipe.seed), recipe.data.plain_batches)
