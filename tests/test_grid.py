"""The integer grid: bounds, the binary grid without a zero, channels, straight-through rounding."""

from __future__ import annotations

import doctest

import pytest
import torch

from fxquant import grid
from fxquant.errors import SpecError
from fxquant.estimators.functions import BinaryFunction


def test_doctests():
    assert doctest.testmod(grid) == (0, 2)


@pytest.mark.parametrize(
    ("bits", "symmetric", "unsigned"),
    [
        (1, (-1, 1), (0, 1)),
        (2, (-1, 1), (0, 3)),
        (3, (-3, 3), (0, 7)),
        (4, (-7, 7), (0, 15)),
        (5, (-15, 15), (0, 31)),
        (6, (-31, 31), (0, 63)),
        (7, (-63, 63), (0, 127)),
        (8, (-127, 127), (0, 255)),
    ],
)
def test_bounds(bits, symmetric, unsigned):
    assert grid.bounds(bits, "symmetric") == symmetric
    assert grid.bounds(bits, "one_sided") == grid.bounds(bits, "affine") == unsigned


@pytest.mark.parametrize("bits", [1, 8, 4.0])
def test_whole_widths(bits):
    checked = grid.check_bits(bits)
    assert checked == bits
    assert type(checked) is int


@pytest.mark.parametrize("bits", [0, 9, -1, 2.5, True, float("nan"), float("inf"), "4", None])
def test_refused_widths(bits):
    with pytest.raises(SpecError, match=r"weight_bits=.* was asked for; widths are whole numbers of bits from 1 to 8"):
        grid.check_bits(bits, "weight_bits")


@pytest.mark.parametrize("scheme", grid.SCHEMES)
@pytest.mark.parametrize("bits", [1, 2])
def test_is_binary(bits, scheme):
    assert grid.is_binary(bits, scheme) == (bits == 1 and scheme == "symmetric")


@pytest.mark.parametrize("scheme", grid.SCHEMES)
@pytest.mark.parametrize("bits", range(1, 9))
def test_every_code_survives(bits, scheme):
    """Codes to numbers and back, at steps over many decades and every zero-point; codes beyond the ends clamp."""
    low, high = grid.bounds(bits, scheme)
    binary = grid.is_binary(bits, scheme)
    codes = torch.tensor([-1.0, 1.0]) if binary else torch.arange(low, high + 1, dtype=torch.float32)
    zeros = range(0, high + 1, max(1, high // 5)) if scheme == "affine" else [0]
    for scale in (3e-38, 1e-9, 0.1, 1 / 3, 7.7, 1e20):
        for zero in zeros:
            s, z = torch.tensor(scale), torch.tensor(zero)
            x = grid.dequantize(codes.to(torch.int16), s, z)
            assert x.dtype == torch.float32
            assert torch.equal(grid.quantize(x, s, z, low, high, binary), codes)
            assert grid.quantize(torch.tensor([-1e30, 1e30]) * scale, s, z, low, high, binary).tolist() == [low, high]


def test_rounds_half_to_even_by_the_reciprocal():
    """As integer kernels do: round(x * (1/s)) + z, ties to even before the zero-point is added."""
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5])
    q = grid.quantize(x, torch.tensor(1.0), torch.tensor(3.0), 0, 15)
    assert q.tolist() == [3, 5, 5, 3, 1]
    x, s = torch.tensor([i * 0.05 for i in range(1, 400, 2)]), torch.tensor(0.1)  # ties, up to float32
    by_reciprocal = torch.round(x * (torch.tensor(1.0) / s))
    assert not torch.equal(by_reciprocal, torch.round(x / s))  # the tensor tells the two apart
    assert torch.equal(grid.quantize(x, s, torch.tensor(0.0), 0, 255), by_reciprocal)


def test_binary_grid_has_no_zero():
    x = torch.tensor([-5.0, -1e-20, -0.0, 0.0, 1e-20, 0.3])
    q = grid.quantize(x, torch.tensor(0.5), torch.tensor(0.0), -1, 1, binary=True)
    assert q.tolist() == [-1, -1, 1, 1, 1, 1]
    assert grid.dequantize(q, torch.tensor(0.5), torch.tensor(0.0)).abs().unique().tolist() == [0.5]


def test_binary_gradients():
    """To x inside the two cells, |x| <= 2s, scaled by the residual in steps of 2s; to s the level, everywhere."""
    x = torch.tensor([-1.5, -0.9, -0.1, 0.0, 0.9, 1.1], requires_grad=True)
    s = torch.tensor(0.5, requires_grad=True)
    out = BinaryFunction.apply(x, s, 0.5)
    assert out.tolist() == [-0.5, -0.5, -0.5, 0.5, 0.5, 0.5]
    grad = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    out.backward(grad)
    residual = torch.tensor([0.0, 0.4, -0.4, 0.5, -0.4, 0.0])  # (q - x/s) / 2 inside
    expected = grad * (1 - 0.5 * residual) * torch.tensor([0.0, 1, 1, 1, 1, 0])
    torch.testing.assert_close(x.grad, expected)
    assert s.grad.item() == -1 - 2 - 3 + 4 + 5 + 6


def test_channel_view():
    c = torch.arange(3.0)
    assert grid.channel_view(c, 4, 1).shape == (1, 3, 1, 1)
    assert grid.channel_view(c, 2, 0).shape == (3, 1)
    assert grid.channel_view(c, 3, -1).shape == (1, 1, 3)
    for axis in (None, 0, 1):
        assert grid.channel_view(torch.ones(1), 4, axis).shape == ()
    with pytest.raises(SpecError, match="3 scales were given for a tensor that is quantized as a whole"):
        grid.channel_view(c, 4, None)


def test_channel_view_has_gradients():
    c = torch.arange(3.0, requires_grad=True)
    (grid.channel_view(c, 2, 1) * torch.ones(5, 3)).sum().backward()
    assert c.grad.tolist() == [5, 5, 5]


def test_straight_through_rounding():
    x = torch.tensor([0.5, 1.5, -2.3], requires_grad=True)
    out = grid.round_straight_through(x)
    assert out.tolist() == [0.0, 2.0, -2.0]
    out.backward(torch.tensor([1.0, -2.0, 3.0]))
    assert x.grad.tolist() == [1.0, -2.0, 3.0]
