"""torch's integer kernels as modules from codes to codes, clamped to the codes of the width that was trained.

Two families, one interface. The onednn operators take and give plain uint8 tensors, clamp in their own post-operation
and add a residual before they round. The operators of ``torch.ops.quantized`` (fbgemm, qnnpack) want torch's quint8
tensors, which are made of and read back as plain uint8 around each call.
"""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..integer import Dequantize, IntegerConv2d, IntegerLinear, Quantize, Rescale, activate

# Adding 1.5 * 2^23 to a float32 below 2^22 leaves its nearest integer, ties to even, in the low bits.
_ROUNDING = 1.5 * 2**23


class Kernel(nn.Module):
    """One operator on the backend.

    Attributes:
        kernel: torch's operator, as the table of a lowering shows it.
        unit: of a float result, what one unit of the integer sums is worth, per output channel.
    """

    kernel: str
    unit: Tensor | float = 1.0

    def extra_repr(self) -> str:
        return self.kernel


def _copy_but_packed(kernel: Kernel, memo: dict) -> Kernel:
    """``__deepcopy__``: torch cannot copy a packed weight; nothing writes to it, so copies share it."""
    memo[id(kernel.packed)] = kernel.packed
    twin = memo[id(kernel)] = type(kernel).__new__(type(kernel))
    twin.__dict__ = copy.deepcopy(kernel.__dict__, memo)
    return twin


# ---- onednn, on plain uint8 -------------------------------------------------------------------------------


class OnednnLayer(Kernel):
    """A convolution or a linear layer: uint8 codes to uint8 codes, or to float32 where ``exit_`` is None.

    Args:
        layer, entry, rescale: of the reference graph.
        exit_: the grid of the result; None leaves it float32.
        activation: a post-operation besides ReLU, as (name, scalars, algorithm) of the operator.
        addend: grid of the codes that are added before rounding, the second argument of ``forward``.
        relu_after: ReLU after that addition.
        overwrite: whether the addend's memory may take the result.
        input_shape: of a convolution's input, for which its weight is laid out. Any other is computed rightly too, but
            may have the weight laid out anew in every call.

    Raises:
        RuntimeError: for a convolution that onednn reads beyond its input for.
    """

    def __init__(
        self,
        layer: IntegerConv2d | IntegerLinear,
        entry: Quantize,
        rescale: Rescale,
        exit_: Quantize | None = None,
        *,
        activation: tuple[str, list, str] | None = None,
        addend: Dequantize | None = None,
        relu_after: bool = False,
        overwrite: bool = False,
        input_shape: tuple[int, ...] | None = None,
    ):
        super().__init__()
        self.in_grid = float(entry.scale), int(entry.zero_point)
        self.overwrite = overwrite
        self.pointwise = isinstance(layer, IntegerConv2d) and self._is_matrix_product(layer)
        self.convolution = isinstance(layer, IntegerConv2d) and not self.pointwise
        self.kernel = "onednn.qconv_pointwise" if self.convolution else "onednn.qlinear_pointwise"
        sum_scale = rescale.scale.to(torch.float64)
        self.register_buffer("weight_scale", (sum_scale / self.in_grid[0]).to(torch.float32))
        self.register_buffer("weight_zero", torch.zeros_like(rescale.scale, dtype=torch.int32))
        self.register_buffer("bias", (layer.bias.to(torch.float64) * sum_scale).to(torch.float32))
        self.geometry = (layer.stride, layer.padding, layer.dilation, layer.groups) if self.convolution else ()
        self.packed = self._pack(layer.weight, input_shape)
        self.unit = sum_scale.reshape(-1, 1, 1) if isinstance(layer, IntegerConv2d) else sum_scale
        self.add_grid = None if addend is None else (float(addend.scale), int(addend.zero_point))
        relu = rescale.relu or relu_after
        self.bounds, self.finish = None, None
        if exit_ is None:
            self.result = (1.0, 0, torch.float32)
            self.post = ("none", [], "")
            self.finish = (relu, rescale.ceiling) if relu else None
        else:
            self.result = (float(exit_.scale), int(exit_.zero_point), torch.uint8)
            self.post = activation or bounding_operation(exit_, relu, rescale.ceiling)
            if activation is not None:
                self.bounds = (exit_.quant_min, exit_.quant_max)
        if self.bounds == (0, 255):
            self.bounds = None
        self.kernel += "".join(f" + {part}" for part in (addend is not None and "sum", self._post_name()) if part)

    def _post_name(self) -> str:
        return "" if self.post[0] == "none" else self.post[0]

    __deepcopy__ = _copy_but_packed

    def _is_matrix_product(self, layer: IntegerConv2d) -> bool:
        """Whether to run a 1x1 convolution as a matrix product over channels_last pixels.

        That is done where the input has a zero-point: torch's convolution then lays the weight out anew in each call.
        """
        geometry = layer.weight.shape[2:], tuple(layer.stride), tuple(layer.padding), layer.groups
        return self.in_grid[1] != 0 and geometry == ((1, 1), (1, 1), (0, 0), 1)

    def _pack(self, weight: Tensor, input_shape: tuple[int, ...] | None) -> Tensor:
        if self.convolution:
            _require_within_input(weight, self.geometry, input_shape)
            grid_and_geometry = (self.weight_scale, *self.in_grid, *self.geometry)
            return torch.ops.onednn.qconv_prepack(weight, *grid_and_geometry, input_shape)
        return torch.ops.onednn.qlinear_prepack(weight.flatten(1), None)

    def forward(self, codes: Tensor, addend: Tensor | None = None) -> Tensor:
        if not self.pointwise:
            return self._forward(codes, addend)
        pixels = [None if x is None else _channels_last(x).permute(0, 2, 3, 1) for x in (codes, addend)]
        return self._forward(*pixels).permute(0, 3, 1, 2)

    def _forward(self, codes: Tensor, addend: Tensor | None) -> Tensor:
        weight = (self.packed, self.weight_scale, self.weight_zero)
        if addend is None:
            if self.convolution:
                out = torch.ops.onednn.qconv_pointwise.default(
                    codes, *self.in_grid, *weight, self.bias, *self.geometry, *self.result, *self.post
                )
            else:
                out = torch.ops.onednn.qlinear_pointwise.default(
                    codes, *self.in_grid, *weight, self.bias, *self.result, *self.post
                )
        else:
            addend = _channels_last(addend) if self.convolution else addend.contiguous()  # torch takes it for that
            if not self.overwrite:
                addend = addend.clone()
            add = (*self.add_grid, "sum", 1.0, *self.post)
            if self.convolution:
                out = torch.ops.onednn.qconv2d_pointwise.binary(
                    codes, *self.in_grid, *weight, addend, self.bias, *self.geometry, *self.result, *add
                )
            else:
                out = torch.ops.onednn.qlinear_pointwise.binary(
                    codes, *self.in_grid, *weight, addend, self.bias, *self.result, *add
                )
        if self.finish is not None:
            out = activate(out, *self.finish)
        return out if self.bounds is None else out.clamp_(*self.bounds)


