"""The reference integer graph through torch.export and Inductor, torch's compiler: one program without torch.ao.

The compiler knows an integer layer by its pattern, dequantize -> layer -> quantize in float operators, and puts one of
onednn's kernels in its place. It looks at the 8-bit type of the codes and not at their bounds, so that narrower widths
are clamped in the pattern, by a hardtanh that the kernel takes in. A layer that onednn computes wrongly is no pattern:
it stays on integers as the reference has them.
"""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from dataclasses import replace

import torch
from torch import Tensor, fx, nn
from torch._dynamo.utils import counters
from torch._inductor import config

from .. import _torch_ao
from ..compiler import own_warnings_silenced, require_compiler
from ..errors import FxQuantError, SpecError, in_short
from ..graph import called_module
from ..integer import Dequantize, IntegerConv2d, IntegerLinear, Quantize, Rescale
from . import kernels, native

_KERNELS_FROM = "onednn"
_MATCHERS = {"conv2d": "qconv_weight_prepack_matcher_count", "linear": "qlinear_weight_prepack_matcher_count"}


class InductorModel:
    """A compiled model: images [N, C, H, W] in, logits out. N may change from call to call.

    The first call compiles for its N, one with another N for any N, and one with N = 1 for that: up to a minute each.

    Args:
        reference: from :func:`fxquant.convert`; not modified.
        batch: images, on which each of onednn's kernels is compared with the reference.

    Attributes:
        meta: ``fxquant_lowered`` lists one :class:`fxquant.lower.LoweredLayer` per operator.
    """

    def __init__(self, reference: fx.GraphModule, batch: Tensor):
        batch = batch.to(torch.float32)
        checked = native.lower(reference, _KERNELS_FROM, batch)
        mistaken = _mistaken_layouts(reference, batch[:1])
        self.meta = {"fxquant_lowered": [_compiled(entry, mistaken) for entry in checked.meta["fxquant_lowered"]]}
        sound = {e.layer for e in self.meta["fxquant_lowered"] if e.layer and e.kernel != "reference"}
        graph, self.patterns = decompose(reference, sound)
        example = batch if len(batch) > 1 else batch.repeat(2, 1, 1, 1)  # one image would be taken for a constant
        with torch.no_grad():
            graph(example)  # integer layers decide at their first call how to carry their sums
        program = torch.export.export(graph, (example,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
        self._shape = tuple(batch.shape[1:])
        with own_warnings_silenced():
            self._run = torch.compile(program.module())
        self._known: set[tuple] = set()

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        if tuple(images.shape[1:]) != self._shape:
            raise SpecError(
                f"images of shape {tuple(images.shape)} were given; this model was compiled for [N, "
                f"{', '.join(map(str, self._shape))}]. Lower again with calibration images of that size"
            )
        images = images.to(torch.float32).contiguous()
        # All that torch compiles anew for; what it compiles without freezing has no integer kernels.
        key = len(images), torch.get_num_threads(), torch.is_inference_mode_enabled(), images.is_inference()
        with torch.autocast("cpu", enabled=False):
            return self._run(images) if key in self._known else self._compile(images, key)

    def _compile(self, images: Tensor, key: tuple) -> Tensor:
        before = Counter(counters["inductor"])
        try:
            with config.patch(freezing=True), own_warnings_silenced():
                out = self._run(images)
        except Exception as error:  # whatever a compiler makes of an operator that it does not know
            raise FxQuantError(
                f"Inductor of torch {torch.__version__} cannot compile or run this model ({in_short(error)}); lower "
                "it to another backend, such as x86"
            ) from error
        if not self._known:
            self._say_what_was_not_found(before, len(images) == 1)
        self._known.add(key)
        return out

    def _say_what_was_not_found(self, before: Counter[str], single: bool) -> None:
        for kind, count in self.patterns.items():
            found = counters["inductor"][_MATCHERS[kind]] - before[_MATCHERS[kind]]
            # The product with a single row is no pattern: it is written out as multiplications and sums.
            if found < count and not (single and kind == "linear"):
                warnings.warn(
                    f"Inductor of torch {torch.__version__} put {found} of {count} {kind} layers on integer kernels; "
                    "the others compute the same in float, slowly. From torch 2.15 on its patterns come with torchao",
                    stacklevel=4,
                )


def require_inductor() -> None:
    """Raises :class:`SpecError` where Inductor finds no C++ compiler, or this torch has no onednn."""
    native.require_engine(_KERNELS_FROM)
    require_compiler("backend 'inductor' was asked for")


def decompose(reference: fx.GraphModule, layers: set[str]) -> tuple[fx.GraphModule, Counter[str]]:
    """A copy of a reference graph in the operators whose patterns Inductor knows.

    Args:
        reference: not modified.
        layers: names of the :class:`~fxquant.integer.Rescale` nodes whose layers become patterns.

    Returns:
        The graph, on float images, and how many patterns it has of each kind, conv2d or linear.
    """
    _torch_ao.register_decomposed()
    model = copy.deepcopy(reference)
    writer = _Decomposition(model, layers)
    for node in list(model.graph.nodes):
        writer.rewrite(node)
    model.graph.eliminate_dead_code()
    model.delete_all_unused_submodules()
    model.graph.lint()
    model.recompile()
    return model, writer.patterns


class _Decomposition:
    """Rewrites a graph in place, one node at a time, in the order of execution."""

    def __init__(self, model: fx.GraphModule, layers: set[str]):
        self.model, self.graph, self.layers = model, model.graph, layers
        self.modules = dict(model.named_modules())
        self.patterns: Counter[str] = Counter()
        self.quantizers: dict[fx.Node, Quantize] = {}
        self.clamped: set[fx.Node] = set()
        self.ops = torch.ops.quantized_decomposed

    def _module(self, node) -> nn.Module | None:
        return called_module(node, self.modules)

    def rewrite(self, node: fx.Node) -> None:
        module = self._module(node)
        with self.graph.inserting_before(node):
            if isinstance(module, Quantize):
                bounds = (module.quant_min, module.quant_max, torch.uint8)
                new = self._call(self.ops.quantize_per_tensor.default, node.args[0], *_grid(module), *bounds)
                if module.quant_max < 255 and node.args[0] not in self.clamped:
                    # Behind what a kernel takes in (an activation function, an addition) the bounds would be lost.
                    highest = self._constant(node, "highest", torch.tensor(module.quant_max, dtype=torch.uint8))
                    new = self._call(torch.ops.aten.minimum.default, new, highest)
                self.quantizers[new] = module
            elif isinstance(module, Dequantize):
                new = self._dequantize(node.args[0], module)
            elif isinstance(module, Rescale) and node.name in self.layers:
                new = self._layer(node, module)
            else:
                return
        node.replace_all_uses_with(new)

    def _layer(self, node: fx.Node, rescale: Rescale) -> fx.Node:
        """dequantize -> layer -> activation, between the bounds of the Quantize that follows."""
        layer_node = node.args[0]
        layer, codes = self._module(layer_node), layer_node.args[0]
        entry = self.quantizers[codes]
        sum_scale = rescale.scale.to(torch.float64)
        weight = self._call(
            self.ops.dequantize_per_channel.default,
            self._constant(node, "weight", layer.weight),
            self._constant(node, "scale", (sum_scale / float(entry.scale)).to(torch.float32)),
            self._constant(node, "zero_point", torch.zeros_like(sum_scale, dtype=torch.int64)),
            *(0, -128, 127, torch.int8),
        )
        bias = self._constant(node, "bias", (layer.bias.to(torch.float64) * sum_scale).to(torch.float32))
        operands = self._dequantize(codes, entry), weight, bias
        if isinstance(layer, IntegerConv2d):
            geometry = layer.stride, layer.padding, layer.dilation, layer.groups
            out = self._call(torch.ops.aten.conv2d.default, *operands, *geometry)
            self.patterns["conv2d"] += 1
        else:
            assert isinstance(layer, IntegerLinear)
            out = self._call(torch.ops.aten.linear.default, *operands)
            self.patterns["linear"] += 1
        return self._activation(out, rescale, self._module(native.only_user(node)))

    def _activation(self, out: fx.Node, rescale: Rescale, exit_: nn.Module | None) -> fx.Node:
        if isinstance(exit_, Quantize):
            name, bounds, _ = kernels.bounding_operation(exit_, rescale.relu, rescale.ceiling)
        elif rescale.relu:
            name, bounds = ("relu", []) if rescale.ceiling is None else ("hardtanh", [0.0, rescale.ceiling])
        else:
            return out
        if name == "hardtanh":
            out = self._call(torch.ops.aten.hardtanh.default, out, *bounds)
            if isinstance(exit_, Quantize):
                self.clamped.add(out)
            return out
        return self._call(torch.ops.aten.relu.default, out) if name == "relu" else out

    def _dequantize(self, codes: fx.Node, grid: Quantize | Dequantize) -> fx.Node:
        return self._call(self.ops.dequantize_per_tensor.default, codes, *_grid(grid), 0, 255, torch.uint8)

    def _constant(self, node: fx.Node, kind: str, value: Tensor) -> fx.Node:
        name = f"{node.name}_{kind}"
        self.model.register_buffer(name, value.clone())
        return self.graph.get_attr(name)

    def _call(self, operator, *args) -> fx.Node:
        return self.graph.call_function(operator, args)


def _mistaken_layouts(reference: fx.GraphModule, image: Tensor) -> set[str]:
    """Names of the Rescale nodes of convolutions whose output Inductor of torch 2.13 takes for contiguous.

    It does, when N may vary, where the input is contiguous and channels last at once (of one channel, or one pixel);
    the kernel gives channels last.
    """
    with torch.no_grad():
        recorder = native.Recorder(reference)
        recorder.run(image)
    modules, found = dict(reference.named_modules()), set()
    for node in reference.graph.nodes:
        if not isinstance(called_module(node, modules), Rescale):
            continue
        layer = node.args[0]
        if isinstance(called_module(layer, modules), IntegerConv2d):
            shapes = (recorder.values[n.name].shape for n in (layer.args[0], layer))
            entry_is_both, result_is_both = (shape[1] == 1 or shape[2:].numel() == 1 for shape in shapes)
            if entry_is_both and not result_is_both:
                found.add(node.name)
    return found


def _compiled(entry: native.LoweredLayer, mistaken: set[str]) -> native.LoweredLayer:
    """What becomes of an operator here that has been lowered to onednn.

    A layer stays on the reference where onednn computes it wrongly, not where it only lacks a form that is fused.
    """
    if not entry.layer:
        return replace(entry, kernel="generated", reason="")
    if entry.layer in mistaken:
        return replace(entry, kernel="reference", reason="Inductor mistakes the layout of what it gives")
    wrong = not entry.kernel.startswith("onednn") or " of " in entry.kernel or "off by" in entry.reason
    kernel = "reference" if wrong else entry.kernel.removesuffix(" (sums)")
    return replace(entry, kernel=kernel, reason=entry.reason if wrong else "")


def _grid(quantizer: Quantize | Dequantize) -> tuple[float, int]:
    return float(quantizer.scale), int(quantizer.zero_point)
