"""An integer interpreter of the reference graph, written against its documented arithmetic and nothing else.

It walks the graph and reads the modules' buffers, but computes by itself, in numpy: sums of integer products in
int64; requantization in float32, ``clamp(round_half_even(x * (1/s)) + z)``, as it is documented to be deployed; all
other operators in float64, rounded to float32 once. With ``real=True`` no value is ever rounded to float32: the
arithmetic of real numbers, to 1e-15. That run takes over the codes of a deployed one, so that it tells for each
requantization on its own what exact arithmetic would have given.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import fx, nn
from torch.nn import functional as F

from fxquant.integer import Dequantize, IntegerConv2d, IntegerLinear, Quantize, Rescale

_ADDITIONS = (operator.add, torch.add)
_PRODUCTS = (operator.mul, torch.mul)
_RELUS = (F.relu, torch.relu)


@dataclass
class Run:
    """Every node's array by name, the output, and for each Quantize the real-valued code before it is rounded."""

    values: dict[str, np.ndarray] = field(default_factory=dict)
    unrounded: dict[str, np.ndarray] = field(default_factory=dict)
    output: np.ndarray | None = None


def interpret(reference: fx.GraphModule, images: torch.Tensor, *, deployed: Run | None = None) -> Run:
    """Run ``reference`` on ``images`` [N, C, H, W]: as deployed, or, given a deployed run, in real arithmetic."""
    real = deployed is not None
    run = Run()
    modules = dict(reference.named_modules())

    def value(argument):
        return run.values[argument.name] if isinstance(argument, fx.Node) else argument

    for node in reference.graph.nodes:
        if node.op == "placeholder":
            result = images.numpy().astype(np.float64 if real else np.float32)
        elif node.op == "output":
            run.output = value(node.args[0])
            break
        else:
            args = [[value(i) for i in a] if isinstance(a, (list, tuple)) else value(a) for a in node.args]
            module = modules[node.target] if node.op == "call_module" else None
            if isinstance(module, Quantize):
                result, run.unrounded[node.name] = _quantize(module, args[0], real)
                if real:
                    result = deployed.values[node.name]
            elif module is not None:
                result = _call(module, args[0], real)
            else:
                result = _operate(node.target, *args)
                if not real:
                    result = result.astype(np.float32)
        run.values[node.name] = result
    return run


def _numpy(buffer: torch.Tensor, dtype) -> np.ndarray:
    return buffer.detach().numpy().astype(dtype)


def _quantize(module: Quantize, x: np.ndarray, real: bool) -> tuple[np.ndarray, np.ndarray]:
    low, high = (int(bound) for bound in module.bounds)
    zero = int(module.zero_point)
    if real:
        unrounded = x / float(module.scale)
    else:
        assert x.dtype == np.float32
        unrounded = x * (np.float32(1) / _numpy(module.scale, np.float32))
        assert unrounded.dtype == np.float32
    return np.clip(np.rint(unrounded).astype(np.int64) + zero, low, high), unrounded.astype(np.float64) + zero


def _call(module: nn.Module, x: np.ndarray, real: bool) -> np.ndarray:
    if isinstance(module, Dequantize):
        dtype = np.float64 if real else np.float32
        return (x - int(module.zero_point)).astype(dtype) * _numpy(module.scale, dtype)
    if isinstance(module, Rescale):
        dtype = np.float64 if real else np.float32
        assert x.dtype == np.int64
        assert np.abs(x).max() < 2**31, "sums do not fit int32"
        shape = [1] * x.ndim
        shape[module.channel_axis] = -1
        out = x.astype(dtype) * _numpy(module.scale, dtype).reshape(shape)
        return np.maximum(out, 0) if module.relu else out
    if isinstance(module, (IntegerConv2d, IntegerLinear)):
        levels = x - int(module.input_zero_point)
        weight, bias = _numpy(module.weight, np.int64), _numpy(module.bias, np.int64)
        if isinstance(module, IntegerLinear):
            return levels @ weight.T + bias
        return _convolve(levels, weight, module) + bias[:, None, None]
    if isinstance(module, nn.ReLU):
        return np.maximum(x, 0)
    if isinstance(module, nn.MaxPool2d):
        return _max_pool(x, module)
    if isinstance(module, nn.AvgPool2d):
        return _average_pool(x, module)
    if isinstance(module, nn.AdaptiveAvgPool2d):
        return _adaptive_average(x, module.output_size).astype(x.dtype)
    if isinstance(module, (nn.Identity, nn.Dropout)):
        return x
    if isinstance(module, nn.Flatten):
        return x.reshape(*x.shape[: module.start_dim], -1)
    raise NotImplementedError(type(module).__name__)