def _require_within_input(weight: Tensor, geometry: tuple, input_shape: tuple[int, ...] | None) -> None:
    """Raises RuntimeError where onednn of torch 2.13 reads memory beyond the input, with numbers that change from call
    to call, or a crash.

    That is so where one input channel is reduced to a width of one by a stride; and where outputs are of padding alone,
    all of them along an axis, or some with one input channel, with groups or with a dilation. (An odd 1x1 convolution
    with padding is right.)
    """
    if input_shape is None:
        return
    stride, _, dilation, groups = geometry
    axes = [_Axis(*axis) for axis in zip(input_shape[2:], weight.shape[2:], *geometry[:3], strict=True)]
    one_channel = weight.shape[1] == groups == 1
    special = one_channel or groups > 1 or max(dilation) > 1
    in_padding = any((any if special else all)(axis.in_padding()) for axis in axes)
    if in_padding or (one_channel and stride[1] > 1 and len(axes[1].places()) == 1):
        raise RuntimeError("onednn would read beyond the input")


class _Axis(NamedTuple):
    """A convolution along one axis of its input."""

    size: int
    kernel: int
    stride: int
    padding: int
    dilation: int

    def places(self) -> range:
        """Where the first tap of the kernel lies for each output."""
        reach = self.dilation * (self.kernel - 1) + 1
        return range(-self.padding, self.size + self.padding - reach + 1, self.stride)

    def in_padding(self) -> list[bool]:
        """For each output, whether every tap lies in the padding."""
        taps = [tap * self.dilation for tap in range(self.kernel)]
        return [not any(0 <= place + tap < self.size for tap in taps) for place in self.places()]


