"""What a model does in training alone: captured once more in training mode, and compared.

A graph is captured in eval mode, where dropout as a function, noise and stochastic depth are off, and would stay off in
training without a word. Dropout can be told from the two captures, and goes on; whatever else differs is named.
"""

from __future__ import annotations

import copy
from difflib import SequenceMatcher
from typing import Any

from torch import fx, nn
from torch.nn import functional as F

from .capture import Capture

DROPS = "fxquant_drops"
"""Key of a node's ``meta``: with what probability a dropout function drops in training."""

DROPOUTS = {
    F.dropout: nn.Dropout,
    F.dropout1d: nn.Dropout1d,
    F.dropout2d: nn.Dropout2d,
    F.dropout3d: nn.Dropout3d,
    F.alpha_dropout: nn.AlphaDropout,
    F.feature_alpha_dropout: nn.FeatureAlphaDropout,
}


def compare_with_training(evaluated: Capture, graph: fx.Graph, model: nn.Module) -> list[str]:
    """Note on every dropout function of ``graph`` how it drops in training.

    Args:
        evaluated: the tracer that captured ``graph`` from ``model`` in eval mode.
        model: not modified.

    Returns:
        The names of the submodules whose own code computes something else in training; ``""`` is the model itself.
    """
    unlike: set[str] = set()
    while True:
        tracer = Capture(evaluated.examples, evaluated.opaque | unlike, evaluated.asked_leaf)
        try:
            trained = tracer.trace(copy.deepcopy(model).train())
            break
        except Exception:  # what a graph cannot hold in training, it could in eval mode
            if not tracer.current or tracer.current in unlike:
                return [tracer.current]
            unlike.add(tracer.current)
    before, after = _calls(graph, evaluated), _calls(trained, tracer)
    different = sorted(unlike)
    for scope in {**after, **before}:
        if any(f"{scope}.".startswith(f"{name}.") for name in unlike):
            continue
        ours, theirs = before.get(scope, []), after.get(scope, [])
        matcher = SequenceMatcher(None, [_key(node) for node in ours], [_key(node) for node in theirs], autojunk=False)
        for tag, i, until, j, _ in matcher.get_opcodes():
            if tag == "equal":
                for node, twin in zip(ours[i:until], theirs[j:], strict=False):
                    if node.target in DROPOUTS:
                        node.meta[DROPS] = _probability(*twin.args, **twin.kwargs)
            elif scope not in different:
                different.append(scope)
    return different


def _calls(graph: fx.Graph, tracer: Capture) -> dict[str, list[fx.Node]]:
    """The calls of a graph, by the module whose code makes them."""
    found: dict[str, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.op.startswith("call"):
            found.setdefault(tracer.node_name_to_scope[node.name][0], []).append(node)
    return found


def _key(node: fx.Node) -> str:
    """Equal for calls of the same on the same constants."""
    if node.target in DROPOUTS:
        return node.target.__name__
    return f"{node.op} {node.target} {fx.map_arg((node.args, node.kwargs), lambda _: None)}"


def _probability(input: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> float:
    return p if training else 0.0
