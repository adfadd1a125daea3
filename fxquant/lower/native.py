"""lower(): the reference integer graph on torch's own integer kernels (x86, onednn, fbgemm, qnnpack).

torch's quantized kernels saturate at 8 bits whatever the width, so every lowered operator clamps to the codes of
the width that was trained. Every lowered operator is also compared with the reference on one real batch as it is
built, because kernels have bugs that ordinary models hit (fbgemm's 16-bit saturation on depthwise convolutions,
onednn's padding of grouped ones): one that is off by more than one code moves to another engine, or stays on the
reference where none is right, and is listed.
"""

from __future__ import annotations

import contextlib
import copy
import operator
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from ..errors import SpecError
from ..integer import Dequantize, IntegerConv2d, IntegerLinear, Quantize, Rescale, activate
from ..prepare import _images, prepared_info
from ..spec import get_backend

_MAX_CODES_OFF = 1
_ENGINES = ("onednn", "fbgemm")  # where a layer moves whose kernel is wrong; what they pack runs under any engine


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
    """

    name: str
    kernel: str
    max_code_difference: int = 0
    share_different: float = 0.0
    reason: str = ""


def lower(
    reference: fx.GraphModule, backend: str | None = None, *, calibration: Iterable | None = None
) -> fx.GraphModule:
    """Put a reference integer graph on integer kernels, each checked against the reference as it is built.

    Args:
        reference: from :func:`fxquant.convert`; not modified.
        backend: ``x86``, ``onednn``, ``fbgemm`` or ``qnnpack``; the one named at prepare by default.
        calibration: batches, of which the first is the check; the data given to prepare by default.

    Returns:
        A graph module on float inputs whose ``meta["fxquant_lowered"]`` lists one :class:`LoweredLayer` per
        operator.

    Raises:
        UnknownNameError: unknown backend.
        SpecError: an engine that this build of torch lacks, a backend that reads a file, or no batch to check against.
    """
    info = prepared_info(reference)
    asked = get_backend(backend or info.backend)
    if asked.reads_onnx:
        raise SpecError(
            f"backend {asked.name!r} reads a file: write it with fxquant.export_onnx(reference, path), and run it with "
            "fxquant.OnnxModel(path) or fxquant.OpenVinoModel(path)"
        )
    backend = asked.name
    require_engine(backend)
    data = calibration if calibration is not None else info.calibration
    if data is None:
        raise SpecError("lower needs one batch to check kernels against: pass calibration=loader")
    batch = next(_images(data))
    with _kernels(backend):
        return _Lowering(copy.deepcopy(reference), backend, batch).run()


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
        self.modules = dict(model.named_modules())
        with torch.no_grad():
            recorder = Recorder(model)
            recorder.run(batch)
        self.values = recorder.values
        self.report: list[LoweredLayer] = []

    def run(self) -> fx.GraphModule:
        for node in list(self.graph.nodes):
            module = self._module(node)
            if isinstance(module, Rescale):
                self._lower_layer(node, module)
            elif isinstance(module, Quantize):
                self._lower_operator(node, module)
        self.graph.eliminate_dead_code()
        self.model.delete_all_unused_submodules()
        self.graph.lint()
        self.model.recompile()
        self.model.meta["fxquant_lowered"] = self.report
        self.model.meta["fxquant_backend"] = self.backend
        return self.model

    def _module(self, node) -> nn.Module | None:
        is_call = isinstance(node, fx.Node) and node.op == "call_module"
        return self.modules.get(node.target) if is_call else None

    def _lower_layer(self, rescale_node: fx.Node, rescale: Rescale) -> None:
        """Quantize -> integer layer -> Rescale -> Quantize, on one kernel from codes to codes."""
        layer_node = rescale_node.args[0]
        entry_node = layer_node.args[0]
        layer, entry = self._module(layer_node), self._module(entry_node)
        users = list(rescale_node.users)
        exit_ = self._module(users[0]) if len(users) == 1 else None
        convolution = isinstance(layer, IntegerConv2d)
        if isinstance(exit_, Quantize):
            kernel = _NativeConv2d if convolution else _NativeLinear
            others = [e for e in _ENGINES if e != self.backend and e in torch.backends.quantized.supported_engines]
            self._try(users[0], (entry_node,), lambda: kernel(layer, entry, rescale, exit_), others)
        elif convolution:
            self._try(rescale_node, (entry_node,), lambda: _NativeConv2dToFloat(layer, entry, rescale))
        else:
            self._try(rescale_node, (entry_node,), lambda: _NativeLinearToFloat(layer, rescale))

    def _lower_operator(self, exit_node: fx.Node, exit_: Quantize) -> None:
        """Dequantize -> addition (-> ReLU) or max pooling -> Quantize, on one kernel from codes to codes."""
        node = exit_node.args[0]
        relu = _is_relu(node, self._module(node)) and len(node.users) == 1
        if relu:
            node = node.args[0]
        if not isinstance(node, fx.Node) or len(node.users) != 1:
            return
        if node.op == "call_function" and node.target in (operator.add, torch.add):
            ends = [self._module(arg) for arg in node.args]
            if len(ends) == 2 and not node.kwargs and all(isinstance(end, Dequantize) for end in ends):
                codes = tuple(arg.args[0] for arg in node.args)
                self._try(exit_node, codes, lambda: _NativeAdd(*ends, exit_, relu))
        elif isinstance(self._module(node), nn.MaxPool2d) and not relu:
            end = self._module(node.args[0])
            if isinstance(end, Dequantize) and _same_grid(end, exit_):
                self._try(exit_node, (node.args[0].args[0],), lambda: _NativeMaxPool2d(self._module(node)))

    def _try(
        self,
        node: fx.Node,
        inputs: tuple[fx.Node, ...],
        build: Callable[[], _Kernel],
        other_engines: Sequence[str] = (),
    ) -> None:
        """Replace ``node`` by a kernel on ``inputs`` if, given the reference's input, it gives its output."""
        first: LoweredLayer | None = None
        for engine in (self.backend, *other_engines):
            native, outcome = self._attempt(node, inputs, build, engine)
            first = first or outcome
            if native is not None:
                break
        else:
            self.report.append(first)
            return
        name = f"{node.name}_{self.backend}"
        self.model.add_submodule(name, native)
        with self.graph.inserting_before(node):
            lowered = self.graph.create_node("call_module", name, inputs)
        node.replace_all_uses_with(lowered)
        self.values[lowered.name] = self.values[node.name]
        self.modules[name] = self._module(node)  # to what follows it still is the Quantize it replaced
        lowered.meta[REFERENCE] = node.name
        self.report.append(outcome if outcome is first else replace(outcome, reason=first.reason))

    def _attempt(
        self, node: fx.Node, inputs: tuple[fx.Node, ...], build: Callable[[], _Kernel], engine: str
    ) -> tuple[_Kernel | None, LoweredLayer]:
        """A kernel of ``engine`` that is right, or None; and what was found."""
        want = self.values[node.name]
        try:
            with _kernels(engine):
                native = build()
            with torch.no_grad():
                got = native(*(self.values[i.name] for i in inputs))
        except (RuntimeError, AttributeError) as error:
            return None, LoweredLayer(node.name, "reference", reason=str(error).splitlines()[0])
        # A float result (the classifier) is compared in units of its own sums, which are integers.
        unit = native.unit if want.is_floating_point() else 1.0
        off = ((got.to(torch.float64) - want.to(torch.float64)) / unit).abs()
        worst, share = round(float(off.max())), float((off > 0.5).double().mean())
        if worst > _MAX_CODES_OFF:
            reason = f"{native.kernel} of {engine} was off by up to {worst} codes in {share:.2%} of them"
            return None, LoweredLayer(node.name, "reference", worst, share, reason)
        kernel = native.kernel if engine == self.backend else f"{native.kernel} of {engine}"
        return native, LoweredLayer(node.name, kernel, worst, share)


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
            self.values[node.name] = out
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