def bounding_operation(exit_: Quantize, relu: bool, ceiling: float | None) -> tuple[str, list[float], str]:
    """What a kernel that saturates at 8 bits has to do before it rounds onto a grid, so that the codes stay inside it.

    Returns:
        onednn's name of it (hardtanh, relu or none), its scalars, and its algorithm, of which there is none.
    """
    scale, zero = float(exit_.scale), int(exit_.zero_point)
    lowest, highest = (exit_.quant_min - zero) * scale, (exit_.quant_max - zero) * scale
    low = max(lowest, 0.0) if relu else lowest
    high = highest if ceiling is None else min(highest, ceiling)
    if high < (255 - zero) * scale or low > max(-zero * scale, 0.0) or (low > -zero * scale and not relu):
        return "hardtanh", [low, high], ""
    return ("relu" if relu and zero > 0 else "none"), [], ""


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


class ExactLinear(Kernel):
    """uint8 codes to float32 through exact integer sums: the classifier keeps its full resolution.

    onednn gives int32 sums as float32, which holds them exactly below 2^24; a longer sum is made of shorter ones.
    """

    kernel = "onednn.qlinear_pointwise (sums)"

    def __init__(self, layer: IntegerLinear, rescale: Rescale):
        super().__init__()
        self.zero, self.rescale = layer.input_zero_point.item(), rescale
        self.unit = rescale.scale.to(torch.float64)
        features = layer.weight.shape[1]
        farthest = int((layer.input_bounds - self.zero).abs().max())
        for parts in range(1, features + 1):  # one feature's product is below 2^15
            self.sizes = [len(part) for part in torch.arange(features).tensor_split(parts)]
            weights = layer.weight.split(self.sizes, 1)
            if max(int(w.to(torch.int32).abs().sum(1).max()) for w in weights) * farthest < 2**24:
                break
        self.packed = [torch.ops.onednn.qlinear_prepack(w.contiguous(), None) for w in weights]
        outputs = len(layer.bias)
        self.register_buffer("bias", layer.bias.clone())
        self.register_buffer("ones", torch.ones(outputs))
        self.register_buffer("zeros", torch.zeros(outputs, dtype=torch.int32))

    __deepcopy__ = _copy_but_packed

    def forward(self, codes: Tensor) -> Tensor:
        sums = self.bias
        for packed, part in zip(self.packed, codes.split(self.sizes, -1), strict=True):
            partial = torch.ops.onednn.qlinear_pointwise.default(
                part.contiguous(),
                1.0,
                self.zero,
                packed,
                self.ones,
                self.zeros,
                None,
                1.0,
                0,
                torch.float32,
                "none",
                [],
                "",
            )
            sums = sums + partial.to(torch.int32)
        return self.rescale(sums)


class FastQuantize(Kernel):
    """float32 to uint8 codes: those of :class:`fxquant.integer.Quantize`, bit for bit, in a third of its time."""

    kernel = "aten (quantize)"

    def __init__(self, exit_: Quantize):
        super().__init__()
        inverse = (1.0 / exit_.scale.to(torch.float32)).to(torch.float32)
        self.inverse, self.zero = float(inverse), int(exit_.zero_point)
        self.bounds = _ROUNDING + exit_.quant_min - self.zero, _ROUNDING + exit_.quant_max - self.zero

    def forward(self, x: Tensor) -> Tensor:
        return self._round(x.to(torch.float32) * self.inverse)

    def _round(self, steps: Tensor) -> Tensor:
        """Codes of a tensor in units of steps, which it overwrites."""
        codes = steps.add_(_ROUNDING).clamp_(*self.bounds).view(torch.int32).to(torch.uint8)
        return codes.add_(self.zero) if self.zero else codes  # modulo 256, like the low byte it adds to


class Requantize(FastQuantize):
    """uint8 codes of one grid to those of another: the reference's dequantize and quantize, bit for bit."""

    kernel = "aten (requantize)"

    def __init__(self, entry: Dequantize, exit_: Quantize):
        super().__init__(exit_)
        self.entry_zero, self.scale = int(entry.zero_point), float(entry.scale)
        self.same = _same_grid(entry, exit_) and (exit_.quant_min, exit_.quant_max) == (0, 255)
        every_code = torch.arange(256, dtype=torch.uint8)
        want = exit_(entry(every_code))
        # One multiplication for two, where all 256 codes agree that it makes no difference.
        self.factors = (self.scale * self.inverse,)
        if not torch.equal(self.forward(every_code), want):
            self.factors = (self.scale, self.inverse)

    def forward(self, codes: Tensor) -> Tensor:
        if self.same:
            return codes
        steps = codes.to(torch.float32)
        if self.entry_zero:
            steps.sub_(self.entry_zero)
        for factor in self.factors:
            steps.mul_(factor)
        return self._round(steps)


