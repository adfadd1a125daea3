"""PEGE against the formulas of fxquant's reading: replacement, curriculum, gradient, discretization error."""

from __future__ import annotations

import math

import pytest
import torch

from fxquant.errors import SpecError
from fxquant.estimators import PEGE

from . import rederived
from .test_lsq_ewgs_ste import SHAPE, assert_sums_close, grids, make, run


@grids
@pytest.mark.parametrize("replaced", [0.0, 0.4, 1.0])
def test_forward_and_gradient(scheme, bits, axis, replaced):
    """Replaced elements are quantized, with the scaled gradient; the others clamped, with the plain one."""
    estimator, step, zero = make(PEGE, bits, scheme, axis, delta=0.25, weight=0.0)
    estimator.replaced = replaced
    x = rederived.spread(SHAPE, step, zero, bits, scheme)
    with torch.no_grad():
        quantized = estimator.eval()(x)
    out, grad, to_x = run(estimator.train(), x)
    mask = out == quantized  # also true of what is clipped, where both branches agree
    x = rederived.double(x)
    expected = rederived.pege_forward(x, mask, step, zero, bits, scheme)
    torch.testing.assert_close(rederived.double(out), expected, rtol=1e-6, atol=0)
    if not rederived.is_binary(bits, scheme):
        expected = rederived.pege_gradient(x, grad, mask, step, zero, bits, scheme, 0.25)
        torch.testing.assert_close(rederived.double(to_x), expected, rtol=2e-5, atol=1e-6)
    low, high = rederived.ends(step, zero, bits, scheme)
    inside = (x >= low) & (x <= high)
    assert float(mask[inside].double().mean()) == pytest.approx(replaced, abs=0.2 if 0 < replaced < 1 else 0)


@pytest.mark.parametrize("replaced", [0.1, 0.5, 0.9])
def test_share_of_replaced_elements(replaced):
    """About p of the elements, drawn anew at every step; five standard deviations are allowed."""
    estimator, step, zero = make(PEGE, 4, "affine", None)
    estimator.replaced = replaced
    x = rederived.spread((100_000,), step.flatten(), zero.flatten(), 4, "affine")
    low, high = (end.item() for end in estimator.range())
    x = x[(x > low) & (x < high)]
    with torch.no_grad():
        masks = [estimator(x) == estimator.eval_forward(x) for _ in range(2)]
    deviation = 5 * math.sqrt(replaced * (1 - replaced) / x.numel())
    for mask in masks:
        assert float(mask.double().mean()) == pytest.approx(replaced, abs=deviation)
    assert not torch.equal(*masks)


