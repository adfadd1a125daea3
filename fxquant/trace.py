"""A float module to an FX graph that torch.ao can quantize: canonicalise on a copy, capture, check.

Rewrites are in :mod:`fxquant.canonical`, the tracer in :mod:`fxquant.capture`.
"""

from __future__ import annotations

import copy
import traceback
from pathlib import Path

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from . import canonical
from .capture import Capture, DataDependent
from .errors import TraceError
from .modes import compare_with_training

DIFFERENCE = "fxquant_difference"
"""Key of the graph module's ``meta``: its largest difference from the model, relative to the model's largest output."""

TRAINS_OTHERWISE = "fxquant_trains_otherwise"
"""Key of the graph module's ``meta``: names of submodules that compute in training what the graph does not."""

OPAQUE = "fxquant_opaque"
"""Key of the graph module's ``meta``: what is kept as one float call, submodules and functions, with the reason."""


def trace(model: nn.Module, example_inputs: tuple[Tensor, ...]) -> fx.GraphModule:
    """Capture ``model`` as an FX graph that computes the same; the model itself is left untouched.

    The capture is made in eval mode (a trace bakes ``self.training``); the result is in the model's own mode. A
    submodule whose control flow depends on data is kept as one float call, listed in ``meta[OPAQUE]``.

    Args:
        model: any module that takes image batches and returns one tensor.
        example_inputs: one batch, to capture with and to check the graph against the model.

    Raises:
        TraceError: where Python cannot be captured, with the submodule, file and line; or where the captured graph
            computes something else than the model, on this batch or on one of another size.
    """
    with torch.random.fork_rng():  # passes try modules on random inputs; the caller's numbers stay as they are
        return _trace(model, example_inputs)


def _trace(model: nn.Module, example_inputs: tuple[Tensor, ...]) -> fx.GraphModule:
    training = model.training
    prepared = copy_of(model).eval()
    for rewrite in canonical.MODULE_PASSES:
        rewrite(prepared)
    batches = _two_batches(example_inputs)
    opaque: dict[str, str] = {}
    while True:
        root = copy.deepcopy(prepared)
        tracer = Capture(batches, frozenset(opaque), canonical.is_leaf)
        try:
            graph = tracer.trace(root)
            break
        except Exception as error:
            message = _explain(error, model, tracer.current)
            if not tracer.current or tracer.current in opaque:
                raise TraceError(message) from error
            opaque[tracer.current] = message
    trains_otherwise = compare_with_training(tracer, graph, prepared)
    traced = fx.GraphModule(root, graph, type(model).__name__)
    traced.graph.eliminate_dead_code()
    for rewrite in canonical.GRAPH_PASSES:
        rewrite(traced)
    traced.graph.lint()
    traced.recompile()
    original = copy_of(model).eval()
    traced.meta[DIFFERENCE] = max(_check_same(original, traced, batch) for batch in batches)
    _check_one_image(original, traced, tuple(x[:1] for x in example_inputs))
    traced.meta[TRAINS_OTHERWISE] = trains_otherwise
    traced.meta[OPAQUE] = opaque | canonical.functions_left(traced)
    return traced.train(training)


def copy_of(model: nn.Module) -> nn.Module:
    """A deep copy, tensors without the history of gradients that torch does not copy: weights that pruning or
    ``weight_norm`` has computed, features that a forward keeps."""
    memo = {}
    for module in model.modules():
        for tensor in tree_leaves(vars(module)):
            if isinstance(tensor, Tensor) and not tensor.is_leaf:
                memo[id(tensor)] = tensor.detach().clone()
    return copy.deepcopy(model, memo)


def _two_batches(example_inputs: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The example cut (or repeated) to two images and to five: what differs between them depends on the batch."""

    def of(images: int) -> tuple[Tensor, ...]:
        return tuple(x[torch.arange(images, device=x.device) % len(x)] for x in example_inputs)

    return of(2), of(5)  # with other halves, thirds and fourths, so that these count as dependent too


def _check_same(model: nn.Module, traced: fx.GraphModule, example_inputs: tuple[Tensor, ...]) -> float:
    """The relative difference of the two on a batch; raises where it is more than rounding."""
    with torch.no_grad():
        want = model(*(x.clone() for x in example_inputs))  # a forward may overwrite them
        got = traced(*(x.clone() for x in example_inputs))
    if not isinstance(want, Tensor) or not isinstance(got, Tensor):
        raise TraceError(
            f"the model returns a {type(want).__name__}; fxquant prepares models that return one tensor. "
            "Wrap it in a module that returns the tensor to be trained on"
        )
    if want.shape != got.shape or not torch.allclose(want, got, rtol=1e-4, atol=1e-5, equal_nan=True):
        gap = (want - got).abs().max().item() if want.shape == got.shape else float("inf")
        raise TraceError(
            f"the captured graph differs from the model by up to {gap:.3g} on a batch of {len(example_inputs[0])}: its "
            "forward does what a graph does not capture (a counter, a cache, random numbers, a comparison of the batch "
            "size, writing to a view or by out=, hooks on the model itself, another forward set on the instance)"
        )
    if not want.numel():
        return 0.0  # half of one image
    return float((want - got).abs().max() / want.abs().max().clamp(min=1e-12))


def _check_one_image(model: nn.Module, traced: fx.GraphModule, example_inputs: tuple[Tensor, ...]) -> None:
    """The same on one image, which a forward may tell from others; not where the model itself does not take it."""
    try:
        with torch.no_grad():
            model(*(x.clone() for x in example_inputs))
    except Exception:
        return
    _check_same(model, traced, example_inputs)


def _explain(error: Exception, model: nn.Module, module_name: str) -> str:
    """The message of a TraceError: which submodule, file, line and source could not be captured."""
    torch_home, here = str(Path(torch.__file__).parent), str(Path(__file__).parent)
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith((torch_home, here)) and frame.filename[0] != "<"
    ]
    place = "in code that has no source"
    if frames:
        place = f"at {frames[-1].filename}:{frames[-1].lineno}: {(frames[-1].line or '').strip()}"
    inside = f"submodule {module_name!r} of " if module_name else ""
    dependent = isinstance(error, DataDependent)
    reason = "Control flow there depends on a tensor's values" if dependent else "It failed there"
    return (
        f"{inside}{type(model).__name__} cannot be captured as a graph, {place} ({type(error).__name__}: {error}). "
        f"{reason}; compute it from shapes or constants, or move it out of forward"
    )
