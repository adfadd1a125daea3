"""The three baselines against the formulas: forward, and gradients to input, step and zero-point."""

from __future__ import annotations

import pytest
import torch

from fxquant.errors import SpecError
from fxquant.estimators import EWGS, LSQ, STE
from fxquant.estimators.functions import StraightThroughFunction

from . import rederived

SHAPE = (4, 3, 5, 6)
ESTIMATORS = {"ste": STE, "lsq": LSQ, "ewgs": EWGS}
grids = pytest.mark.parametrize(
    ("scheme", "bits", "axis"),
    [(s, b, a) for s in ("symmetric", "one_sided", "affine") for b in (1, 2, 3, 4, 8) for a in (None, 0, 1)],
)


def make(cls, bits, scheme, axis, **options):
    """A calibrated estimator, and its step and zero-point in float64, shaped against SHAPE."""
    if axis is not None:
        options |= {"channels": SHAPE[axis], "axis": axis}
    estimator = cls(bits, scheme=scheme, init="minmax", **options).train()
    x = torch.randn(SHAPE) * torch.rand(1 if axis is None else SHAPE[axis]).add(0.1).reshape(
        [-1 if i == (axis or 0) else 1 for i in range(4)]
    )
    estimator.initialize_from(x.abs() if scheme == "one_sided" else x)
    shape = [1] * 4
    if axis is not None:
        shape[axis] = -1
    step, zero = (rederived.double(v).reshape(shape) for v in estimator.calculate_qparams())
    return estimator, step, zero


def run(estimator, x):
    """Forward and backward under a random incoming gradient: output, gradient in, gradient to x."""
    x, grad = x.clone().requires_grad_(), torch.randn_like(x)
    out = estimator(x)
    out.backward(grad)
    return out.detach(), rederived.double(grad), x.grad


def assert_sums_close(actual, expected, size):
    """Equal up to float32's share of ``size``, the sum of what was added up without its signs."""
    assert ((rederived.double(actual).flatten() - expected.flatten()).abs() <= 2e-5 * size.flatten()).all()


@grids
@pytest.mark.parametrize("name", ESTIMATORS)
def test_forward_and_gradients(name, scheme, bits, axis):
    """Output, gradient to x, to log2 of the step and to the zero-point's share, at LSQ's gradient scale."""
    delta = {"delta": 0.3} if name == "ewgs" else {}
    estimator, step, zero = make(ESTIMATORS[name], bits, scheme, axis, **delta)
    x = rederived.spread(SHAPE, step, zero, bits, scheme)
    out, grad, to_x = run(estimator, x)
    x = rederived.double(x)
    _, expected_out = rederived.quantize(x, step, zero, bits, scheme)
    torch.testing.assert_close(rederived.double(out), expected_out, rtol=1e-6, atol=0)
    expected_x, expected_step, expected_zero = rederived.straight_through_gradients(
        x, grad, step, zero, bits, scheme, **delta
    )
    torch.testing.assert_close(rederived.double(to_x), expected_x, rtol=2e-5, atol=1e-6)
    if name == "ste":
        assert estimator.log2_scale.grad is None
        assert estimator.zero_fraction is None or estimator.zero_fraction.grad is None
        return
    elements = x.numel() // step.numel() if scheme == "symmetric" else x[0].numel()
    lsq = (elements * rederived.levels(bits, scheme)[1]) ** -0.5
    by_log = step * rederived.LN2
    size = grad.abs().sum_to_size(step.shape) * by_log * 4
    assert_sums_close(estimator.log2_scale.grad / lsq, expected_step * by_log, size)
    if scheme == "affine":
        levels = 2**bits - 1
        size = grad.abs().sum_to_size(step.shape) * step * levels
        assert_sums_close(estimator.zero_fraction.grad, expected_zero * levels, size)


