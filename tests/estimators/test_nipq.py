"""NIPQ against the formulas: forward with given noise, gradients to input, range and width, and the noise itself."""

from __future__ import annotations

import math

import pytest
import torch

from fxquant.errors import SpecError
from fxquant.estimators import NIPQ, nipq

from . import rederived
from .test_lsq_ewgs_ste import SHAPE, assert_sums_close, grids, make, run


@pytest.fixture
def given_noise(monkeypatch):
    """Replaces what is drawn by a known tensor; tells what it was to be drawn from."""
    noise, residuals = torch.rand(SHAPE) - 0.5, []

    def draw(self, residual, shape):
        residuals.append(residual.clone())
        return noise

    monkeypatch.setattr(nipq._Noise, "__call__", draw)
    return noise, residuals


def alpha_of(estimator, step, bits, scheme):
    return step * rederived.nipq_steps(bits, scheme)


@grids
def test_forward_and_gradients(given_noise, scheme, bits, axis):
    """x + n·Δ inside, the bound outside; gradients to x and, through softplus, to the range."""
    estimator, step, zero = make(NIPQ, bits, scheme, axis)
    alpha = alpha_of(estimator, step, bits, scheme)
    x = rederived.spread(SHAPE, step, zero, bits, scheme)
    out, grad, to_x = run(estimator, x)
    x, noise = rederived.double(x), rederived.double(given_noise[0])
    torch.testing.assert_close(
        rederived.double(out), rederived.nipq_forward(x, noise, alpha, zero, bits, scheme), rtol=1e-5, atol=1e-5
    )
    expected_x, expected_alpha, _ = rederived.nipq_gradients(x, grad, noise, alpha, zero, bits, scheme)
    torch.testing.assert_close(rederived.double(to_x), expected_x, rtol=0, atol=0)
    soft, by_raw = rederived.softplus(rederived.double(estimator.raw_range))
    torch.testing.assert_close(soft, alpha.flatten(), rtol=1e-6, atol=0)
    size = grad.abs().sum_to_size(step.shape)
    assert_sums_close(estimator.raw_range.grad, expected_alpha.flatten() * by_raw, size)


@pytest.mark.parametrize("axis", [None, 0])
@pytest.mark.parametrize("scheme", ["symmetric", "one_sided", "affine"])
def test_what_noise_is_drawn_from(given_noise, scheme, axis):
    """The residuals round(x/Δ) - x/Δ of this very tensor."""
    estimator, step, zero = make(NIPQ, 3, scheme, axis)
    x = rederived.spread(SHAPE, step, zero, 3, scheme)
    estimator(x)
    (residual,) = given_noise[1]
    u = rederived.double(x) / step
    torch.testing.assert_close(rederived.double(residual), torch.round(u) - u, rtol=0, atol=1e-4)


@pytest.mark.parametrize("sampler", nipq.SAMPLERS)
def test_noise_of_the_binary_grid(sampler):
    """Its cells reach from -2Δ to 2Δ, so rounding is off by a step at most; what is clipped lends no noise."""
    estimator, step, zero = make(NIPQ, 1, "symmetric", None, sampler=sampler)
    step = step.flatten()
    x = rederived.spread((20_000,), step, zero.flatten(), 1, "symmetric")
    noise = rederived.double(estimator(x) - x) / step
    u = rederived.double(x) / step
    inside = u.abs() <= 2
    assert noise[inside].abs().max() <= 1 + 1e-5
    residual = (torch.sign(u) - u)[inside]
    assert rederived.distribution_distance(noise[inside], residual) < 1.95 * math.sqrt(2 / int(inside.sum())) + 0.01
    torch.testing.assert_close((u + noise)[~inside], torch.sign(u)[~inside], rtol=0, atol=1e-5)


