"""Capacity while a model trains: every tensor's, and the cuts, after each epoch, as widths fall."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import fx

from .analyze import analyze
from .errors import CheckpointError
from .files import write_json

CAPACITY = "capacity.json"


class CapacityRecorder:
    """Call it after each epoch: it measures the model and writes what it has so far to the run's folder.

    The file ``capacity.json`` is a list, one entry a call: ``epoch``, what :meth:`fxquant.analyze.Analysis.to_dict`
    says of network and cuts, and of each tensor its width, bits per element and capacity. Where tensorboard is
    installed, the same goes there as scalars, under ``<folder>/tensorboard``.

    Args:
        model: prepared, in training; it stays as it is.
        batches: images to measure on, the same ones each time.
        folder: of the run.
        resumed: entries of earlier epochs are kept; those after the first call's epoch are measured anew.
        max_batches: how many batches to measure on.
    """

    def __init__(
        self, model: fx.GraphModule, batches: Iterable, folder: Path, *, resumed: bool = False, max_batches: int = 1
    ):
        self.model, self.batches, self.folder, self.max_batches = model, batches, folder, max_batches
        self.entries: list[dict[str, Any]] = read_dynamics(folder) if resumed else []
        self._writer = None

    def __call__(self, epoch: int) -> None:
        found = analyze(self.model, self.batches, max_batches=self.max_batches).to_dict()
        tensors = {
            row["name"]: {"bits": row["bits"], "bits_per_element": row["bits_per_element"], "total": row["total"]}
            for row in found.pop("tensors")
        }
        self.entries = [entry for entry in self.entries if entry["epoch"] < epoch]
        self.entries.append({"epoch": epoch, **found, "tensors": tensors})
        write_json(self.folder / CAPACITY, self.entries)
        if self._writer is None and importlib.util.find_spec("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self.folder / "tensorboard"), purge_step=epoch)
        if self._writer is not None:
            self._write_scalars(epoch)

    def _write_scalars(self, epoch: int) -> None:
        entry = self.entries[-1]
        for name, cut in (("network", entry), ("layers", entry["layer_cut"])):
            if cut["bits"] is not None:
                self._writer.add_scalar(f"minimum cut/{name}", cut["bits"], epoch)
        for name, tensor in entry["tensors"].items():
            self._writer.add_scalar(f"capacity/{name}", tensor["total"], epoch)
            self._writer.add_scalar(f"width/{name}", tensor["bits"], epoch)
        self._writer.flush()


def read_dynamics(folder: Path) -> list[dict[str, Any]]:
    """What a recorder left in a run's folder; nothing where there is none.

    Raises:
        CheckpointError: a file that is damaged.
    """
    path = folder / CAPACITY
    if not path.exists():
        return []
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        if not all({"epoch", "bits", "cuts", "layer_cut", "tensors"} <= entry.keys() for entry in entries):
            raise CheckpointError(f"{path} is no record of capacities; remove it")
        return entries
    except (OSError, json.JSONDecodeError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); remove it") from None
