"""GDNSQ against the formulas: widths, noise-scale gradient, penalty, and the squeeze to the target."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from fxquant.errors import SpecError
from fxquant.estimators import GDNSQ

from . import rederived
from .test_lsq_ewgs_ste import SHAPE, assert_sums_close, grids, make, run

SCHEMES = ("symmetric", "one_sided", "affine")


def on_scheme(x, scheme):
    return x.abs() if scheme == "one_sided" else x


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("axis", [None, 0])
@pytest.mark.parametrize("initial", [10.0, 9.5, 16.0])
def test_where_the_squeeze_starts(scheme, axis, initial):
    """At ``initial_bits``, on the min-max range whatever ``init`` says: nothing is clipped until that is learned."""
    channels = {"channels": 4, "axis": 0} if axis == 0 else {}
    estimator = GDNSQ(4, scheme=scheme, init="mse", initial_bits=initial, **channels)
    x = on_scheme(torch.randn(SHAPE), scheme)
    estimator.initialize_from(x)
    widths = estimator.bit_width().detach()
    assert widths.tolist() == pytest.approx([initial] * len(widths), abs=1e-4)
    assert estimator.learns_width
    assert (estimator(x) - x).abs().max() <= 0.501 * estimator.scale().max()


def test_without_a_penalty_there_is_no_squeeze():
    """A plain QConfig's estimator is a whole grid at its width from the start; so are binary weights."""
    for estimator in (GDNSQ(4), GDNSQ(1, scheme="symmetric", initial_bits=10.0)):
        estimator.initialize_from(torch.randn(50))
        assert not estimator.learns_width
        assert GDNSQ.regularizer([estimator], torch.tensor(1.0)) is None
    assert GDNSQ(1, scheme="one_sided", initial_bits=10.0).learns_width


def squeezed(scheme, bits, axis=None, target=2, **options):
    """An estimator in the middle of its squeeze, at ``bits``; tests of formulas take whole ones, which end cleanly."""
    return make(GDNSQ, target, scheme, axis, initial_bits=bits, **options)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("axis", [None, 0])
def test_width(scheme, axis):
    """The inverse of the grid's table, differentiable in log2 of the step, and of the range of an activation."""
    estimator, step, _ = squeezed(scheme, 6.0, axis)
    with torch.no_grad():
        estimator.log2_scale += torch.rand_like(estimator.log2_scale)
    step = torch.exp2(rederived.double(estimator.log2_scale))
    if scheme == "symmetric":
        extent = rederived.double(estimator.weight_range)
        expected, by_log = rederived.gdnsq_weight_width(extent, step), -extent / (extent + step)
    else:
        extent = torch.exp2(rederived.double(estimator.log2_range))
        expected, by_log = rederived.gdnsq_activation_width(extent, step), -extent / (extent + step)
    widths = estimator.bit_width()
    torch.testing.assert_close(rederived.double(widths), expected, rtol=1e-6, atol=0)
    widths.sum().backward()
    torch.testing.assert_close(rederived.double(estimator.log2_scale.grad), by_log, rtol=1e-5, atol=0)
    if scheme != "symmetric":
        torch.testing.assert_close(rederived.double(estimator.log2_range.grad), -by_log, rtol=1e-5, atol=0)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(("towards", "passes"), [(1.0, False), (8.0, True)])
def test_at_the_lowest_width_only_what_wants_a_higher_one_passes(scheme, towards, passes):
    """No range is drawn in for bits that cannot be saved, and a step that has grown too far finds back."""
    estimator, _, _ = squeezed(scheme, 6.0, target=(3, 8))
    with torch.no_grad():
        estimator.log2_scale += 6.0
    widths = estimator.bit_width()
    assert widths.tolist() == pytest.approx([3 - 2e-3] * len(widths), abs=1e-5)
    (widths - towards).square().sum().backward()
    for parameter in (estimator.log2_scale, estimator.log2_range):
        if parameter is not None:
            assert bool(parameter.grad.any()) == passes
    assert not passes or (estimator.log2_scale.grad > 0).all()