def test_ewgs_without_delta_is_lsq():
    gradients = []
    for cls, options in ((LSQ, {}), (EWGS, {"delta": 0.0})):
        torch.manual_seed(3)
        estimator, step, zero = make(cls, 3, "affine", None, **options)
        _, _, to_x = run(estimator, rederived.spread(SHAPE, step, zero, 3, "affine"))
        gradients.append((to_x, estimator.log2_scale.grad, estimator.zero_fraction.grad))
    assert all(map(torch.equal, *gradients))


def test_ewgs_pushes_towards_the_level():
    """Descending on an element above its level, the step is larger than the plain one where it leads to the tie."""
    estimator, _, _ = make(EWGS, 4, "symmetric", None, delta=0.5)
    step = float(estimator.scale().detach())
    x = torch.tensor([2.3 * step, 2.3 * step], requires_grad=True)
    estimator(x).backward(torch.tensor([1.0, -1.0]))
    assert x.grad.tolist() == pytest.approx([1 + 0.5 * 0.3, -(1 - 0.5 * 0.3)], rel=1e-4)


@pytest.mark.parametrize("delta", [0.0, 0.5])
def test_range_is_the_union_of_cells(delta):
    """What rounds to a level is inside: up to half a step beyond the ends, where equation 3 of LSQ clips already.

    A tensor's own maximum, which calibration puts on the end itself, is then inside whatever float32 makes of it.
    """
    low, high, zero = 0.0, 7.0, torch.tensor(2.0, requires_grad=True)
    step = torch.tensor(0.5, requires_grad=True)
    u = torch.tensor([high - 2 + 0.49, low - 2 - 0.49, high - 2 + 0.51, low - 2 - 0.51])
    x = (0.5 * u).requires_grad_()
    out = StraightThroughFunction.apply(x, step, zero, low, high, delta)
    assert out.tolist() == [2.5, -1.0, 2.5, -1.0]
    out.backward(torch.tensor([1.0, 10.0, 100.0, 1000.0]))
    assert x.grad.tolist() == pytest.approx([1 + 0.49 * delta, 10 * (1 - 0.49 * delta), 0, 0])
    assert step.grad.item() == pytest.approx(-0.49 + 10 * 0.49 + 100 * 5 - 1000 * 2)
    assert zero.grad.item() == -0.5 * 1100


def test_ste_range_never_moves():
    """A training loop over STE changes the input alone."""
    estimator, step, zero = make(STE, 4, "affine", None)
    x = rederived.spread(SHAPE, step, zero, 4, "affine").requires_grad_()
    optimizer = torch.optim.SGD([x, *estimator.parameters()], lr=0.1)
    before, x_before = estimator.calculate_qparams(), x.detach().clone()
    for _ in range(3):
        optimizer.zero_grad()
        estimator(x).square().sum().backward()
        optimizer.step()
    assert all(map(torch.equal, estimator.calculate_qparams(), before))
    assert not torch.equal(x, x_before)


def test_lsq_finds_the_better_step():
    """From a range 8 times too wide, the learned step comes close to the best fixed one."""
    torch.manual_seed(2)
    x = torch.randn(2000)
    estimator = LSQ(3, scheme="symmetric", init="minmax").train()
    estimator.initialize_from(8 * x)
    start = (estimator(x) - x).square().mean().item()
    optimizer = torch.optim.Adam(estimator.parameters(), lr=5e-2)
    for _ in range(400):
        optimizer.zero_grad()
        (estimator(x) - x).square().mean().backward()
        optimizer.step()
    steps, zero = torch.linspace(0.05, 2, 400, dtype=torch.float64), torch.tensor(0.0)
    errors = [(rederived.quantize(x.double(), s, zero, 3, "symmetric")[1] - x).square().mean() for s in steps]
    best = float(min(errors))
    assert best <= (estimator(x) - x).square().mean().item() < 1.02 * best < start


def test_negative_delta():
    with pytest.raises(SpecError, match=r"delta=-0\.1"):
        EWGS(4, delta=-0.1)
