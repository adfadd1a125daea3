"""analyze(): what each quantized tensor of a model carries, and where the network is narrowest."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import fx

from .capacity import INPUT, WEIGHT, TensorCapacity, measure_capacity
from .cost import qat_layers
from .errors import SpecError
from .mincut import Cut, graph_arcs, minimum_cut, successive_cuts
from .prepare import prepared_info
from .spec import check_count


@dataclass(frozen=True)
class Analysis:
    """Capacities and cuts of a model at one moment.

    Attributes:
        capacities: of every quantized tensor, by name, in the order in which an image meets them.
        cuts: the minimum cut, then the smallest before it, and so on to the image (:func:`successive_cuts`).
        layer_cut: the smallest cut where layers that have 8 bits let everything through: what the low widths limit.
    """

    capacities: dict[str, TensorCapacity]
    cuts: list[Cut]
    layer_cut: Cut

    @property
    def bits(self) -> float:
        """Capacity of the network: the value of its minimum cut, bits per image."""
        return self.cuts[0].bits

    @property
    def bottleneck(self) -> Cut | None:
        """The smallest cut with a tensor that could be wider (it has less than the 8 bits, or what the backend's
        kernels compute rightly), if one is smaller than what reaches it from the image."""
        narrow = (c for c in self.cuts if any(self.capacities[t].narrow for t in c.tensors))
        return next(narrow, None)

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return {
            "bits": _plain(self.bits),
            "cuts": [{"bits": _plain(cut.bits), "tensors": list(cut.tensors)} for cut in self.cuts],
            "layer_cut": {"bits": _plain(self.layer_cut.bits), "tensors": list(self.layer_cut.tensors)},
            "tensors": [dataclasses.asdict(t) | {"total": t.total} for t in self.capacities.values()],
        }


def analyze(model: fx.GraphModule, batches: Iterable | None = None, *, max_batches: int = 4) -> Analysis:
    """Measure a prepared model on images, with the widths and ranges that it has now.

    Args:
        model: from :func:`fxquant.prepare`; trained or not, frozen or not. It stays as it is.
        batches: image tensors, or tuples that begin with one; the calibration data of ``prepare`` when not given.
        max_batches: how many of them to use.

    Raises:
        SpecError: a model that prepare() did not make, has no ranges, or no images to measure on.
        EmptyDataError: where there is no batch.
    """
    batches = prepared_info(model).calibration if batches is None else batches
    if batches is None:
        raise SpecError("capacity is measured on images; give analyze batches=...")
    check_count(max_batches, "max_batches")
    found = measure_capacity(model, batches, max_batches)
    arcs = graph_arcs(model, found)
    bits = {name: tensor.total for name, tensor in found.items()}
    return Analysis(found, successive_cuts(arcs, bits), cut_of_layers(model, found))


def cut_of_layers(model: fx.GraphModule, found: dict[str, TensorCapacity]) -> Cut:
    """The smallest cut where layers at full width in and out are unlimited; the tensors between layers count."""
    wide = {
        f"{name}.{kind}"
        for name in qat_layers(model)
        for kind in (INPUT, WEIGHT)
        if not any(found[t].narrow for t in (f"{name}.{INPUT}", f"{name}.{WEIGHT}") if t in found)
    }
    return minimum_cut(graph_arcs(model, found), {n: t.total for n, t in found.items() if n not in wide})


def _plain(value: float) -> float | None:
    """JSON has no infinity."""
    return value if math.isfinite(value) else None
