"""Where ranges start: min-max, percentile, least squared error; and what is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxquant import ranges
from fxquant.errors import ConstantTensorError, EmptyDataError, NonFiniteError
from fxquant.grid import SCHEMES, bounds
from fxquant.ranges import METHODS, RangeObserver, step_and_zero

from .estimators import rederived


def observed(*batches, axis=None):
    observer = RangeObserver()
    for batch in batches:
        observer.update(batch, axis, "here")
    return observer


@st.composite
def batches(draw):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x = torch.randn(draw(st.integers(1, 3)), draw(st.integers(2, 60)), generator=generator)
    if draw(st.booleans()):
        x = x**3
    return (x + draw(st.floats(-3, 3))) * 10 ** draw(st.floats(-3, 3))


def error(x, low, high, bits, scheme):
    """Mean squared error [C] of x [C, n] on the grid over [low, high], in float64."""
    x, low, high = (rederived.double(v) for v in (x, low[:, None], high[:, None]))
    step, zero = rederived.step_of_range(low, high, bits, scheme)
    return (rederived.quantize(x, step.clamp(min=1e-300), zero, bits, scheme)[1] - x).square().mean(1)


# ---- what every method keeps to --------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scheme", SCHEMES)
@settings(max_examples=20)
@given(x=batches(), bits=st.integers(1, 8), per_channel=st.booleans())
def test_range_contains_zero(method, scheme, x, bits, per_channel):
    """low <= 0 <= high, no wider than the extremes; symmetric where asked, from 0 up on a one-sided grid."""
    low, high = observed(x, axis=0 if per_channel else None).range(method, bits, scheme, 99.0)
    assert low.shape == high.shape == (x.shape[0] if per_channel else 1,)
    assert ((low <= 0) & (high >= 0)).all()
    extreme = x.abs().amax(1) if per_channel else x.abs().amax()
    assert (torch.maximum(-low, high) <= extreme * (1 + 1e-6)).all()
    if scheme == "symmetric":
        assert torch.equal(low, -high)
    if scheme == "one_sided":
        assert not low.any()


@pytest.mark.parametrize("scheme", SCHEMES)
@given(x=batches(), bits=st.integers(1, 8))
def test_least_squares_never_lose_to_the_extremes(scheme, x, bits):
    if scheme == "one_sided":
        x = x.abs()
    observer = observed(x, axis=0)
    searched = error(x, *observer.range("mse", bits, scheme, 99.0), bits, scheme)
    extremes = error(x, *observer.range("minmax", bits, scheme, 99.0), bits, scheme)
    assert (searched <= extremes * (1 + 1e-4) + 1e-12 * extremes.max()).all()  # float32 chose, float64 judges


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("power", [1, 3])
def test_least_squares_are_near_the_optimum(scheme, bits, power):
    """Within 5 % of an exhaustive search over the factor by which both extremes shrink: it tries steps of 0.02."""
    x = torch.randn(2, 3000) ** power
    x = x.abs() if scheme == "one_sided" else x
    observer = observed(x, axis=0)
    low, high = observer.range("minmax", bits, scheme, 99.0)
    best = torch.stack(
        [error(x, low * f, high * f, bits, scheme) for f in torch.linspace(0.1, 1.0, 361).tolist()]
    ).amin(0)
    searched = error(x, *observer.range("mse", bits, scheme, 99.0), bits, scheme)
    assert (searched <= 1.05 * best).all()
    if bits < 8:
        assert (searched < 0.9 * error(x, low, high, bits, scheme)).all()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("bits", [1, 2, 3])
@pytest.mark.parametrize("outlier", [10, 100])
def test_least_squares_are_near_the_optimum_where_one_value_lies_far_out(scheme, bits, outlier):
    x = torch.randn(2, 20_000)
    x = x.abs() if scheme == "one_sided" else x
    x[:, 0] = outlier * x.abs().max()
    observer = observed(x, axis=0)
    low, high = observer.range("minmax", bits, scheme, 99.0)
    best = torch.stack([error(x, low * f, high * f, bits, scheme) for f in torch.logspace(-3, 0, 400).tolist()]).amin(0)
    assert (error(x, *observer.range("mse", bits, scheme, 99.0), bits, scheme) <= 1.05 * best).all()


def test_least_squares_of_the_binary_grid():
    """E|x| in closed form, and no other level does better."""
    x = torch.randn(3, 500) ** 3
    low, high = observed(x, axis=0).range("mse", 1, "symmetric", 99.0)
    torch.testing.assert_close(high, x.abs().mean(1))
    assert torch.equal(low, -high)
    best = error(x, low, high, 1, "symmetric")
    for factor in (0.9, 0.99, 1.01, 1.1):
        assert (error(x, low * factor, high * factor, 1, "symmetric") > best).all()


# ---- single methods --------------------------------------------------------------------------------------


def test_extremes_over_batches():
    observer = observed(torch.tensor([1.0, -3.0]), torch.tensor([[5.0, 2.0]]))
    assert [end.tolist() for end in observer.range("minmax", 4, "affine", 99.0)] == [[-3.0], [5.0]]
    assert [end.tolist() for end in observer.range("minmax", 4, "symmetric", 99.0)] == [[-5.0], [5.0]]
    assert [e.tolist() for e in observed(torch.tensor([2.0, 3.0])).range("minmax", 4, "affine", 99.0)] == [[0.0], [3.0]]


@pytest.mark.parametrize("axis", [0, 1, 2, -1])
def test_channels_along_any_axis(axis):
    x = torch.randn(3, 4, 5)
    low, high = observed(x, axis=axis).range("minmax", 4, "affine", 99.0)
    others = [d for d in range(3) if d != axis % 3]
    assert torch.equal(low, x.amin(others).clamp(max=0))
    assert torch.equal(high, x.amax(others).clamp(min=0))


def test_percentile_leaves_a_tail_at_either_end():
    """98 % of evenly spread values leaves 1 % beyond each end; of |x| for a symmetric grid, 2 % beyond its end."""
    x = torch.linspace(-1, 3, 10_001)
    x = x[torch.randperm(x.numel())]
    low, high = observed(x).range("percentile", 8, "affine", 98.0)
    assert (low.item(), high.item()) == (pytest.approx(-0.96, abs=1e-3), pytest.approx(2.96, abs=1e-3))
    low, high = observed(x).range("percentile", 8, "symmetric", 98.0)
    assert (high.item(), low.item()) == (pytest.approx(2.92, abs=2e-3), -high.item())
    low, high = observed(x.abs()).range("percentile", 8, "one_sided", 98.0)
    assert (low.item(), high.item()) == (0.0, pytest.approx(2.96, abs=2e-3))
    assert observed(x).range("percentile", 8, "affine", 100.0) == (torch.tensor([-1.0]), torch.tensor([3.0]))


def test_percentile_ignores_an_outlier():
    x = torch.cat([torch.rand(100_000), torch.tensor([1e6])])
    assert observed(x).range("percentile", 8, "one_sided", 99.99)[1].item() < 1.0
    assert observed(x).range("minmax", 8, "one_sided", 99.99)[1].item() == 1e6


def test_large_batches_are_sampled_but_their_extremes_kept():
    x = torch.rand(300_000)
    x[123_457], x[200_001] = 50.0, -40.0
    observer = observed(x)
    assert sum(rows.numel() for rows in observer._rows) < 100_000
    assert [end.item() for end in observer.range("minmax", 8, "affine", 99.0)] == [-40.0, 50.0]


@pytest.mark.parametrize("scheme", SCHEMES)
@given(low=st.floats(-100, 0), high=st.floats(0, 100), bits=st.integers(1, 8))
def test_step_and_zero(scheme, low, high, bits):
    """The table of grids, on any interval that contains 0; never a step of 0."""
    low, high = torch.tensor([low]), torch.tensor([high])
    if scheme == "symmetric":
        low = -high
    elif scheme == "one_sided":
        low = low * 0
    step, zero = step_and_zero(low, high, bits, scheme)
    quant_min, quant_max = bounds(bits, scheme)
    assert step > 0
    assert zero == zero.round()
    assert quant_min <= zero <= quant_max
    expected, _ = rederived.step_of_range(rederived.double(low), rederived.double(high), bits, scheme)
    torch.testing.assert_close(rederived.double(step), expected.clamp(min=2.0**-126), rtol=1e-6, atol=0)
    if scheme == "affine" and high - low > 1e-30:
        assert abs(zero.item() + low.item() / expected.item()) <= 0.5 + 1e-4


# ---- what is refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("axis", [None, 0])
def test_not_finite(bad, axis):
    x = torch.randn(4, 5)
    x[1, 2] = x[3, 3] = bad
    with pytest.raises(NonFiniteError, match=r"layer1\.conv: 2 of 20 values are NaN or infinite"):
        RangeObserver().update(x, axis, "layer1.conv")


@pytest.mark.parametrize("shape", [(0,), (4, 0), (0, 4)])
def test_empty(shape):
    observer = RangeObserver()
    with pytest.raises(EmptyDataError, match=r"layer1\.conv: an empty tensor of shape"):
        observer.update(torch.empty(shape), None, "layer1.conv")
    assert observer.empty


@pytest.mark.parametrize("value", [0.0, 2.5, -1.0])
def test_constant(value):
    observer = observed(torch.full((3, 4), value), torch.full((2, 2), value))
    assert observer.is_constant()
    with pytest.raises(ConstantTensorError, match=rf"layer1\.conv: all values seen are {value:g}"):
        observer.require_varying("layer1.conv")
    observer.update(torch.tensor([value + 1]), None, "layer1.conv")
    observer.require_varying("layer1.conv")


def test_constant_channels_are_no_constant_tensor():
    observed(torch.tensor([[1.0, 1.0], [2.0, 2.0]]), axis=0).require_varying("here")


def test_what_was_observed_is_not_aliased():
    """Updating a tensor in place after it was taken in does not change the range."""
    x = torch.randn(100)
    observer = observed(x)
    expected = observer.range("mse", 4, "affine", 99.0)
    x.mul_(100)
    assert observer.range("mse", 4, "affine", 99.0) == expected


@pytest.mark.parametrize("scheme", ["symmetric", "affine"])
@pytest.mark.parametrize("shape", [(64, 9000), (3, 200_000), (2, 70_000)])
def test_ranges_of_large_tensors_do_not_depend_on_how_they_are_cut(scheme, shape, monkeypatch):
    x = torch.randn(shape) * torch.rand(shape[0], 1).exp()
    cut = observed(x, axis=0).range("mse", 4, scheme, 99.0)
    monkeypatch.setattr(ranges, "_BLOCK", 2**40)
    whole = observed(x, axis=0).range("mse", 4, scheme, 99.0)
    assert torch.equal(cut[0], whole[0])
    assert torch.equal(cut[1], whole[1])
