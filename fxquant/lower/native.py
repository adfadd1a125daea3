"""The reference integer graph on torch's own integer kernels (x86, onednn, fbgemm, qnnpack).

Between kernels flow plain uint8 codes. torch's kernels saturate at 8 bits whatever the width, so every one clamps to
the codes of the width that was trained. Every one is also compared with the reference on one real batch as it is
built, because kernels have bugs that ordinary models hit (fbgemm's 16-bit saturation on depthwise convolutions,
onednn's padding of grouped ones): one that is off by more than one code moves to another engine, or stays on the
reference where none is right, and is listed.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import operator
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from ..errors import SpecError
from ..graph import called_module
from ..hardware import has_vnni
from ..integer import Dequantize, IntegerConv2d, IntegerLinear, Quantize, Rescale
from ..prepare import _images, prepared_info
from ..spec import get_backend
from . import kernels
from .kernels import Kernel

_MAX_CODES_OFF = 1
_OTHER_ENGINES = ("onednn", "fbgemm")  # where a layer moves whose kernel is wrong; what they pack runs anywhere


@dataclass(frozen=True)
class LoweredLayer:
    """What became of one operator.

    Attributes:
        name: the reference node whose result it computes.
        kernel: torch's operator, with the engine where it is not the one asked for; or ``reference`` where no kernel
            fits or is right.
        max_code_difference: largest difference of codes on the check batch, given the same input codes.
        share_different: share of codes that differ there.
        reason: why it is not on the engine asked for, if it is not.
        layer: the reference node of the layer's float result, where it computes a layer.
    """

    name: str
    kernel: str
    max_code_difference: int = 0
    share_different: float = 0.0
    reason: str = ""
    layer: str = ""


def lower(reference: fx.GraphModule, backend: str, batch: Tensor) -> fx.GraphModule:
    """See :func:`fxquant.lower`.

    Args:
        reference: from :func:`fxquant.convert`; not modified.
        backend: one of torch's engines.
        batch: on which each kernel is compared with the reference.
    """
    with _kernels(backend):
        return _Lowering(copy.deepcopy(reference), backend, batch).run()


def check_batch(reference: fx.GraphModule, calibration: Iterable | None) -> Tensor:
    """The batch on which kernels are compared with the reference: the first of ``calibration``, or of prepare's data.

    Raises:
        SpecError: where there is neither.
    """
    data = calibration if calibration is not None else prepared_info(reference).calibration
    if data is None:
        raise SpecError("lower needs one batch to check kernels against: pass calibration=loader")
    return next(_images(data))


def require_engine(backend: str) -> None:
    """Raises :class:`SpecError` where this build of torch lacks a backend's engine."""
    if backend not in torch.backends.quantized.supported_engines:
        raise SpecError(
            f"backend {backend!r} was asked for; this build of torch has the engines "
            f"{', '.join(torch.backends.quantized.supported_engines)}"
        )