@pytest.mark.parametrize("jitter", [-0.45, 0.0, 0.45])
@pytest.mark.parametrize("raw", [-1.2, -0.3, 0.9])
@pytest.mark.parametrize("scheme", ["symmetric", "one_sided", "affine"])
def test_learned_width(monkeypatch, given_noise, scheme, raw, jitter):
    """b = b_min + (b_max - b_min)·sigmoid(β), jittered and rounded; gradient n·∂Δ/∂b, straight through the rounding."""
    estimator, _, _ = make(NIPQ, (2, 7), scheme, None)
    with torch.no_grad():
        estimator.raw_width.fill_(raw)
    width, by_raw = rederived.nipq_width(rederived.double(estimator.raw_width), 2, 7)
    torch.testing.assert_close(rederived.double(estimator.bit_width()), width, rtol=1e-6, atol=0)
    bits = int((width + jitter).round().clamp(2, 7))
    alpha, _ = rederived.softplus(rederived.double(estimator.raw_range))
    zero = (rederived.double(estimator.zero_fraction) * (2**bits - 1)).round() if scheme == "affine" else alpha * 0
    x = rederived.spread(SHAPE, alpha / rederived.nipq_steps(bits, scheme), zero, bits, scheme)
    monkeypatch.setattr(torch, "rand_like", lambda like: torch.full_like(like, 0.5 + jitter))
    out, grad, to_x = run(estimator, x)
    x, noise = rederived.double(x), rederived.double(given_noise[0])
    expected = rederived.nipq_forward(x, noise, alpha, zero, bits, scheme)
    torch.testing.assert_close(rederived.double(out), expected, rtol=1e-5, atol=1e-5)
    expected_x, _, to_bits = rederived.nipq_gradients(x, grad, noise, alpha, zero, bits, scheme)
    torch.testing.assert_close(rederived.double(to_x), expected_x, rtol=0, atol=0)
    torch.testing.assert_close(
        rederived.double(estimator.raw_width.grad), (to_bits * by_raw).reshape(1), rtol=1e-4, atol=1e-6
    )


def test_jitter_tries_neighbouring_widths():
    """At b = 4.3, U(-1/2, 1/2) and rounding give 4 at 70 % and 5 at 30 %; eval uses 4, always."""
    estimator, _, _ = make(NIPQ, (2, 7), "symmetric", None)
    with torch.no_grad():
        estimator.raw_width.fill_(math.log(2.3 / 2.7))
    tried = torch.tensor([float(estimator._jittered_width().detach()) for _ in range(2000)])
    assert set(tried.tolist()) == {4.0, 5.0}
    assert float((tried == 5).double().mean()) == pytest.approx(0.3, abs=0.05)  # five standard deviations
    assert estimator.eval().quant_max == 7


def test_jitter_stays_in_the_interval():
    estimator, _, _ = make(NIPQ, (2, 4), "symmetric", None)
    for raw, tried in ((-30.0, {2.0}), (30.0, {4.0})):
        with torch.no_grad():
            estimator.raw_width.fill_(raw)
        assert {float(estimator._jittered_width().detach()) for _ in range(50)} == tried


def test_where_a_learned_width_starts():
    assert float(NIPQ((2, 8), initial_width=0.5).bit_width().detach()) == pytest.approx(5)
    assert float(NIPQ((2, 8)).bit_width().detach()) == pytest.approx(2 + 6 * 0.9)


def skewed(count, step):
    """Values whose residuals are far from uniform: all just above a level of the grid."""
    return (torch.randint(-3, 3, (count,)) + 0.35 * torch.rand(count).square()) * step


@pytest.mark.parametrize("sampler", nipq.SAMPLERS)
def test_distribution_of_the_noise(sampler):
    """Noise and residuals have the same mean, deviation and distribution, which is not the uniform one."""
    count = 200_000
    estimator, step, _ = make(NIPQ, 3, "symmetric", None, sampler=sampler)
    x = skewed(count, float(step))
    noise = rederived.double(estimator(x) - x) / step.flatten()
    u = rederived.double(x) / step.flatten()
    residual = u.round() - u
    error = float(residual.std()) / math.sqrt(count)
    assert float(noise.mean()) == pytest.approx(float(residual.mean()), abs=5 * error)
    assert float(noise.std()) == pytest.approx(float(residual.std()), rel=0.01)
    # Two samples of this size from one distribution are farther apart than this once in a thousand times; the
    # histogram smears the peak at 0 over one of its 256 bins.
    limit = 1.95 * math.sqrt(2 / count) + (0.0 if sampler == "bootstrap" else 0.05)
    assert rederived.distribution_distance(noise, residual) < limit
    assert rederived.distribution_distance(torch.rand(count) - 0.5, residual) > 0.4
    # Drawn, not each element's own, and anew at every step.
    assert abs(float(torch.corrcoef(torch.stack([noise, residual]))[0, 1])) < 0.02
    assert not torch.equal(estimator(x), estimator(x))


