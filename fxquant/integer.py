"""The operators of the reference integer graph: plain uint8 activations, int8 weights, int32 sums and biases.

A frozen layer computes its eval forward with these very modules, and :func:`fxquant.convert` puts the same modules
into the reference graph: that is why the two agree bit for bit. Sums of integer products are carried in float32
where no partial sum can reach 2^24, and in float64 elsewhere, so they are exact, whatever the order in which a
kernel adds them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import grid

_FLOAT32_EXACT = 2**24


class Quantize(nn.Module):
    """Floats -> uint8: ``clamp(round(x * (1/s)) + z, qmin, qmax)`` with one scale for the tensor, in float32.

    Infinity saturates. NaN has no code: which one it gets is undefined, as it is for ONNX's QuantizeLinear and torch's
    kernels.
    """

    def __init__(self, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int):
        super().__init__()
        self.register_buffer("scale", scale.detach().reshape(()).clone())
        self.register_buffer("zero_point", zero_point.detach().to(torch.int32).reshape(()).clone())
        self.register_buffer("bounds", torch.tensor([quant_min, quant_max], dtype=torch.int32))

    @property
    def quant_min(self) -> int:
        return int(self.bounds[0])

    @property
    def quant_max(self) -> int:
        return int(self.bounds[1])

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(torch.float32)  # in half precision or double, it would round to another code than in training
        q = grid.quantize(x, self.scale, self.zero_point, self.quant_min, self.quant_max)
        return q.to(torch.uint8)

    def highest_below(self, ceiling: float | None) -> int:
        """The largest code that a value of at most ``ceiling`` gets: the grid is monotone."""
        return self.quant_max if ceiling is None else int(self(self.scale.new_tensor(ceiling)))

    def extra_repr(self) -> str:
        return (
            f"scale={self.scale.item():.6g}, zero_point={self.zero_point.item()}, "
            f"codes={self.quant_min}..{self.quant_max}"
        )


class Dequantize(nn.Module):
    """uint8 -> float32: ``(q - z) * s``."""

    def __init__(self, scale: Tensor, zero_point: Tensor):
        super().__init__()
        self.register_buffer("scale", scale.detach().reshape(()).clone())
        self.register_buffer("zero_point", zero_point.detach().to(torch.int32).reshape(()).clone())

    def forward(self, q: Tensor) -> Tensor:
        return grid.dequantize(q, self.scale, self.zero_point)


def activate(x: Tensor, relu: bool, ceiling: float | None) -> Tensor:
    """Nothing, ReLU, or ReLU cut at ``ceiling``."""
    if not relu:
        return x
    return F.relu(x) if ceiling is None else x.clamp(0, ceiling)


class Rescale(nn.Module):
    """int32 sums -> float32, ``sum * (s_x * s_w)`` per output channel; optionally ReLU, cut at ``ceiling`` (ReLU6)."""

    def __init__(self, scale: Tensor, channel_axis: int, relu: bool, ceiling: float | None = None):
        super().__init__()
        self.register_buffer("scale", scale.detach().clone())
        self.channel_axis, self.relu, self.ceiling = channel_axis, relu, ceiling

    def forward(self, sums: Tensor) -> Tensor:
        out = sums.to(torch.float32) * grid.channel_view(self.scale, sums.ndim, self.channel_axis)
        return activate(out, self.relu, self.ceiling)


def integer_layers(reference: nn.Module) -> dict[str, IntegerConv2d | IntegerLinear]:
    """The integer layers of a reference graph, by name."""
    return {name: m for name, m in reference.named_modules() if isinstance(m, _IntegerLayer)}


class _IntegerLayer(nn.Module):
    """uint8 -> int32: the sum of ``(q_x - z_x) * q_w`` plus an int32 bias."""

    def __init__(self, weight: Tensor, bias: Tensor, input_zero_point: Tensor, input_bounds: tuple[int, int]):
        super().__init__()
        self.register_buffer("weight", weight.to(torch.int8))
        self.register_buffer("bias", bias.to(torch.int32))
        self.register_buffer("input_zero_point", input_zero_point.detach().to(torch.int32).reshape(()).clone())
        self.register_buffer("input_bounds", torch.tensor(input_bounds, dtype=torch.int32))
        self._sum_dtype: torch.dtype | None = None

    def sum_dtype(self) -> torch.dtype:
        """float32 where every partial sum is below 2^24 for any input, else float64."""
        if self._sum_dtype is None:
            farthest = (self.input_bounds - self.input_zero_point).abs().max().to(torch.float64)
            per_channel = self.weight.to(torch.float64).abs().flatten(1).sum(1) * farthest
            largest = float((per_channel + self.bias.abs().to(torch.float64)).max())
            self._sum_dtype = torch.float32 if largest < _FLOAT32_EXACT else torch.float64
        return self._sum_dtype

    def _operands(self, q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        dtype = self.sum_dtype()
        return q.to(dtype) - self.input_zero_point, self.weight.to(dtype), self.bias.to(dtype)

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._sum_dtype = None

    def extra_repr(self) -> str:
        return f"weight={tuple(self.weight.shape)}, input_codes={tuple(self.input_bounds.tolist())}"


class IntegerConv2d(_IntegerLayer):
    """Convolution on integers; padding adds real zeros, that is the code z_x."""

    def __init__(self, *operands, stride, padding, dilation, groups):
        super().__init__(*operands)
        self.stride, self.padding, self.dilation, self.groups = stride, padding, dilation, groups

    def forward(self, q: Tensor) -> Tensor:
        x, weight, bias = self._operands(q)
        # Where oneDNN is off, torch may take NNPACK's Winograd kernels, whose transforms round; autocast would too.
        with torch.backends.nnpack.flags(enabled=False), torch.autocast(q.device.type, enabled=False):
            sums = F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)
        return sums.to(torch.int32)


class IntegerLinear(_IntegerLayer):
    """Matrix product on integers, over the last dimension."""

    def forward(self, q: Tensor) -> Tensor:
        with torch.autocast(q.device.type, enabled=False):
            return F.linear(*self._operands(q)).to(torch.int32)
