"""Models, each taken through the stages in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from ..errors import CheckpointError, FxQuantError, in_short
from ..synthetic import random_images, settled
from . import ours, plain
from .row import STAGES, Row, append, begin, read
from .spending import Spending

_SECONDS_PER_MODEL = 900
WAYS = {"fxquant": ours.stages, "torch.ao": plain.stages}
"""What a model can be taken through."""


def cover_model(name: str, input_size: int, bits: int, way: str = "fxquant") -> Row:
    """Take one timm model, randomly initialised, through every stage; an error ends up in the row."""
    from .. import timm

    row = Row(name, input_size, bits)
    spending = Spending(row)
    started = time.perf_counter()
    try:
        torch.manual_seed(0)
        images = random_images(input_size)
        model = settled(timm.create_model(name, pretrained=False), images)
        row.parameters_m = round(sum(p.numel() for p in model.parameters()) / 1e6, 2)
        row.stages = 1
        for _ in WAYS[way](spending, model, images):
            row.stages += 1
    except Exception as error:
        row.failed = f"{STAGES[row.stages]}: {in_short(error)}"
    row.seconds = round(time.perf_counter() - started, 1)
    return row


def read_models(path: Path) -> list[tuple[str, int]]:
    """Lines of ``name input_size``; ``#`` begins a comment.

    Raises:
        FxQuantError: for a file that cannot be read, and a line that is something else.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FxQuantError(
            f"{path} cannot be read ({in_short(error)}); --models takes lines of 'model input_size'"
        ) from None
    models = []
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split("#")[0].split()
        if not words:
            continue
        if len(words) != 2 or not words[1].isdigit():
            raise FxQuantError(f"{path}:{number}: {line!r} is not 'model input_size', such as 'resnet18 224'")
        models.append((words[0], int(words[1])))
    return models


def cover(
    models: list[tuple[str, int]],
    bits: int,
    output: Path,
    *,
    resume: bool,
    watch: Callable[[Row], None],
    way: str = "fxquant",
) -> list[Row]:
    """Cover all models, each in its own process, so that a crash costs one row. Appends to ``output`` as it goes.

    Args:
        models: (name, input size).
        bits: width of all layers but the first and the last.
        output: CSV file, one row a model.
        resume: keep the rows that are there and do the rest.
        watch: called with each row.
        way: one of :data:`WAYS`.

    Raises:
        CheckpointError: for an ``output`` that holds rows, if they are not to be kept, or something else.
    """
    done = {(row.model, row.input_size, row.bits): row for row in read(output)} if output.exists() else {}
    if done and not resume:
        raise CheckpointError(
            f"{output} holds {len(done)} rows; pass --resume to keep them and do the rest, or name another --output"
        )
    if not done:
        begin(output)
    rows = []
    for name, size in models:
        row = done.get((name, size, bits))
        if row is None:
            row = _in_a_process(name, size, bits, way)
            append(output, row)
        watch(row)
        rows.append(row)
    return rows


def _in_a_process(name: str, size: int, bits: int, way: str) -> Row:
    command = [sys.executable, "-m", "fxquant.coverage", name, str(size), str(bits), way]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS_PER_MODEL, check=False)
        return Row(**json.loads(done.stdout.splitlines()[-1]))
    except subprocess.TimeoutExpired:
        return Row(name, size, bits, failed=f"took more than {_SECONDS_PER_MODEL} s")
    except (IndexError, ValueError, TypeError):
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return Row(name, size, bits, failed=f"its process ended with status {done.returncode}: {last[:200]}")
