"""The bottleneck of a quantized network: the minimum cut of its graph, from the image to the output.

Every node of the FX graph hands on what it has; what is quantized hands on its capacity (:mod:`fxquant.capacity`) at
most. A set of quantized tensors that every path from input to output runs through is a cut; its capacities add up, for
a residual branch carries beside its shortcut, and each part of a concatenation beside the others. No more than the
smallest such sum gets through: by the max-flow min-cut theorem (Ford and Fulkerson, 1956) that is the largest flow in
the network of the same capacities. A tensor that several nodes read is one arc before it fans out, so that cutting it
costs its capacity once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import fx

from .capacity import INPUT, WEIGHT, edge_name

SOURCE, SINK = "<image>", "<output>"

# Flows are counted in whole 2^-20 bits: sums of integers are exact, and so is the algorithm on them.
_UNIT = 2**20


@dataclass(frozen=True)
class Arc:
    """A directed arc; one of a quantized tensor bears its name, any other lets everything through."""

    tail: str
    head: str
    tensor: str | None = None


@dataclass(frozen=True)
class Cut:
    """A cut of smallest capacity.

    Attributes:
        bits: its value, bits per image; infinite where nothing between the two ends is quantized.
        tensors: the quantized tensors in it, in the order of the graph.
        entered: the vertices at which its arcs begin; cut off these to find what limits the part before.
    """

    bits: float
    tensors: tuple[str, ...]
    entered: frozenset[str] = frozenset()

    @property
    def layers(self) -> tuple[str, ...]:
        """The layers whose inputs or weights are in the cut."""
        names = (t.rsplit(".", 1) for t in self.tensors)
        return tuple(dict.fromkeys(parts[0] for parts in names if parts[-1] in (INPUT, WEIGHT)))


def graph_arcs(model: fx.GraphModule, tensors: Iterable[str]) -> list[Arc]:
    """The flow network of a prepared model's graph.

    Args:
        model: from :func:`fxquant.prepare`.
        tensors: names of those that are quantized, as :func:`fxquant.capacity.measure_capacity` gives them.

    Returns:
        Arcs from :data:`SOURCE` to :data:`SINK`. A layer's node is a path of two: its input, then its weight.
    """
    known = set(tensors)
    arcs: list[Arc] = []
    for node in model.graph.nodes:
        if node.op == "placeholder":
            arcs.append(Arc(SOURCE, node.name))
            continue
        if node.op == "output":
            arcs += [Arc(parent.name, SINK) for parent in node.all_input_nodes]
            continue
        inside = []
        if node.op == "call_module":
            names = (f"{node.target}.{INPUT}", f"{node.target}.{WEIGHT}", edge_name(node))
            inside = [name for name in names if name in known]
        entry = f"{node.name}:in" if inside else node.name
        arcs += [Arc(parent.name, entry) for parent in node.all_input_nodes]
        tail = entry
        for position, tensor in enumerate(inside, 1):
            head = node.name if position == len(inside) else f"{node.name}:{position}"
            arcs.append(Arc(tail, head, tensor))
            tail = head
    return arcs


def minimum_cut(arcs: Iterable[Arc], capacities: Mapping[str, float], sinks: Iterable[str] = (SINK,)) -> Cut:
    """The smallest cut between :data:`SOURCE` and ``sinks``; of several, the one nearest to the image.

    Args:
        arcs: of the network.
        capacities: bits per image of each tensor that an arc names; one that is missing is unlimited.
        sinks: vertices to be cut off.
    """
    import networkx as nx

    arcs = list(arcs)
    network, end = nx.DiGraph(), object()
    # Reversed, because networkx returns the cut that is nearest to where the flow ends.
    for arc in arcs:
        bits = capacities.get(arc.tensor, math.inf) if arc.tensor is not None else math.inf
        limit = {} if math.isinf(bits) else {"capacity": round(bits * _UNIT)}
        network.add_edge(arc.head, arc.tail, **limit)
    for sink in sinks:
        network.add_edge(end, sink)
    network.add_node(SOURCE)
    try:
        _, (near, far) = nx.minimum_cut(network, end, SOURCE)
    except nx.NetworkXUnbounded:
        return Cut(math.inf, ())
    crossed = [a for a in arcs if a.tail in far and a.head in near and a.tensor is not None]
    tensors = tuple(arc.tensor for arc in crossed)
    return Cut(sum(capacities[tensor] for tensor in tensors), tensors, frozenset(arc.tail for arc in crossed))


def successive_cuts(arcs: Iterable[Arc], capacities: Mapping[str, float]) -> list[Cut]:
    """The minimum cut, then the smallest of what lies before it, and so on to the image; values rise.

    A classifier's last tensors are few, so that they are the minimum cut of almost any network, at any width. What
    limits the features before them is the next one.
    """
    arcs = list(arcs)
    cuts: list[Cut] = []
    sinks = frozenset({SINK})
    while True:
        cut = minimum_cut(arcs, capacities, sinks)
        if math.isinf(cut.bits) or not cut.tensors:
            return cuts or [cut]
        cuts.append(cut)
        sinks = cut.entered