@pytest.mark.parametrize("bits", [1, 3])
@pytest.mark.parametrize("sampler", nipq.SAMPLERS)
def test_noise_is_the_same_in_backward_whatever_keeps_the_input(sampler, bits):
    """Hooks may bring it back in another order in memory."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    grad = torch.randn_like(x)
    gradients = []
    for pack in (lambda t: t, lambda t: t.contiguous()):
        torch.manual_seed(1)
        estimator, _, _ = make(NIPQ, bits, "symmetric", None, sampler=sampler)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = estimator(x.clone().requires_grad_())
        out.backward(grad)
        gradients.append(estimator.raw_range.grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-5, atol=0)


@pytest.mark.parametrize("sampler", nipq.SAMPLERS)
def test_noise_of_a_single_value(sampler):
    estimator, _, _ = make(NIPQ, 3, "symmetric", None, sampler=sampler)
    x = torch.tensor([0.4]) * estimator.alpha().detach()
    out = estimator(x).detach()
    assert torch.isfinite(out).all()
    torch.testing.assert_close(
        out, estimator.eval()(x).detach(), atol=float(estimator.calculate_qparams()[0]) / 100, rtol=0
    )


@grids
def test_noise_is_off_once_the_width_is_fixed(scheme, bits, axis):
    """From then on training rounds truly, with r in the place of n in the range's gradient; so does eval always."""
    estimator, step, zero = make(NIPQ, bits, scheme, axis)
    x = rederived.spread(SHAPE, step, zero, bits, scheme)
    _, expected = rederived.quantize(rederived.double(x), step, zero, bits, scheme)
    with torch.no_grad():
        torch.testing.assert_close(rederived.double(estimator.eval()(x)), expected, rtol=1e-6, atol=0)
        noisy = estimator.train()(x)
        assert not torch.equal(noisy, estimator.eval()(x))
    assert estimator.noise
    assert not estimator.settled
    estimator.train().fix_width(bits)
    assert not estimator.noise
    assert estimator.settled
    step, zero = (rederived.double(v).reshape(step.shape) for v in estimator.calculate_qparams())
    out, grad, to_x = run(estimator, x)
    torch.testing.assert_close(rederived.double(out), expected, rtol=1e-5, atol=0)
    x = rederived.double(x)
    u, alpha = x / step, alpha_of(estimator, step, bits, scheme)
    residual = torch.sign(u) - u if rederived.is_binary(bits, scheme) else u.round() - u
    expected_x, expected_alpha, _ = rederived.nipq_gradients(x, grad, residual, alpha, zero, bits, scheme)
    torch.testing.assert_close(rederived.double(to_x), expected_x, rtol=0, atol=0)
    _, by_raw = rederived.softplus(rederived.double(estimator.raw_range))
    size = grad.abs().sum_to_size(step.shape)
    assert_sums_close(estimator.raw_range.grad, expected_alpha.flatten() * by_raw, size)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_without_noise_training_rounds_truly_from_the_start(bits):
    estimator, _, _ = make(NIPQ, bits, "symmetric", None, sampler="none")
    x = torch.randn(SHAPE)
    assert not estimator.noise
    assert estimator.settled
    assert torch.equal(estimator.train()(x), estimator.eval()(x))


def test_fixing_a_learned_width():
    """The whole grid on the same range; the width learns no more, and its parameter stays where it is."""
    estimator, _, _ = make(NIPQ, (2, 8), "affine", None)
    x = torch.randn(SHAPE)
    alpha = estimator.alpha().detach().clone()
    estimator.fix_width(3)
    torch.testing.assert_close(estimator.alpha().detach(), alpha)
    assert (estimator.quant_min, estimator.quant_max, estimator.bit_width().tolist()) == (0, 7, [3.0])
    estimator(x).sum().backward()
    assert estimator.raw_width.grad is None
    assert estimator.raw_range.grad is not None


@pytest.mark.parametrize("alpha", [1e-6, 1e-3, 1.0, 19.9, 20.1, 1e4])
def test_range_of_any_size(alpha):
    """softplus and its inverse over ten decades."""
    estimator = NIPQ(4, scheme="symmetric", init="minmax")
    estimator.initialize_from(torch.tensor([alpha, -alpha / 3]))
    assert float(estimator.alpha().detach()) == pytest.approx(alpha, rel=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"sampler": "gauss"}, "gauss.*bootstrap"), ({"initial_width": 1.0}, r"initial_width=1\.0")],
)
def test_refused_options(options, message):
    with pytest.raises(SpecError, match=message):
        NIPQ(4, **options)