def _operate(target, x, *rest) -> np.ndarray:
    if target in _ADDITIONS:
        return x + rest[0]
    if target in _PRODUCTS:
        return x * rest[0]
    if target in _RELUS:
        return np.maximum(x, 0)
    if target is F.hardswish:
        wide = x.astype(np.float64)
        return wide * np.clip(wide + 3, 0, 6) / 6
    if target is torch.cat:
        return np.concatenate(x, rest[0])
    if target is F.adaptive_avg_pool2d:
        return _adaptive_average(x, rest[0])
    if target in ("flatten", torch.flatten):
        return x.reshape(*x.shape[: rest[0]], -1)
    if target == "mean":
        return x.astype(np.float64).mean(tuple(rest[0]))
    raise NotImplementedError(str(target))


def _pair(value) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


def _windows(x: np.ndarray, kernel, stride, padding, dilation=1, fill=0) -> np.ndarray:
    """[N, C, H', W', kh, kw]: what each output position sees."""
    (kh, kw), (sh, sw), (ph, pw), (dh, dw) = (_pair(v) for v in (kernel, stride, padding, dilation))
    x = np.pad(x, ((0, 0), (0, 0), (ph, ph), (pw, pw)), constant_values=fill)
    view = np.lib.stride_tricks.sliding_window_view(x, ((kh - 1) * dh + 1, (kw - 1) * dw + 1), axis=(2, 3))
    return view[:, :, ::sh, ::sw, ::dh, ::dw]


def _convolve(levels: np.ndarray, weight: np.ndarray, module: IntegerConv2d) -> np.ndarray:
    """int64 sums; padding adds zeros to the levels, which are the real number 0."""
    seen = _windows(levels, weight.shape[2:], module.stride, module.padding, module.dilation)
    n, _, height, width = seen.shape[:4]
    per_group, groups = weight.shape[1], module.groups
    rows = []
    for group, kernels in enumerate(np.split(weight, groups)):
        part = seen[:, group * per_group : (group + 1) * per_group].transpose(0, 2, 3, 1, 4, 5)
        rows.append(part.reshape(n * height * width, -1) @ kernels.reshape(len(kernels), -1).T)
    return np.concatenate(rows, 1).reshape(n, height, width, -1).transpose(0, 3, 1, 2)


def _max_pool(x: np.ndarray, pool: nn.MaxPool2d) -> np.ndarray:
    assert not pool.ceil_mode
    return _windows(x, pool.kernel_size, pool.stride, pool.padding, pool.dilation, -np.inf).max((4, 5))


def _average_pool(x: np.ndarray, pool: nn.AvgPool2d) -> np.ndarray:
    """Mean over what of each window lies inside the image (timm's downsampling: ceil_mode, no padding)."""
    assert pool.divisor_override is None
    assert _pair(pool.padding) == (0, 0)
    overhang = [(-(size - k)) % s if pool.ceil_mode else 0 for size, k, s in _geometry(x, pool)]
    padded = np.pad(x.astype(np.float64), ((0, 0), (0, 0), *((0, o) for o in overhang)), constant_values=np.nan)
    return np.nanmean(_windows(padded, pool.kernel_size, pool.stride, 0), (4, 5)).astype(x.dtype)


def _geometry(x: np.ndarray, pool: nn.AvgPool2d):
    return zip(x.shape[2:], _pair(pool.kernel_size), _pair(pool.stride), strict=True)


def _adaptive_average(x: np.ndarray, size) -> np.ndarray:
    assert _pair(size) == (1, 1)
    return x.astype(np.float64).mean((2, 3), keepdims=True)