class _Lowering:
    """Rewrites a copy of the reference graph, node by node."""

    def __init__(self, model: fx.GraphModule, backend: str, batch: Tensor):
        self.model, self.graph, self.backend = model, model.graph, backend
        self.engine = ("onednn" if has_vnni() else "fbgemm") if backend == "x86" else backend
        self.modules = dict(model.named_modules())
        with torch.no_grad():
            recorder = Recorder(model)
            recorder.run(batch)
        self.values = recorder.values
        self.order = {node: index for index, node in enumerate(model.graph.nodes)}
        self.report: list[LoweredLayer] = []

    def run(self) -> fx.GraphModule:
        for node in list(self.graph.nodes):
            module = self._module(node)
            if not node.users:
                continue  # a kernel has taken it in
            if isinstance(module, Rescale):
                self._lower_layer(node, module)
            elif isinstance(module, Quantize):
                self._lower_operator(node, module)
        self.graph.eliminate_dead_code()
        self._free_addends()
        self.model.delete_all_unused_submodules()
        self.graph.lint()
        self.model.recompile()
        self.model.meta["fxquant_lowered"] = self.report
        self.model.meta["fxquant_backend"] = self.backend
        return self.model

    def _module(self, node) -> nn.Module | None:
        return called_module(node, self.modules)

    # ---- what becomes one kernel ------------------------------------------------------------------------------

    def _lower_layer(self, rescale_node: fx.Node, rescale: Rescale) -> None:
        """Quantize -> integer layer -> Rescale, with what follows it up to the next Quantize if a kernel does it."""
        layer_node = rescale_node.args[0]
        entry_node = layer_node.args[0]
        layer, entry = self._module(layer_node), self._module(entry_node)
        operands = layer, entry, rescale
        after = only_user(rescale_node)
        exit_ = self._module(after)
        failed: LoweredLayer | None = None
        done = False
        onednn = functools.partial(_onednn, *operands, input_shape=self.values[entry_node.name].shape)
        if isinstance(exit_, Quantize):
            elsewhere = functools.partial(kernels.QuantizedLayer, *operands, exit_)
            done, failed = self._try(after, (entry_node,), onednn(exit_, elsewhere=elsewhere))
        elif (post := _post_operation(after, exit_)) and not rescale.relu:
            end = only_user(after)
            if isinstance(self._module(end), Quantize):
                done, failed = self._try(end, (entry_node,), onednn(self._module(end), activation=post))
        elif _is_addition(after) and not rescale.relu:
            done, failed = self._lower_addition(rescale_node, after, entry_node, onednn)
        if not done:
            exact = isinstance(after, fx.Node) and after.op == "output" and not isinstance(layer, IntegerConv2d)
            build = _exact_linear(*operands) if exact else onednn()
            done, last = self._try(rescale_node, (entry_node,), build, failed)
            if not done:
                self.report.append(failed or last)
        self.report[-1] = replace(self.report[-1], layer=rescale_node.name)

    def _lower_addition(
        self, rescale_node: fx.Node, add: fx.Node, entry_node: fx.Node, onednn: Callable[..., Callable]
    ) -> tuple[bool, LoweredLayer | None]:
        """A layer that adds a residual before it rounds, with the ReLU after that."""
        other = add.args[1] if add.args[0] is rescale_node else add.args[0]
        addend = self._module(other)
        end = only_user(add)
        relu = end is not None and _is_relu(end, self._module(end))
        end = only_user(end) if relu else end
        exit_ = self._module(end)
        if not (isinstance(addend, Dequantize) and isinstance(exit_, Quantize)):
            return False, None
        if self.values[other.name].shape != self.values[rescale_node.name].shape:
            return False, None  # the kernel does not broadcast
        return self._try(end, (entry_node, other.args[0]), onednn(exit_, addend=addend, relu_after=relu))

    def _lower_operator(self, exit_node: fx.Node, exit_: Quantize) -> None:
        """What lies between a Dequantize and a Quantize: addition (-> ReLU), max pooling, concatenation, nothing."""
        node = exit_node.args[0]
        start = self._module(node)
        if isinstance(start, Dequantize):
            self._try_operator(exit_node, (node.args[0],), lambda _: kernels.Requantize(start, exit_))
            return
        relu = _is_relu(node, start) and len(node.users) == 1
        inner = node.args[0] if relu else node
        ends = [self._module(operand) for operand in inner.all_input_nodes]
        lone = len(inner.users) == 1 and ends and all(isinstance(end, Dequantize) for end in ends)
        codes = tuple(operand.args[0] for operand in inner.all_input_nodes) if lone else ()
        if lone and _is_addition(inner) and len(ends) == 2 and self.engine in ("fbgemm", "qnnpack"):
            self._try_operator(exit_node, codes, lambda _: kernels.QuantizedAdd(*ends, exit_, relu))
        elif lone and not relu and self._on_codes(inner, ends, exit_):
            self._try_operator(exit_node, codes, lambda _: self._code_kernel(inner))
        else:
            self._try_operator(exit_node, (node,), lambda _: kernels.FastQuantize(exit_))

    def _on_codes(self, node: fx.Node, ends: list[Dequantize], exit_: Quantize) -> bool:
        """Whether an operator moves values without changing them, between equal grids, so that codes will do."""
        if not all(kernels._same_grid(end, exit_) for end in ends) or (exit_.quant_min, exit_.quant_max) != (0, 255):
            return False
        return isinstance(self._module(node), nn.MaxPool2d) or node.target is torch.cat

    def _code_kernel(self, node: fx.Node) -> Kernel:
        if node.target is torch.cat:
            parts = node.args[0] if node.args else node.kwargs["tensors"]
            if len(parts) != len(node.all_input_nodes):
                raise RuntimeError("one tensor twice in a concatenation")
            return kernels.Concatenate(node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0))
        return kernels.MaxPool2d(self._module(node))

    # ---- the check --------------------------------------------------------------------------------------------

    def _try_operator(self, *arguments) -> None:
        done, outcome = self._try(*arguments)
        if not done:
            self.report.append(outcome)

    def _try(
        self,
        node: fx.Node,
        inputs: tuple[fx.Node, ...],
        build: Callable[[str], Kernel | None],
        failed: LoweredLayer | None = None,
    ) -> tuple[bool, LoweredLayer | None]:
        """Replace ``node`` by a kernel on ``inputs`` if, given the reference's input, it gives its output.

        Returns whether there was one, and what was wrong with the first that was not; ``failed`` is what was wrong
        with a form of it that was tried before.
        """
        tried: list[str] = []
        for engine in (self.engine, *_OTHER_ENGINES):
            if engine in tried or engine not in torch.backends.quantized.supported_engines:
                continue
            tried.append(engine)
            attempt = self._attempt(node, inputs, build, engine)
            if attempt is None:
                continue
            native, outcome = attempt
            if native is not None:
                break
            failed = failed or outcome
        else:
            return False, failed
        name = f"{node.name}_{self.backend}"
        self.model.add_submodule(name, native)
        with self.graph.inserting_before(node):
            lowered = self.graph.create_node("call_module", name, inputs)
        node.replace_all_uses_with(lowered)
        self.values[lowered.name] = self.values[node.name]
        self.order[lowered] = self.order[node]
        self.modules[name] = self._module(node)  # to what follows it still is the Quantize it replaced
        lowered.meta[REFERENCE] = node.name
        self.report.append(replace(outcome, reason=failed.reason) if failed else outcome)
        return True, None

    def _attempt(
        self, node: fx.Node, inputs: tuple[fx.Node, ...], build: Callable[[str], Kernel | None], engine: str
    ) -> tuple[Kernel | None, LoweredLayer] | None:
        """A kernel of ``engine`` that is right, or None, and what was found; None where it has no such kernel."""
        want = self.values[node.name]
        try:
            with _kernels(engine):
                native = build(engine)
            if native is None:
                return None
            with torch.no_grad():
                got = native(*(self.values[i.name].clone() for i in inputs))
        except (RuntimeError, AttributeError) as error:
            said = str(error).splitlines() or [type(error).__name__]
            return None, LoweredLayer(node.name, "reference", reason=said[0])
        # A float result (the classifier) is compared in units of its own sums, which are integers.
        unit = native.unit if want.is_floating_point() else 1.0
        off = ((got.to(torch.float64) - want.to(torch.float64)) / unit).abs()
        worst, share = round(float(off.max())), float((off > 0.5).double().mean())
        if worst > _MAX_CODES_OFF:
            reason = f"{native.kernel} of {engine} was off by up to {worst} codes in {share:.2%} of them"
            return None, LoweredLayer(node.name, "reference", worst, share, reason)
        kernel = native.kernel if engine == self.engine else f"{native.kernel} of {engine}"
        return native, LoweredLayer(node.name, kernel, worst, share)

    def _free_addends(self) -> None:
        """Let a layer write its sum over the addend where nothing reads that afterwards."""
        order = {node: index for index, node in enumerate(self.graph.nodes)}
        for node in self.graph.nodes:
            kernel = self.model.get_submodule(node.target) if node.op == "call_module" else None
            if not isinstance(kernel, kernels.OnednnLayer) or kernel.add_grid is None:
                continue
            addend = node.args[1]
            owner = self.model.get_submodule(addend.target) if addend.op == "call_module" else None
            fresh = isinstance(owner, Kernel) and not isinstance(owner, kernels.Requantize)
            read_once = node.args[0] is not addend  # a convolution must not write over what it still reads
            kernel.overwrite = fresh and read_once and all(order[user] <= order[node] for user in addend.users)


