"""Shared fixtures. Tests run on the CPU, on small models, with nothing to download."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

import fxquant.timm  # noqa: F401 - makes torchvision importable next to a CPU build of torch

ROOT = Path(__file__).parent.parent
RECIPES = ROOT / "recipes"

settings.register_profile(
    "fxquant", deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)
settings.load_profile("fxquant")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory):
    """A short but real run (mixed widths, residual network, digits): its outcome and its folder."""
    from fxquant.recipe import load_recipe
    from fxquant.train import run

    folder = tmp_path_factory.mktemp("digits_run")
    recipe = load_recipe(RECIPES / "digits_w4a4_nipq.toml", ["float.epochs=6", "train.epochs=4"])
    return run(recipe, folder), folder
