"""Shared fixtures. Tests run on the CPU, on small models, with nothing to download."""

from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from PIL import Image

import fxquant.timm  # noqa: F401 - makes torchvision importable next to a CPU build of torch

ROOT = Path(__file__).parent.parent
RECIPES = ROOT / "recipes"
SHARED = ROOT.parent / "shared"  # data and checkpoints that lie beside the repository on some machines


def needs_shared(*files: str) -> pytest.MarkDecorator:
    """Skips a test where one of these files of the folder ``shared`` beside the repository is not there."""
    missing = [name for name in files if not (SHARED / name).is_file()]
    return pytest.mark.skipif(bool(missing), reason=f"../shared has no {', '.join(missing)}")


settings.register_profile(
    "fxquant", deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)
settings.load_profile("fxquant")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def with_vnni(monkeypatch):
    """Widths as on a CPU with VNNI instructions; kernels are those of this one."""
    say_of_vnni(monkeypatch, True, *_WIDTHS)


@pytest.fixture(scope="module")
def with_vnni_throughout():
    """The same for all tests of a module, and the fixtures that they share."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        say_of_vnni(monkeypatch, True, *_WIDTHS)
        yield


@pytest.fixture
def without_vnni(monkeypatch):
    """Widths, and what is expected of kernels, as on an x86 CPU without VNNI instructions."""
    say_of_vnni(monkeypatch, False, *_WIDTHS, "fxquant.lower.native")


_WIDTHS = "fxquant.prepare", "fxquant.recipe"  # that ask what the CPU at hand has


def say_of_vnni(monkeypatch: pytest.MonkeyPatch, has: bool, *modules: str) -> None:
    for module in modules:
        monkeypatch.setattr(importlib.import_module(module), "has_vnni", lambda: has)


@pytest.fixture(scope="session")
def shared() -> Path:
    return SHARED


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory):
    """A short but real run (mixed widths, residual network, digits): its outcome and its folder."""
    from fxquant.recipe import load_recipe
    from fxquant.train import run

    folder = tmp_path_factory.mktemp("digits_run")
    recipe = load_recipe(RECIPES / "digits_w4a4_nipq.toml", ["float.epochs=6", "train.epochs=4"])
    return run(recipe, folder), folder


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
    """Generated images in the layout of ImageNet: 14 to train on and 6 held out, in three classes told by colour."""
    root, drawn = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, counts in (("train", (5, 5, 4)), ("validation", (2, 2, 2))):
        for label, count in zip("abc", counts, strict=True):
            (root / split / label).mkdir(parents=True)
            for index in range(count):
                pixels = drawn.integers(0, 128, (40, 48, 3), dtype=np.uint8)
                pixels[..., "abc".index(label)] += 100
                Image.fromarray(pixels).save(root / split / label / f"{index}.png")
    return root