def test_eval_ignores_the_curriculum():
    estimator, step, zero = make(PEGE, 3, "symmetric", 0)
    x = rederived.spread(SHAPE, step, zero, 3, "symmetric")
    outputs = []
    for replaced in (0.0, 0.5, 1.0):
        estimator.replaced = replaced
        with torch.no_grad():
            outputs.append(estimator.eval()(x))
    estimator.replaced = 0.0
    estimator.freeze()
    with torch.no_grad():
        outputs.append(estimator.train()(x))  # frozen: no curriculum in training mode either
    assert all(torch.equal(out, outputs[0]) for out in outputs)
    _, expected = rederived.quantize(rederived.double(x), step, zero, 3, "symmetric")
    torch.testing.assert_close(rederived.double(outputs[0]), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("scheme", ["symmetric", "affine", "one_sided"])
def test_a_clipped_element_is_the_same_replaced_or_not(scheme):
    """Outside the range Q(x) is clamp(x): the forward does not depend on the mask, so no gradient may either."""
    gradients = []
    for replaced in (0.0, 1.0):
        torch.manual_seed(5)
        estimator, step, zero = make(PEGE, 3, scheme, None, weight=0.0)
        estimator.replaced = replaced
        low, high = (float(end) for end in rederived.ends(step, zero, 3, scheme))
        x = torch.cat([high + step.item() + torch.rand(50), low - step.item() - torch.rand(30)])
        _, _, to_x = run(estimator, x)
        assert not to_x.any()
        gradients.append([p.grad for p in (estimator.log2_scale, estimator.zero_fraction) if p is not None])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kappa", [0.1, 10.0, 300.0])
@pytest.mark.parametrize("curriculum", [0.25, 1.0])
def test_curriculum(kappa, curriculum):
    schedule = PEGE(4, kappa=kappa, curriculum=curriculum).schedules(40)["replaced"]
    expected = [rederived.pege_curriculum(t, kappa, curriculum * 40) for t in range(50)]
    assert [schedule(t) for t in range(50)] == pytest.approx(expected, abs=1e-12)
    assert (schedule(0), schedule(curriculum * 40), schedule(49)) == (0.0, 1.0, 1.0)


def test_no_curriculum_begins_replaced():
    assert PEGE(4, curriculum=0.0).schedules(40)["replaced"](0) == 1.0


@grids
def test_discretization_error(scheme, bits, axis):
    """Value and gradient of the error; Δ is held, so that a larger step is no cure."""
    estimator, step, zero = make(PEGE, bits, scheme, axis, weight=0.5)
    x = rederived.spread(SHAPE, step, zero, bits, scheme).requires_grad_()
    estimator(x)
    term = PEGE.regularizer([estimator], torch.tensor(3.0))  # does not scale with the task loss
    term.backward()
    error, gradient = rederived.discretization_error(rederived.double(x), step, zero, bits, scheme)
    torch.testing.assert_close(rederived.double(term), 0.5 * error, rtol=1e-4, atol=0)
    assert_sums_close(x.grad, 0.5 * gradient, (gradient.abs() + 1 / step / x.numel()).expand(SHAPE))
    assert estimator.log2_scale.grad is None
    assert PEGE.regularizer([estimator], torch.tensor(3.0)) is None  # each forward counts once


def test_discretization_error_is_the_mean_over_tensors():
    """A small tensor weighs as much as a large one, each with its own λ; λ = 0 adds nothing."""
    pairs = [make(PEGE, 3, "symmetric", None, weight=weight) for weight in (0.1, 2.0, 0.0)]
    expected = []
    for (estimator, step, zero), shape in zip(pairs, [(10,), (4, 50), (3,)], strict=True):
        x = rederived.spread(shape, step.flatten(), zero.flatten(), 3, "symmetric")
        estimator(x)
        error, _ = rederived.discretization_error(rederived.double(x), step.flatten(), zero.flatten(), 3, "symmetric")
        expected.append(estimator.weight * float(error))
    term = PEGE.regularizer([estimator for estimator, _, _ in pairs], torch.tensor(1.0))
    assert float(term.detach()) == pytest.approx((expected[0] + expected[1]) / 2, rel=1e-4)


@pytest.mark.parametrize("axis", [None, 0])
def test_a_step_next_to_zero_gives_infinite_gradients_not_an_exception(axis):
    """So that what watches over a run sees it diverge."""
    x = torch.randn(6, 5) * 1e-22
    estimator = PEGE(4, scheme="symmetric", **({} if axis is None else {"channels": 6, "axis": axis}))
    estimator.initialize_from(x)
    x.requires_grad_()
    estimator(x)
    PEGE.regularizer([estimator], torch.tensor(1.0)).backward()
    assert not torch.isfinite(x.grad).all()


def test_eval_forward_adds_no_error():
    estimator, step, zero = make(PEGE, 3, "symmetric", None)
    estimator.eval()(rederived.spread(SHAPE, step, zero, 3, "symmetric"))
    assert PEGE.regularizer([estimator], torch.tensor(1.0)) is None


@pytest.mark.parametrize(
    "option",
    [{"kappa": 0.0}, {"kappa": -1.0}, {"delta": -0.1}, {"weight": -1.0}, {"curriculum": 1.5}, {"weight": math.nan}],
)
def test_refused_options(option):
    with pytest.raises(SpecError, match=next(iter(option))):
        PEGE(4, **option)