def _same_grid(a: Dequantize, b: Quantize) -> bool:
    return bool(a.scale == b.scale) and bool(a.zero_point == b.zero_point)


def _typed(codes: Tensor, scale: float, zero_point: int) -> Tensor:
    """Plain uint8 codes as the quint8 tensor that torch's kernels take."""
    return torch._make_per_tensor_quantized_tensor(codes, scale, zero_point)


class _Kernel(nn.Module):
    """A kernel from codes to codes, clamped to the codes that were trained."""

    kernel: str

    def _take_exit(self, exit_: Quantize) -> None:
        self.out_scale, self.out_zero = float(exit_.scale), int(exit_.zero_point)
        self.bounds = exit_.quant_min, exit_.quant_max

    def _clamp(self, out: Tensor) -> Tensor:
        codes = out.int_repr()
        return codes if self.bounds == (0, 255) else codes.clamp_(*self.bounds)

    def extra_repr(self) -> str:
        return self.kernel


class _NativeLayer(_Kernel):
    def __init__(self, layer, entry: Quantize, rescale: Rescale, exit_: Quantize):
        super().__init__()
        self.in_scale, self.in_zero = float(entry.scale), int(entry.zero_point)
        self._take_exit(exit_)
        if rescale.ceiling is not None:
            # The grid is monotone: the code of the ceiling is the largest that anything below it can have.
            lowest, highest = self.bounds
            self.bounds = lowest, min(highest, int(exit_(exit_.scale.new_tensor([rescale.ceiling]))))
        sum_scale = rescale.scale.to(torch.float64)
        weight = torch._make_per_channel_quantized_tensor(
            layer.weight, sum_scale / self.in_scale, torch.zeros_like(sum_scale, dtype=torch.int64), 0
        )
        bias = (layer.bias.to(torch.float64) * sum_scale).to(torch.float32)
        self.packed = self._pack(layer, weight, bias)
        name = self.kernel + ("_relu" if rescale.relu else "")
        self.kernel = name
        self._op = getattr(torch.ops.quantized, name.removeprefix("quantized."))

    def forward(self, codes: Tensor) -> Tensor:
        x = _typed(codes, self.in_scale, self.in_zero)
        return self._clamp(self._op(x, self.packed, self.out_scale, self.out_zero))