def _onednn(
    layer: IntegerConv2d | IntegerLinear,
    entry: Quantize,
    rescale: Rescale,
    exit_: Quantize | None = None,
    *,
    elsewhere: Callable[[], Kernel] | None = None,
    **options,
) -> Callable[[str], Kernel | None]:
    """Builds a layer for onednn, whose operators run whatever engine is set, or ``elsewhere`` for another engine."""

    def build(engine: str) -> Kernel | None:
        if engine != "onednn" and elsewhere is None:
            return None
        _require_exact_sums(engine, layer)
        return kernels.OnednnLayer(layer, entry, rescale, exit_, **options) if engine == "onednn" else elsewhere()

    return build


def _exact_linear(layer: IntegerLinear, entry: Quantize, rescale: Rescale) -> Callable[[str], Kernel]:
    """Builds the classifier, by onednn's operator whatever engine is set."""

    def build(engine: str) -> Kernel:
        _require_exact_sums("onednn", layer)
        return kernels.ExactLinear(layer, rescale)

    return build


def _require_exact_sums(engine: str, layer: IntegerConv2d | IntegerLinear) -> None:
    """Raises RuntimeError where sums may saturate on this CPU; images that a kernel is tried on need not show it."""
    if farthest := saturating_sum(layer, engine):
        raise RuntimeError(f"sums of two products, up to {farthest}, saturate at 16 bits without VNNI instructions")


