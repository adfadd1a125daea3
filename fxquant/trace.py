"""A float module to an FX graph that torch.ao can quantize: canonicalise on a copy, trace, check.

Every pass keeps the names of parameters, so that a float checkpoint loads before and after.
"""

from __future__ import annotations

import copy
import linecache
import operator
import traceback
from pathlib import Path

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from .errors import TraceError

_PURE = {operator.iadd: operator.add, operator.imul: operator.mul, operator.isub: operator.sub}


def trace(model: nn.Module, example_inputs: tuple[Tensor, ...]) -> fx.GraphModule:
    """Capture ``model`` as an FX graph that computes the same; the model itself is left untouched.

    The capture is made in eval mode (a trace bakes ``self.training``); the result is in the model's own mode.

    Args:
        model: any module whose control flow does not depend on the values of its inputs.
        example_inputs: one batch, to check the graph against the model.

    Raises:
        TraceError: where Python cannot be captured, with the submodule, file and line; or where the captured graph
            computes something else than the model.
    """
    training = model.training
    model = copy.deepcopy(model).eval()
    _make_activations_pure(model)
    tracer = _Tracer()
    try:
        graph = tracer.trace(model)
    except Exception as error:
        raise TraceError(_explain(error, model, tracer.current)) from error
    traced = fx.GraphModule(model, graph, type(model).__name__)
    for simplify in (_make_arithmetic_pure, _remove_identities):
        simplify(traced)
    traced.graph.lint()
    traced.recompile()
    _check_same(model, traced, example_inputs)
    return traced.train(training)


class _Tracer(fx.Tracer):
    """Remembers the submodule it is in, for error messages."""

    current: str = ""

    def call_module(self, module, forward, args, kwargs):
        before, self.current = self.current, self.path_of_module(module)
        out = super().call_module(module, forward, args, kwargs)
        self.current = before  # not restored on error: that is where it happened
        return out


def _make_activations_pure(model: nn.Module) -> None:
    """``inplace=True`` off: an in-place ReLU would overwrite what a quantizer still needs (all of timm's CNNs)."""
    for module in model.modules():
        if getattr(module, "inplace", False) is True:
            module.inplace = False


def _make_arithmetic_pure(traced: fx.GraphModule) -> None:
    """``x += shortcut`` to ``x + shortcut`` (timm's ResNets): torch.ao quantizes the pure operator only."""
    for node in traced.graph.nodes:
        if node.op == "call_method" and node.target in ("relu", "relu_"):
            node.op, node.target = "call_function", F.relu
        if node.op == "call_function" and node.target in (torch.relu, torch.relu_):
            node.target = F.relu
        if node.op == "call_function" and node.target in _PURE:
            node.target = _PURE[node.target]


def _remove_identities(traced: fx.GraphModule) -> None:
    """Drop ``nn.Identity`` and ``Dropout(0)`` calls (timm's ``drop_block``, ``aa``): they stand between
    BatchNorm and ReLU and would keep the two from being fused into the convolution."""
    modules = dict(traced.named_modules())
    for node in list(traced.graph.nodes):
        if node.op != "call_module":
            continue
        module = modules[node.target]
        if isinstance(module, nn.Identity) or (isinstance(module, nn.Dropout) and module.p == 0):
            node.replace_all_uses_with(node.args[0])
            traced.graph.erase_node(node)


def _check_same(model: nn.Module, traced: fx.GraphModule, example_inputs: tuple[Tensor, ...]) -> None:
    with torch.no_grad():
        want, got = model(*example_inputs), traced(*example_inputs)
    if not isinstance(want, Tensor) or not isinstance(got, Tensor):
        raise TraceError(
            f"the model returns a {type(want).__name__}; fxquant prepares models that return one tensor. "
            "Wrap it in a module that returns the tensor to be trained on"
        )
    if not torch.allclose(want, got, rtol=1e-4, atol=1e-5, equal_nan=True):
        raise TraceError(
            f"the captured graph differs from the model by up to {(want - got).abs().max().item():.3g}: its forward "
            "depends on state that a graph does not capture (a counter, a cache, random numbers)"
        )


def _explain(error: Exception, model: nn.Module, module_name: str) -> str:
    """The message of a TraceError: which submodule, file, line and source could not be captured."""
    torch_home = str(Path(torch.__file__).parent)
    here = str(Path(__file__))
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith(torch_home) and frame.filename != here and frame.filename[0] != "<"
    ]
    place = "in code that has no source"
    if frames:
        frame = frames[-1]
        source = (frame.line or linecache.getline(frame.filename, frame.lineno)).strip()
        place = f"at {frame.filename}:{frame.lineno}: {source}"
    inside = f"submodule {module_name!r} of " if module_name else ""
    return (
        f"{inside}{type(model).__name__} cannot be captured as a graph, {place} ({error}). Control flow there "
        "depends on a tensor's values; compute it from shapes or constants, or move it out of forward"
    )