def test_a_weights_range_is_its_own():
    """max|w| of the last forward, per channel; a channel of zeros keeps the range it had."""
    estimator = GDNSQ(3, scheme="symmetric", channels=3, axis=0, initial_bits=8.0)
    w = torch.tensor([[1.0, -2.0], [0.5, 0.25], [3.0, 1.0]])
    estimator.initialize_from(w)
    estimator(torch.tensor([[4.0, -2.0], [0.0, 0.0], [0.0, -1.5]]))
    assert estimator.weight_range.tolist() == [4.0, 0.5, 1.5]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("axis", [None, 0])
def test_gradients_with_the_residual(scheme, axis):
    """``noise_gradient=False``: the step gets the residual inside; x straight through; the range what it cuts off."""
    bits = 5
    estimator, step, zero = squeezed(scheme, float(bits), axis, noise_gradient=False)
    if scheme == "affine":  # ends that are levels of the grid
        with torch.no_grad():
            estimator.zero_fraction.copy_(zero.flatten() / 31)
    x = rederived.spread(SHAPE, step, zero, bits, scheme)
    if scheme == "symmetric":  # its range is its own: nothing lies outside
        low, high = (end.float() for end in rederived.ends(step, zero, bits, scheme))
        x = torch.where((x > low) & (x < high), x, 0.23 * step.float())
        x[:, :, 0, 0] = high.squeeze((2, 3))
    out, grad, to_x = run(estimator, x)
    x = rederived.double(x)
    _, expected = rederived.quantize(x, step, zero, bits, scheme)
    torch.testing.assert_close(rederived.double(out), expected, rtol=1e-5, atol=1e-6)
    u = x / step
    low, high = rederived.ends(step, zero, bits, scheme)
    inside = (x >= low * (1 + 1e-6)) & (x <= high * (1 + 1e-6))
    assert scheme == "symmetric" or not inside.all()
    torch.testing.assert_close(rederived.double(to_x), torch.where(inside, grad, 0.0), rtol=1e-6, atol=0)
    # Outside, the clamped value is the end of the range, which is a level: no residual, the range takes the gradient.
    residual = torch.where(inside, u.round() - u, 0.0)
    by_log = step * rederived.LN2
    size = grad.abs().sum_to_size(step.shape) * by_log * 2
    assert_sums_close(estimator.log2_scale.grad, (grad * residual).sum_to_size(step.shape) * by_log, size)
    if scheme != "symmetric":
        to_range = (torch.where(inside, 0.0, grad) * torch.where(x > high, high, low)).sum_to_size(step.shape)
        size = grad.abs().sum_to_size(step.shape) * (high - low)
        assert_sums_close(estimator.log2_range.grad, to_range * rederived.LN2, size)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_gradient_of_a_noise_scale(scheme):
    """A random sign times 1/sqrt(12) for the residual: mean 0, variance sum(g²)/12, whatever the residual is."""
    estimator, step, _ = squeezed(scheme, 8.0)
    x = on_scheme(torch.randn(200), scheme)
    x = x / x.abs().max() * float(step) * 50
    estimator(x)  # a weight's range follows
    grad = torch.randn(200)
    by_log = float(estimator.scale().detach()) * rederived.LN2
    gradients = []
    for _ in range(2000):
        estimator.log2_scale.grad = None
        estimator(x).backward(grad)
        gradients.append(float(estimator.log2_scale.grad) / by_log)
    gradients = torch.tensor(gradients, dtype=torch.float64)
    deviation = float((grad.double().square().sum() / 12).sqrt())
    assert float(gradients.mean()) == pytest.approx(0, abs=5 * deviation / math.sqrt(2000))
    assert float(gradients.std()) == pytest.approx(deviation, rel=5 / math.sqrt(2 * 2000))


def test_noise_gradient_leaves_the_forward_and_x_alone():
    results = []
    for noise_gradient in (False, True):
        torch.manual_seed(4)
        estimator, step, zero = squeezed("affine", 6.0, noise_gradient=noise_gradient)
        out, _, to_x = run(estimator, rederived.spread(SHAPE, step, zero, 6, "affine"))
        results.append((out, to_x, estimator.log2_range.grad, estimator.log2_scale.grad))
    (*plain, plain_step), (*noisy, noisy_step) = results
    assert all(map(torch.equal, plain, noisy))
    assert not torch.equal(plain_step, noisy_step)