def saturating_sum(layer: IntegerConv2d | IntegerLinear, backend: str) -> int:
    """The largest sum of two products that a layer may have, where a backend would saturate it on this CPU; else 0.

    A :func:`fxquant.prepare` on a CPU without VNNI makes weights narrow enough; a model may come from another.
    """
    if has_vnni() or not get_backend(backend).saturates_without_vnni:
        return 0
    farthest = 2 * int(layer.input_bounds.max()) * int(layer.weight.to(torch.int32).abs().max())
    return farthest if farthest > torch.iinfo(torch.int16).max else 0


def only_user(node: fx.Node | None) -> fx.Node | None:
    return next(iter(node.users)) if node is not None and len(node.users) == 1 else None


def _is_addition(node: fx.Node | None) -> bool:
    is_call = isinstance(node, fx.Node) and node.op == "call_function" and node.target in (operator.add, torch.add)
    return is_call and not node.kwargs and len(node.all_input_nodes) == 2


def _post_operation(node: fx.Node | None, module: nn.Module | None) -> tuple[str, list, str] | None:
    """An activation function as onednn's post-operation: name, scalars, algorithm."""
    target = type(module) if module is not None else node.target if node is not None else None
    if target in (nn.SiLU, F.silu):
        return "swish", [], ""
    if target in (nn.Hardswish, F.hardswish):
        return "hardswish", [], ""
    if target in (nn.GELU, F.gelu):
        return "gelu", [], module.approximate if module is not None else node.kwargs.get("approximate", "none")
    return None


REFERENCE = "fxquant_reference"
"""Key of a lowered node's ``meta``: the name of the reference node whose tensor it computes."""


class Recorder(fx.Interpreter):
    """Runs a graph and keeps every node's tensor, by node name, in ``values``."""

    def __init__(self, model: fx.GraphModule):
        super().__init__(model)
        self.values: dict[str, Tensor] = {}

    def run_node(self, node: fx.Node):
        out = super().run_node(node)
        if isinstance(out, Tensor):
            # A kernel may write over its addend's codes.
            self.values[node.name] = out.clone() if out.dtype == torch.uint8 else out
        return out


@contextlib.contextmanager
def _kernels(backend: str) -> Iterator[None]:
    """torch's quantized engine set to ``backend`` within, without its notices of deprecation."""
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = backend
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=r"torch\.(quantize|_make)_per|.*quantized dtypes")
            yield
    finally:
        torch.backends.quantized.engine = before


def _is_relu(node, module: nn.Module | None) -> bool:
    if isinstance(module, nn.ReLU):
        return True
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in (F.relu, torch.relu)
