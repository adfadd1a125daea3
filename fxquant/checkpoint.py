"""Files of a run: written whole or not at all, read without executing anything."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from .errors import CheckpointError, OutputFolderError, in_short
from .files import is_partial, remove_partial, write_bytes
from .recipe import Recipe, RecipeError, parse_recipe

CHECKPOINT, PACKED_MODEL, FLOAT_MODEL, ONNX_MODEL, RESULT, RECIPE, RULES = (
    "checkpoint.pt",
    "model.fxq",
    "float.safetensors",
    "model.onnx",
    "result.json",
    "recipe.json",
    "rules.toml",
)

_PATIENCE = 10  # seconds
_CHECKPOINT_FORMAT = "fxquant-checkpoint-1"


@contextlib.contextmanager
def occupied(folder: Path) -> Iterator[None]:
    """Keep other runs out of ``folder``, which need not exist: those of this user that share a temporary folder.

    The system lets go of it when the process ends, however it does.

    Raises:
        OutputFolderError: where another is there; it gets a few seconds to end, as workers of a killed process need.
    """
    try:
        name = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:20]
        user = os.getuid() if hasattr(os, "getuid") else "user"
        lock = FileLock(Path(tempfile.gettempdir()) / f"fxquant-{user}-{name}.lock")
        lock.acquire(timeout=_PATIENCE)
    except Timeout:
        raise OutputFolderError(
            f"another run is in progress in {folder} (it holds {lock.lock_file}); wait until it has ended, or name "
            "another --output"
        ) from None
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a name that is none, no temporary folder
        raise OutputFolderError(
            f"{folder} cannot be used for output, or no temporary file written to hold it: {error}. Name another "
            "--output, or set TMPDIR"
        ) from None
    try:
        yield
    finally:
        lock.release()


def claim_output(folder: Path, resume: bool) -> None:
    """Make sure that ``folder`` can take a run's files; nothing is created yet.

    Temporary files of a run that was killed while it wrote are removed.

    Raises:
        OutputFolderError: where it holds something and ``resume`` was not asked for, or cannot be written.
    """
    try:
        found = sorted(p.name for p in folder.iterdir() if not is_partial(p)) if folder.exists() else []
        if found and not resume:
            raise OutputFolderError(
                f"{folder} is not empty (it holds {', '.join(found[:5])}); pass --resume to go on with the run in "
                "it, or name another --output"
            )
        remove_partial(folder)
    except OSError as error:
        raise OutputFolderError(f"{folder} cannot be used for output: {error.strerror}") from None
    nearest = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise OutputFolderError(f"{folder} cannot be used for output: {nearest} is not a folder that can be written to")


def read_result(folder: Path) -> dict[str, Any]:
    """The ``result.json`` of a finished run.

    Raises:
        CheckpointError: where there is none, or it is damaged.
    """
    path = folder / RESULT
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(result, dict) or not {"recipe", "lowered", "float_accuracy"} <= result.keys():
            raise CheckpointError(f"{path} is no result of fxquant run; give the folder of a finished run")
        return result
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); give the folder of a finished run") from None


def save_checkpoint(folder: Path, recipe: Recipe, state: dict[str, Any]) -> None:
    """Write the state of a run, of tensors and plain values only."""
    content = {"format": _CHECKPOINT_FORMAT, "recipe": recipe.to_json(), **state}
    buffer = io.BytesIO()  # torch.save into a file makes a full disk an error of its own kind, without a number
    torch.save(content, buffer)
    write_bytes(folder / CHECKPOINT, buffer.getbuffer())


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read what :func:`save_checkpoint` wrote.

    Raises:
        CheckpointError: a file that is missing, damaged, or something else.
    """
    try:
        _check_sums(path)
        content = torch.load(path, weights_only=True, map_location="cpu")
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist; nothing can be resumed or lowered from it") from None
    except Exception as error:  # whatever a damaged or foreign file makes the reader stumble over
        raise CheckpointError(
            f"{path} is damaged, or no checkpoint at all ({in_short(error, 120)}); start the run anew in another folder"
        ) from None
    if not isinstance(content, dict) or content.get("format") != _CHECKPOINT_FORMAT or "recipe" not in content:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise CheckpointError(
            f"{path} is no checkpoint of fxquant (format {found!r}, {_CHECKPOINT_FORMAT!r} was expected)"
        )
    return content


