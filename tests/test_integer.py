"""The reference graph's operators against 64-bit integer arithmetic: exact, for the most extreme codes."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

from fxquant.integer import Dequantize, IntegerConv2d, IntegerLinear, Quantize, Rescale


def linear_int64(q, weight, bias, zero):
    return (q.astype(np.int64) - zero) @ weight.astype(np.int64).T + bias


def conv_int64(q, weight, bias, zero, stride, padding, dilation, groups):
    """Convolution by its definition; padding is real zeros."""
    (sh, sw), (ph, pw), (dh, dw) = stride, padding, dilation
    x = np.pad(q.astype(np.int64) - zero, ((0, 0), (0, 0), (ph, ph), (pw, pw)))
    out_channels, per_group, kh, kw = weight.shape
    height = (x.shape[2] - dh * (kh - 1) - 1) // sh + 1
    width = (x.shape[3] - dw * (kw - 1) - 1) // sw + 1
    out = np.zeros((x.shape[0], out_channels, height, width), dtype=np.int64)
    for o in range(out_channels):
        first = o // (out_channels // groups) * per_group
        for i, j in np.ndindex(kh, kw):
            rows = slice(i * dh, i * dh + sh * (height - 1) + 1, sh)
            columns = slice(j * dw, j * dw + sw * (width - 1) + 1, sw)
            taps = weight[o, :, i, j].astype(np.int64)
            out[:, o] += np.tensordot(x[:, first : first + per_group, rows, columns], taps, axes=(1, 0))
    return out + bias.reshape(1, -1, 1, 1)


def operands(weight_shape, bias_size=1000, zero=0, bounds=(0, 255)):
    weight = torch.randint(-127, 128, weight_shape)
    bias = torch.randint(-bias_size, bias_size + 1, weight_shape[:1])
    return weight, bias, torch.tensor([zero]), bounds


def codes(shape):
    return torch.randint(0, 256, shape, dtype=torch.uint8)


# ---- exact sums ------------------------------------------------------------------------------------------

# 255 * 127 = 32385; 518 of these stay below 2^24 = 16777216, 519 do not.
FAN_INS = [(1, torch.float32), (517, torch.float32), (518, torch.float32), (519, torch.float64), (4608, torch.float64)]


@pytest.mark.parametrize(("fan_in", "carrier"), FAN_INS)
@pytest.mark.parametrize("signs", ["same", "alternating", "halves"])
def test_linear_of_extreme_codes(fan_in, carrier, signs):
    """Products of 255 and ±127 over a large fan-in: partial sums as large as they get."""
    sign = {"same": torch.ones(fan_in), "alternating": 1 - 2 * (torch.arange(fan_in) % 2)}.get(
        signs, torch.where(torch.arange(fan_in) < fan_in / 2, 1, -1)
    )
    weight = torch.stack([127 * sign, -127 * sign, sign]).to(torch.int64)
    weight[2, 0] = 2 * sign[0]  # odd sums: what a too short carrier rounds away
    bias = torch.tensor([0, 1, -1])
    layer = IntegerLinear(weight, bias, torch.tensor([0]), (0, 255))
    assert layer.sum_dtype() is carrier
    q = torch.full((2, fan_in), 255, dtype=torch.uint8)
    q[1, ::3] = 254
    out = layer(q)
    assert out.dtype == torch.int32
    np.testing.assert_array_equal(out.numpy(), linear_int64(q.numpy(), weight.numpy(), bias.numpy(), 0))


def test_carrier_at_the_edge():
    """float32 up to the last sum below 2^24, the bias counted; float64 from there on."""
    weight = torch.full((1, 518), 127)  # 518 * 32385 = 16775430
    for bias, carrier in ((1785, torch.float32), (1786, torch.float64), (-1785, torch.float32), (-1786, torch.float64)):
        layer = IntegerLinear(weight, torch.tensor([bias]), torch.tensor([0]), (0, 255))
        assert layer.sum_dtype() is carrier
        q = torch.full((1, 518), 255, dtype=torch.uint8)
        assert layer(q).item() == 518 * 32385 + bias


@pytest.mark.parametrize(("zero", "carrier"), [(0, torch.float64), (128, torch.float32), (255, torch.float64)])
def test_carrier_depends_on_the_farther_end(zero, carrier):
    """Codes count from the zero-point."""
    layer = IntegerLinear(torch.full((1, 700), 127), torch.zeros(1), torch.tensor([zero]), (0, 255))
    assert layer.sum_dtype() is carrier
    for code in (0, 255):
        assert layer(torch.full((1, 700), code, dtype=torch.uint8)).item() == 700 * 127 * (code - zero)


def test_carrier_follows_what_is_loaded():
    small = IntegerLinear(torch.ones(1, 4), torch.zeros(1), torch.tensor([0]), (0, 255))
    assert small.sum_dtype() is torch.float32
    large = IntegerLinear(torch.ones(1, 4), torch.tensor([2**24]), torch.tensor([0]), (0, 255))
    small.load_state_dict(large.state_dict())
    assert small.sum_dtype() is torch.float64
    assert small(torch.tensor([[1, 0, 0, 0]], dtype=torch.uint8)).item() == 2**24 + 1


@pytest.mark.parametrize("shape", [(64,), (5, 64), (2, 3, 64)])
@pytest.mark.parametrize("zero", [0, 77, 255])
@pytest.mark.parametrize("bias_size", [100, 2**22, 2**30])
def test_linear(shape, zero, bias_size):
    weight, bias, zero_point, bounds = operands((7, 64), bias_size, zero)
    q = codes(shape)
    out = IntegerLinear(weight, bias, zero_point, bounds)(q)
    np.testing.assert_array_equal(out.numpy(), linear_int64(q.numpy(), weight.numpy(), bias.numpy(), zero))


GEOMETRIES = {
    "plain": {},
    "padded": {"padding": (1, 1)},
    "uneven": {"padding": (2, 0), "stride": (1, 2)},
    "strided": {"stride": (2, 2), "padding": (1, 1)},
    "dilated": {"dilation": (2, 3), "padding": (2, 3)},
    "all": {"stride": (2, 1), "dilation": (2, 1), "padding": (3, 2)},
}


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("zero", [0, 131])
@pytest.mark.parametrize("bias_size", [100, 2**26])
def test_conv(geometry, groups, zero, bias_size):
    """Any geometry, with padding at a zero-point that is not 0, in both carriers."""
    how = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": groups} | GEOMETRIES[geometry]
    weight, bias, zero_point, bounds = operands((8, 8 // groups, 3, 3), bias_size, zero)
    layer = IntegerConv2d(weight, bias, zero_point, bounds, **how)
    assert layer.sum_dtype() is (torch.float32 if bias_size == 100 else torch.float64)
    q = codes((2, 8, 9, 10))
    expected = conv_int64(q.numpy(), weight.numpy(), bias.numpy(), zero, **how)
    np.testing.assert_array_equal(layer(q).numpy(), expected)


@pytest.mark.parametrize(("channels", "carrier"), [(57, torch.float32), (58, torch.float64), (512, torch.float64)])
@pytest.mark.parametrize("batch", [1, 16])
def test_conv_of_extreme_codes(channels, carrier, batch):
    """A 3 x 3 kernel over many channels, all codes at their ends: 9 * 57 products stay below 2^24."""
    weight = torch.full((4, channels, 3, 3), 127)
    weight[1] = -127
    weight[2, ::2] = -127
    weight[3, :, 1] = 126
    bias = torch.tensor([0, 1, -1, 3])
    how = {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 1}
    layer = IntegerConv2d(weight, bias, torch.tensor([0]), (0, 255), **how)
    assert layer.sum_dtype() is carrier
    q = torch.full((batch, channels, 5, 5), 255, dtype=torch.uint8)
    q[:, ::7, 2] = 253
    expected = conv_int64(q.numpy(), weight.numpy(), bias.numpy(), 0, **how)
    np.testing.assert_array_equal(layer(q).numpy(), expected)


@pytest.mark.parametrize("batch", [1, 16, 32])
def test_conv_without_onednn(batch):
    """Exact whatever kernel torch picks: with oneDNN off, that is another one for large batches."""
    weight, bias, zero_point, bounds = operands((8, 8, 3, 3), zero=3)
    how = {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 1}
    q = codes((batch, 8, 12, 12))
    layer = IntegerConv2d(weight, bias, zero_point, bounds, **how)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the flag warns of what it cannot do on other devices
        with torch.backends.mkldnn.flags(enabled=False):
            out = layer(q)
    np.testing.assert_array_equal(out.numpy(), conv_int64(q.numpy(), weight.numpy(), bias.numpy(), 3, **how))


def test_padding_is_real_zero():
    """At a zero-point of 9, the border adds nothing: not 9 per tap, nor -9."""
    layer = IntegerConv2d(
        torch.ones(1, 1, 3, 3), torch.zeros(1), torch.tensor([9]), (0, 15), stride=1, padding=1, dilation=1, groups=1
    )
    assert layer(torch.full((1, 1, 1, 1), 12, dtype=torch.uint8)).flatten().tolist() == [3]
    assert not layer(torch.full((1, 1, 2, 2), 9, dtype=torch.uint8)).any()


# ---- the other operators ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("low", "high", "zero"), [(0, 255, 0), (0, 255, 128), (0, 15, 7), (0, 1, 1)])
def test_quantize_and_dequantize(low, high, zero):
    scale = torch.tensor([0.037])
    quantize, dequantize = Quantize(scale, torch.tensor([zero]), low, high), Dequantize(scale, torch.tensor([zero]))
    q = torch.arange(low, high + 1, dtype=torch.uint8)
    x = dequantize(q)
    assert (x.dtype, quantize(x).dtype) == (torch.float32, torch.uint8)
    assert torch.equal(quantize(x), q)
    np.testing.assert_array_equal(x.numpy(), (q.numpy().astype(np.float32) - np.float32(zero)) * np.float32(0.037))
    assert quantize(torch.tensor([-1e9, 1e9, 0.0])).tolist() == [low, high, zero]
    assert (quantize.quant_min, quantize.quant_max) == (low, high)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize(("shape", "axis"), [((2, 3, 4, 5), 1), ((2, 3), -1), ((2, 6, 3), -1)])
def test_rescale(shape, axis, relu):
    scale = torch.tensor([0.5, 0.001, 3.0])
    sums = torch.randint(-(2**24), 2**24, shape, dtype=torch.int32)
    view = [-1 if d == axis % len(shape) else 1 for d in range(len(shape))]
    expected = sums.numpy().astype(np.float32) * scale.numpy().reshape(view)
    expected = np.maximum(expected, 0) if relu else expected
    np.testing.assert_array_equal(Rescale(scale, axis, relu)(sums).numpy(), expected)


def test_state_is_integer():
    """What ships: int8 weights, int32 biases and zero-points; a copy, not a view of what was given."""
    weight, bias, zero_point, bounds = operands((4, 6))
    layer = IntegerLinear(weight, bias, zero_point, bounds)
    dtypes = {name: value.dtype for name, value in layer.state_dict().items()}
    integer = torch.int32
    assert dtypes == {"weight": torch.int8, "bias": integer, "input_zero_point": integer, "input_bounds": integer}
    zero_point.fill_(99)
    assert layer.input_zero_point.item() == 0