@grids
def test_gradients_on_the_whole_grid(scheme, bits, axis):
    """Without a squeeze, the step's gradient is the residual's, at no gradient scale."""
    estimator, step, zero = make(GDNSQ, bits, scheme, axis)
    x = rederived.spread(SHAPE, step, zero, bits, scheme)
    out, grad, to_x = run(estimator, x)
    x = rederived.double(x)
    _, expected = rederived.quantize(x, step, zero, bits, scheme)
    torch.testing.assert_close(rederived.double(out), expected, rtol=1e-6, atol=0)
    expected_x, expected_step, _ = rederived.straight_through_gradients(x, grad, step, zero, bits, scheme)
    torch.testing.assert_close(rederived.double(to_x), expected_x, rtol=2e-5, atol=1e-6)
    by_log = step * rederived.LN2
    assert_sums_close(
        estimator.log2_scale.grad, expected_step * by_log, grad.abs().sum_to_size(step.shape) * by_log * 4
    )


@pytest.mark.parametrize(("end", "levels"), [((-1.4, 2.4), (-1, 2)), ((-1.7, 1.7), (-2, 2)), ((-2.4, 1.4), (-2, 1))])
def test_ends_while_squeezed(end, levels):
    """At a width that is not whole, at a step of 1: both ends round to a level, in training and in eval alike.

    What is cut off at either end teaches the range.
    """
    estimator = GDNSQ(2, scheme="affine", initial_bits=math.log2(end[1] - end[0] + 1))
    estimator.initialize_from(torch.tensor(end))
    for x, level in zip((-9.0, 9.0), levels, strict=True):
        assert estimator.eval()(torch.tensor([x])).tolist() == pytest.approx([level], abs=1e-5)
        estimator.log2_range.grad = None
        out = estimator.train()(torch.tensor([x]))
        assert out.tolist() == pytest.approx([level], abs=1e-5)
        out.backward()
        assert estimator.log2_range.grad.item() * x > 0


# ---- penalty ---------------------------------------------------------------------------------------------


def test_penalty():
    """Hinge times share of violations, weights and activations apart, times temperature and task loss."""
    weights = [
        squeezed("symmetric", 6.0, 0, target=4)[0],
        squeezed("symmetric", 3.5, 0, target=3)[0],
        squeezed("symmetric", 5.0, None, target=6)[0],  # below its target: no penalty, but counted
    ]
    with torch.no_grad():
        weights[0].log2_scale[:2] += 3.0
    activations = [squeezed("one_sided", 5.25, target=4)[0], squeezed("affine", 3.0, target=8)[0]]
    for estimator in (*weights, *activations):
        estimator.temperature = 7.0

    def hinge(group):
        excess = torch.cat([rederived.double(e.bit_width()) - (e.target - 1e-3) for e in group])
        return rederived.gdnsq_hinge(excess, 1e-3)

    expected = 7.0 * 0.3 * (hinge(weights) + hinge(activations))
    penalty = GDNSQ.regularizer([*weights, *activations], torch.tensor(0.3))
    torch.testing.assert_close(rederived.double(penalty), expected, rtol=1e-4, atol=0)
    assert float(expected) > 0
    # Its gradient: the share is held, each violated width pushes its own step up.
    penalty.backward()
    widths = torch.cat([e.bit_width().detach() for e in weights])
    violated = widths > torch.tensor([4 - 1e-3] * 4 + [3 - 1e-3] * 4 + [6 - 1e-3])
    gradients = torch.cat([e.log2_scale.grad for e in weights])
    assert torch.equal(gradients < 0, violated)
    by_width = 7.0 * 0.3 * float(violated.double().mean()) / len(widths)
    extent = torch.cat([e.weight_range for e in weights])
    step = torch.cat([e.scale().detach() for e in weights])
    by_log = -extent / (extent + step)
    torch.testing.assert_close(gradients, torch.where(violated, by_width * by_log, 0.0), rtol=1e-4, atol=0)


def test_no_penalty_at_the_target():
    estimators = [squeezed("symmetric", 4.0, 0, target=4)[0], squeezed("one_sided", 3.0, target=3)[0]]
    for estimator in estimators:
        estimator.temperature = 20.0
        with torch.no_grad():
            estimator.log2_scale += 2e-3  # past the margin
    penalty = GDNSQ.regularizer(estimators, torch.tensor(5.0))
    assert penalty.item() == 0


