"""The autograd functions: forward is fxquant.grid bit for bit, gradients are the definition with masks, in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxquant import grid
from fxquant.estimators import functions, pege
from fxquant.estimators.functions import BinaryFunction, StraightThroughFunction

grids = pytest.mark.parametrize(
    ("scheme", "bits"), [(s, b) for s in grid.SCHEMES for b in (2, 4, 8)], ids=lambda value: str(value)
)
SHAPE = (6, 5, 4)


def operands(scheme: str, bits: int, per_channel: bool, seed: int = 0):
    """A tensor over and beyond the grid, ties and zeros among it; scale and zero-point; smallest and largest code."""
    torch.manual_seed(seed)
    low, high = grid.bounds(bits, scheme)
    scale = (torch.rand(SHAPE[0], 1, 1) if per_channel else torch.rand(())) + 0.01
    zero = torch.randint(low, high + 1, scale.shape).float() if scheme == "affine" else None
    shift = 0.0 if zero is None else zero
    x = (torch.rand(SHAPE) * (high - low + 4) + low - 2 - shift) * scale
    ties = torch.rand(SHAPE) < 0.3
    x = torch.where(ties, (torch.round(x / scale) + 0.5) * scale, x)
    x[0, 0, 0] = 0.0
    return x, scale, zero, low, high


@grids
@pytest.mark.parametrize("per_channel", [False, True])
@given(seed=st.integers(0, 2**31))
@settings(max_examples=15, deadline=None)
def test_forward_is_the_grid_bit_for_bit(scheme, bits, per_channel, seed):
    x, scale, zero, low, high = operands(scheme, bits, per_channel, seed)
    at = torch.zeros(()) if zero is None else zero
    expected = grid.dequantize(grid.quantize(x, scale, at, low, high), scale, at)
    assert torch.equal(functions.to_grid(x, scale, zero, low, high), expected)
    assert torch.equal(pege.ProgressiveFunction.apply(x, scale, zero, low, high, 0.1, 1.0, 1.0, True)[0], expected)


@grids
@given(seed=st.integers(0, 2**31))
@settings(max_examples=15, deadline=None)
def test_an_element_is_replaced_exactly_or_not_at_all(scheme, bits, seed):
    """The level bit for bit, or the number itself, clamped, to float32's precision."""
    x, scale, zero, low, high = operands(scheme, bits, False, seed)
    out = pege.ProgressiveFunction.apply(x, scale, zero, low, high, 0.1, 1.0, 0.5, False)[0]
    level = functions.to_grid(x, scale, zero, low, high)
    shift = 0.0 if zero is None else zero
    kept = x.clamp((low - shift) * scale, (high - shift) * scale)
    off = ~torch.isclose(out, kept, rtol=1e-6, atol=0)
    assert torch.equal(out[off], level[off])


def by_definition(x, scale, zero, low, high, grad, delta):
    """Gradients to x, scale and zero-point with masks, in float64."""
    x, scale, grad = x.double(), scale.double(), grad.double()
    zero = torch.zeros(()) if zero is None else zero.double()
    u = x / scale
    unclamped = torch.round(u) + zero
    code = unclamped.clamp(low, high)
    inside, residual = code == unclamped, torch.round(u) - u
    to_x = torch.where(inside, grad * (1 - delta * grad.sign() * residual), 0.0)
    to_scale = (grad * torch.where(inside, residual, code - zero)).sum_to_size(scale.shape)
    return to_x, to_scale, torch.where(inside, 0.0, -grad * scale).sum_to_size(scale.shape)


def off_ties(x, scale):
    """``x`` without what float32 and float64 may round apart, and without what lies half a cell beyond an end."""
    u = x / scale
    return (torch.round(u) + (u - torch.round(u)).clamp(-0.45, 0.45)) * scale


@grids
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("delta", [0.0, 0.3])
def test_gradients_are_those_of_the_definition(scheme, bits, per_channel, delta):
    x, scale, zero, low, high = operands(scheme, bits, per_channel)
    x, grad = off_ties(x, scale), torch.randn(SHAPE)
    leaves = [
        x.clone().requires_grad_(),
        scale.clone().requires_grad_(),
        None if zero is None else zero.requires_grad_(),
    ]
    StraightThroughFunction.apply(*leaves, low, high, delta, 0.5).backward(grad)
    to_x, to_scale, to_zero = by_definition(x, scale, zero, low, high, grad, delta)
    torch.testing.assert_close(leaves[0].grad.double(), to_x, rtol=5e-5, atol=1e-7)
    size = float(grad.abs().sum()) * 2**bits
    torch.testing.assert_close(leaves[1].grad.double(), 0.5 * to_scale, rtol=0, atol=1e-6 * size)
    if zero is not None:
        torch.testing.assert_close(leaves[2].grad.double(), to_zero, rtol=1e-5, atol=1e-5)


def test_the_step_gradient_of_a_tensor_in_many_pieces():
    """At 8 bits, where out and x nearly cancel: a thousandth of the sum's own spread over incoming gradients."""
    torch.manual_seed(0)
    x, scale = off_ties(torch.randn(5, 123_457) * 40, torch.tensor(1.0)), torch.tensor(1.0, requires_grad=True)
    grad = torch.randn_like(x)
    StraightThroughFunction.apply(x.clone().requires_grad_(), scale, None, -127, 127).backward(grad)
    _, expected, _ = by_definition(x, scale.detach(), None, -127, 127, grad, 0.0)
    residual = x - torch.round(x)
    spread = float((grad * residual).double().square().sum().sqrt())
    assert float(scale.grad) == pytest.approx(float(expected), abs=2e-3 * spread)


def test_only_the_input_is_saved():
    """Nothing of the tensor's size besides: the layer before keeps it anyway."""
    saved = []
    x, scale = torch.randn(100, requires_grad=True), torch.tensor(0.1, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        StraightThroughFunction.apply(x, scale, None, -7, 7)
    large = {t.data_ptr() for t in saved if t.numel() == 100}
    assert large == {x.data_ptr()}


def test_what_needs_no_gradient_gets_none():
    """A held range on an input of the network: the layer behind it need not compute the gradient of its input."""
    out = StraightThroughFunction.apply(torch.randn(10), torch.tensor(0.1), None, -7, 7)
    assert not out.requires_grad
    assert not BinaryFunction.apply(torch.randn(10), torch.tensor(0.1)).requires_grad


@pytest.mark.parametrize("share", [0.0, 1 / 3, 0.999, 1.0])
def test_share_of_a_bernoulli_mask(share):
    """Exact on average over calls, though a byte has but 256 thresholds; ones and zeros, of any length."""
    torch.manual_seed(1)
    like = torch.empty(1003)
    masks = torch.cat([torch.lt(*pege._draw_bytes(like, share)) for _ in range(300)]).double()
    deviation = (share * (1 - share) / masks.numel() + (1 / 512) ** 2 / 300) ** 0.5
    assert float(masks.mean()) == pytest.approx(share, abs=5 * deviation)