def _check_sums(path: Path) -> None:
    """Compare the CRC-32 of every part of torch's archive with its content, which torch.load does not.

    Raises:
        OSError, zipfile.BadZipFile: where it cannot be read, is no archive, or one of its parts has changed.
    """
    with zipfile.ZipFile(path) as archive:
        if (changed := archive.testzip()) is not None:
            raise zipfile.BadZipFile(f"the checksum of its part {changed!r} does not hold")


def checkpoint_for(folder: Path, recipe: Recipe) -> dict[str, Any] | None:
    """The checkpoint to resume from, ``None`` where the run had not got that far.

    Raises:
        CheckpointError: where it is of another recipe, with the keys that differ.
    """
    path, begun = folder / CHECKPOINT, folder / RECIPE
    if not path.exists():
        if not begun.exists():
            if not folder.exists() or not any(folder.iterdir()):
                return None  # cut before it wrote anything
            raise CheckpointError(
                f"--resume was asked for, but {folder} holds no {CHECKPOINT}; name the folder of the run"
            )
        if not _differing_keys(begun.read_bytes(), recipe, begun):
            return None
        raise CheckpointError(f"{folder} was begun with another recipe than the one given; name another --output")
    content = load_checkpoint(path)
    differing = _differing_keys(content["recipe"], recipe, path, but=_BEGAN_WITH)
    if differing:
        raise CheckpointError(
            f"{path} is of another recipe than the one given; it differs in {', '.join(differing)}. Resume with the "
            "same recipe, seed and --set, or name another --output"
        )
    return content


def left_in(folder: Path) -> str:
    """What a run that broke off left to go on from, in words.

    Raises:
        CheckpointError: where its checkpoint cannot be read.
    """
    path = folder / CHECKPOINT
    if not path.exists():
        return f"no epoch was finished, so {folder} holds no checkpoint yet"
    content = load_checkpoint(path)
    recipe = stored_recipe(content["recipe"], path)
    section = recipe.float_training if content["stage"] == "float" else recipe.train
    return f"{path} holds epoch {content['epochs_done']} of {section.epochs} of {content['stage']} training"


def holds_run_of(folder: Path, recipe: Recipe) -> bool:
    """Whether a run of this recipe was begun or finished in ``folder``; not where there is no folder.

    Raises:
        CheckpointError: where it holds a run of another recipe, with the keys that differ.
    """
    begun = folder / RECIPE
    if not begun.exists():
        return False
    if differing := _differing_keys(begun.read_bytes(), recipe, begun):
        raise CheckpointError(
            f"{folder} holds a run of another recipe than the one given; it differs in "
            f"{', '.join(differing)}. Give that recipe and --set again, or name another --output"
        )
    return True


def stored_recipe(text: str, path: Path) -> Recipe:
    """The recipe inside of a file.

    Raises:
        CheckpointError: where this version cannot read it.
    """
    try:
        return parse_recipe(json.loads(text), str(path))
    except (RecipeError, ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f"the recipe stored in {path} cannot be read: {error}") from None


_BEGAN_WITH = ("checkpoint", "pretrained")
"""Keys of the model that say where the weights of a run come from that has a checkpoint of its own by now."""


def _differing_keys(stored: str | bytes, recipe: Recipe, path: Path, but: tuple[str, ...] = ()) -> list[str]:
    """Where two recipes differ in what matters. A key that an older version's recipe lacks has its default.

    Args:
        but: keys of the model that do not matter.

    Raises:
        CheckpointError: where ``stored``, of the file ``path``, is none.
    """
    try:
        with contextlib.suppress(RecipeError):
            stored = parse_recipe(json.loads(stored), "the run").to_json()
        before = _what_matters(stored, but)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"the recipe stored in {path} is damaged ({error!r}); start the run anew in another folder"
        ) from None
    return _differences(before, _what_matters(recipe.to_json(), but))


def _what_matters(recipe: str | bytes, but: tuple[str, ...]) -> dict[str, Any]:
    """A recipe without where its images lie and how they are read, and what it does about a divergence: of a run that
    has come so far, nothing would be different."""
    values = json.loads(recipe)
    values.pop("divergence", None)
    values["model"] = {k: v for k, v in values["model"].items() if k not in but}
    values["data"] = {k: v for k, v in values["data"].items() if k not in ("dir", "cache", "workers")}
    return values


def _differences(before: dict, after: dict, prefix: str = "") -> list[str]:
    out = []
    for key in sorted({*before, *after}):
        a, b = before.get(key), after.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            out += _differences(a, b, f"{prefix}{key}.")
        elif a != b:
            out.append(f"{prefix}{key} ({a!r} there, {b!r} here)")
    return out