def test_temperature():
    """0 during warm-up, then linear to its final value."""
    schedule = GDNSQ(4, warmup=0.25, temperature=12.0).schedules(40)["temperature"]
    assert [schedule(t) for t in (0, 5, 10, 20, 25, 40, 60)] == [0, 0, 0, 4, 6, 12, 12]


# ---- the squeeze -----------------------------------------------------------------------------------------


class Quantized(nn.Module):
    """A convolution with quantizers on its input and its weight, squeezed from 10 bits."""

    def __init__(self, weight_bits, activation_bits, scheme):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.weight = GDNSQ(weight_bits, scheme="symmetric", channels=4, axis=0, initial_bits=10.0)
        self.input = GDNSQ(activation_bits, scheme=scheme, initial_bits=10.0)

    def forward(self, x):
        return nn.functional.conv2d(self.input(x), self.weight(self.conv.weight), self.conv.bias)


@pytest.mark.parametrize(
    ("weight_bits", "activation_bits", "scheme", "optimizer"),
    [
        (4, 4, "affine", torch.optim.RAdam),
        (2, 3, "one_sided", torch.optim.Adam),
        (3, (2, 5), "affine", torch.optim.Adam),
    ],
)
def test_squeeze(weight_bits, activation_bits, scheme, optimizer):
    """A few hundred steps bring every width to its target and the penalty to 0; then the grid is whole."""
    torch.manual_seed(1)
    model = Quantized(weight_bits, activation_bits, scheme)
    x = on_scheme(torch.randn(8, 3, 6, 6), scheme)
    model.weight.initialize_from(model.conv.weight)
    model.input.initialize_from(x)
    quantizers = [model.weight, model.input]
    assert GDNSQ.regularizer(quantizers, torch.tensor(1.0)).item() == 0  # no temperature yet
    wanted = torch.nn.functional.conv2d(x, model.conv.weight.detach() * 1.1)
    steps = optimizer(model.parameters(), lr=2e-2)
    at_rest = 0
    for step in range(900):
        for quantizer in quantizers:
            quantizer.temperature = 0.2 * step
        steps.zero_grad()
        task = (model(x) - wanted).square().mean()
        penalty = GDNSQ.regularizer(quantizers, task.detach())
        at_rest = at_rest + 1 if penalty.item() == 0 and step > 0 else 0
        if at_rest == 20:
            break
        (task + penalty).backward()
        steps.step()
    assert at_rest == 20
    for quantizer in quantizers:
        assert (quantizer.bit_width() <= quantizer.target).all()
        assert quantizer.learns_width
    whole = weight_bits, activation_bits if isinstance(activation_bits, int) else 3
    for quantizer, bits in zip(quantizers, whole, strict=True):
        quantizer.fix_width(bits)
        assert not quantizer.learns_width
        assert (quantizer.quant_min, quantizer.quant_max) == rederived.levels(bits, quantizer.grid_scheme)
        assert quantizer.bit_width().tolist() == [bits]
    assert GDNSQ.regularizer(quantizers, torch.tensor(1.0)) is None
    out = model(x)
    assert torch.equal(out, model.eval()(x))
    for quantizer, tensor in zip(quantizers, (model.conv.weight, x), strict=True):
        bits = quantizer.whole_bits
        low, high = rederived.levels(bits, quantizer.grid_scheme)
        codes = quantizer.codes(tensor)
        assert (codes.min(), codes.max()) == (low, high)  # to its ends, the grid is in use


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"initial_bits": 1.0}, r"initial_bits=1\.0"),
        ({"initial_bits": 17.0}, r"initial_bits=17\.0"),
        ({"warmup": 1.0}, r"warmup=1\.0"),
        ({"temperature": -1.0}, r"temperature=-1\.0"),
    ],
)
def test_refused_options(options, message):
    with pytest.raises(SpecError, match=message):
        GDNSQ(4, **options)


@pytest.mark.parametrize(("bits", "whole"), [(4, 4), ((2, 5), 5)])
def test_freezing_in_the_middle_of_a_squeeze_takes_the_target(bits, whole):
    estimator = GDNSQ(bits, scheme="affine", initial_bits=10.0)
    estimator.initialize_from(torch.linspace(-1, 3, 50))
    estimator.freeze()
    assert estimator.whole_bits == whole