class Concatenate(Kernel):
    """Concatenation of codes that share a grid."""

    kernel = "aten.cat"

    def __init__(self, dim: int):
        super().__init__()
        self.dim = dim

    def forward(self, *codes: Tensor) -> Tensor:
        return torch.cat(codes, self.dim)


class MaxPool2d(Kernel):
    """Max pooling of codes, which is that of the values: the grid is monotone."""

    kernel = "quantized.max_pool2d"

    def __init__(self, pool: nn.MaxPool2d):
        super().__init__()
        pairs = (pool.kernel_size, pool.stride, pool.padding, pool.dilation)
        self.arguments = [list(p) if isinstance(p, (tuple, list)) else [p, p] for p in pairs]
        self.ceil_mode = pool.ceil_mode

    def forward(self, codes: Tensor) -> Tensor:
        return torch.ops.quantized.max_pool2d(codes, *self.arguments, self.ceil_mode)


# ---- fbgemm and qnnpack, on quint8 ------------------------------------------------------------------------


def _typed(codes: Tensor, grid: tuple[float, int]) -> Tensor:
    """Plain uint8 codes as the quint8 tensor that torch's kernels take."""
    return torch._make_per_tensor_quantized_tensor(codes, *grid)


class _QuantizedKernel(Kernel):
    def _take_exit(self, exit_: Quantize, ceiling: float | None = None) -> None:
        self.out_grid = float(exit_.scale), int(exit_.zero_point)
        self.bounds = exit_.quant_min, exit_.highest_below(ceiling)

    def _clamp(self, out: Tensor) -> Tensor:
        codes = out.int_repr()
        return codes if self.bounds == (0, 255) else codes.clamp_(*self.bounds)


class QuantizedLayer(_QuantizedKernel):
    """A convolution or a linear layer on the engine that is set while it is built."""

    def __init__(self, layer: IntegerConv2d | IntegerLinear, entry: Quantize, rescale: Rescale, exit_: Quantize):
        super().__init__()
        self.in_grid = float(entry.scale), int(entry.zero_point)
        self._take_exit(exit_, rescale.ceiling)
        sum_scale = rescale.scale.to(torch.float64)
        weight = torch._make_per_channel_quantized_tensor(
            layer.weight, sum_scale / self.in_grid[0], torch.zeros_like(sum_scale, dtype=torch.int64), 0
        )
        bias = (layer.bias.to(torch.float64) * sum_scale).to(torch.float32)
        if isinstance(layer, IntegerConv2d):
            geometry = layer.stride, layer.padding, layer.dilation, layer.groups
            self.packed = torch.ops.quantized.conv2d_prepack(weight, bias, *geometry)
            name = "conv2d"
        else:
            self.packed = torch.ops.quantized.linear_prepack(weight, bias)
            name = "linear"
        name += "_relu" if rescale.relu else ""
        self.kernel = f"quantized.{name}"
        self._op = getattr(torch.ops.quantized, name)

    def forward(self, codes: Tensor) -> Tensor:
        return self._clamp(self._op(_typed(codes, self.in_grid), self.packed, *self.out_grid))


class QuantizedAdd(_QuantizedKernel):
    """Addition of two grids, and ReLU."""

    def __init__(self, left: Dequantize, right: Dequantize, exit_: Quantize, relu: bool):
        super().__init__()
        self.left = float(left.scale), int(left.zero_point)
        self.right = float(right.scale), int(right.zero_point)
        self._take_exit(exit_)
        self.kernel = "quantized.add_relu" if relu else "quantized.add"
        self._op = torch.ops.quantized.add_relu if relu else torch.ops.quantized.add

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self._clamp(self._op(_typed(left, self.left), _typed(right, self.right), *self.out_grid))


def _same_grid(a: Dequantize, b: Quantize | Dequantize) -> bool:
    return bool(a.scale == b.scale) and bool(a.zero_point == b.zero_point)