class _NativeConv2d(_NativeLayer):
    kernel = "quantized.conv2d"

    def _pack(self, layer: IntegerConv2d, weight: Tensor, bias: Tensor):
        return torch.ops.quantized.conv2d_prepack(
            weight, bias, layer.stride, layer.padding, layer.dilation, layer.groups
        )


class _NativeLinear(_NativeLayer):
    kernel = "quantized.linear"

    def _pack(self, layer: IntegerLinear, weight: Tensor, bias: Tensor):
        return torch.ops.quantized.linear_prepack(weight, bias)


class _NativeConv2dToFloat(_Kernel):
    """uint8 codes to float32, for a convolution whose result is no integer tensor: before SiLU, GELU, a pooling."""

    kernel = "onednn.qconv_pointwise"

    def __init__(self, layer: IntegerConv2d, entry: Quantize, rescale: Rescale):
        super().__init__()
        self.in_scale, self.in_zero = float(entry.scale), int(entry.zero_point)
        sum_scale = rescale.scale.to(torch.float64)
        self.register_buffer("weight_scale", (sum_scale / self.in_scale).to(torch.float32))
        self.register_buffer("weight_zero", torch.zeros_like(rescale.scale, dtype=torch.int32))
        self.register_buffer("bias", (layer.bias.to(torch.float64) * sum_scale).to(torch.float32))
        self.geometry = layer.stride, layer.padding, layer.dilation, layer.groups
        self.packed = torch.ops.onednn.qconv_prepack(
            layer.weight, self.weight_scale, self.in_scale, self.in_zero, *self.geometry
        )
        self.rescale = rescale

    @property
    def unit(self) -> Tensor:
        """What one unit of the integer sums is worth, per output channel."""
        return self.rescale.scale.to(torch.float64).reshape(-1, 1, 1)

    def forward(self, codes: Tensor) -> Tensor:
        out = torch.ops.onednn.qconv_pointwise(
            codes, self.in_scale, self.in_zero, self.packed, self.weight_scale, self.weight_zero, self.bias,
            *self.geometry, 1.0, 0, torch.float32, "none", [], "",
        )  # fmt: skip
        return activate(out, self.rescale.relu, self.rescale.ceiling)


class _NativeLinearToFloat(_Kernel):
    """uint8 codes to float32 through an exact int32 matrix product: the classifier keeps its full resolution."""

    kernel = "aten._int_mm"

    def __init__(self, layer: IntegerLinear, rescale: Rescale):
        super().__init__()
        weight = layer.weight.to(torch.int32)
        # _int_mm multiplies int8 by int8: uint8 codes are shifted by 128, and the shift is taken out of the bias.
        self.register_buffer("weight", layer.weight.t().contiguous())
        self.register_buffer("bias", layer.bias + (128 - layer.input_zero_point) * weight.sum(1, dtype=torch.int32))
        self.rescale = rescale

    @property
    def unit(self) -> Tensor:
        """What one unit of the integer sums is worth, per output."""
        return self.rescale.scale.to(torch.float64)

    def forward(self, codes: Tensor) -> Tensor:
        shifted = (codes.to(torch.int16) - 128).to(torch.int8)
        sums = torch._int_mm(shifted.reshape(-1, shifted.shape[-1]), self.weight) + self.bias
        return self.rescale(sums.reshape(*codes.shape[:-1], -1))


class _NativeAdd(_Kernel):
    kernel = "quantized.add"

    def __init__(self, left: Dequantize, right: Dequantize, exit_: Quantize, relu: bool):
        super().__init__()
        self.left = float(left.scale), int(left.zero_point)
        self.right = float(right.scale), int(right.zero_point)
        self._take_exit(exit_)
        self.kernel += "_relu" if relu else ""
        self._op = torch.ops.quantized.add_relu if relu else torch.ops.quantized.add

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        operands = _typed(left, *self.left), _typed(right, *self.right)
        return self._clamp(self._op(*operands, self.out_scale, self.out_zero))


class _NativeMaxPool2d(_Kernel):
    """Max pooling of codes, which is that of the values: the grid is monotone."""

    kernel = "quantized.max_pool2d"

    def __init__(self, pool: nn.MaxPool2d):
        super().__init__()
        self.pool = copy.deepcopy(pool)

    def forward(self, codes: Tensor) -> Tensor:
        return self.pool(_typed(codes, 1.0, 0)).int_repr()
