"""What every estimator keeps to, at every width, on every grid, whatever the tensor."""

from __future__ import annotations

import copy
import io
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

import fxquant
from fxquant.estimators import ESTIMATORS, GDNSQ
from tests.models import TinyResidual

from . import rederived

WIDTHS = range(1, 9)
SCHEMES = ("symmetric", "affine", "one_sided")
GRANULARITIES = ("tensor", "channel")

# How an estimator may be set up at a width: as asked for, squeezed from 10 bits, or learning the width.
VARIANTS = {name: partial(cls) for name, cls in ESTIMATORS.items()}
VARIANTS["gdnsq_squeezed"] = partial(ESTIMATORS["gdnsq"], initial_bits=10.0)
LEARNED = {
    "nipq_learned": partial(ESTIMATORS["nipq"], (1, 8)),
    "gdnsq_learned": partial(ESTIMATORS["gdnsq"], (1, 8)),
}
DETERMINISTIC = ("ste", "lsq", "ewgs", "pege", "gdnsq")

every = pytest.mark.parametrize("granularity", GRANULARITIES)


def each(variants):
    def decorate(test):
        for name, values in (("scheme", SCHEMES), ("bits", WIDTHS), ("variant", variants)):
            test = pytest.mark.parametrize(name, list(values))(test)
        return every(test)

    return decorate


@st.composite
def tensors(draw):
    """4-D tensors of any magnitude, skew and shape of distribution, with 1 to 4 channels on either axis."""
    shape = [draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(st.integers(1, 5)), draw(st.integers(1, 3))]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x = torch.randn(shape, generator=generator)
    kind = draw(st.sampled_from(["normal", "heavy", "uniform", "relu", "dead channel"]))
    if kind == "heavy":
        x = x**3
    elif kind == "uniform":
        x = torch.rand(shape, generator=generator)
    elif kind == "relu":
        x = x.relu()
    elif kind == "dead channel":
        x[:, 0] = 0
        x[0] = 0
    skew = draw(st.floats(-3, 3)) if kind != "relu" and draw(st.booleans()) else 0.0
    return (x + skew) * 10 ** draw(st.floats(-3, 3))


def build(variant, bits, scheme, granularity, x, axis, init="minmax"):
    """A fresh estimator for tensors like ``x``; no range yet."""
    options = {"channels": x.shape[axis], "axis": axis} if granularity == "channel" else {}
    options["init"] = init
    if variant in LEARNED:
        return LEARNED[variant](scheme=scheme, **options)
    return VARIANTS[variant](bits, scheme=scheme, **options)


def calibrated(*how):
    estimator = build(*how)
    x = how[4]
    estimator.initialize_from(x)
    return estimator


def viewed(values, x, axis):
    """One value per channel as numpy, shaped to broadcast against x."""
    shape = [1] * x.ndim
    shape[axis] = -1
    return values.numpy().reshape(shape) if values.numel() > 1 else values.numpy().reshape([1] * x.ndim)


# Doubling the step of 255 levels puts the end of the range on 127.5 steps.
TIE = torch.tensor([[[[154.0996, -29.3429]]], [[[-217.8789, 56.8431]]]])


def check_grid(estimator, x, axis):
    """Eval forward, qparams and codes are one and the same integer grid, bit for bit."""
    with torch.no_grad():
        out = estimator.eval()(x)
    scale, zero = estimator.calculate_qparams()
    quant_min, quant_max = estimator.quant_min, estimator.quant_max
    assert scale.dtype == torch.float32
    assert zero.dtype == torch.int32
    assert (scale > 0).all()
    assert ((zero >= quant_min) & (zero <= quant_max)).all()

    codes = estimator.codes(x)
    assert torch.equal(codes, codes.round())
    assert quant_min <= codes.min() <= codes.max() <= quant_max

    # numpy's float32 says the same as torch's, from calculate_qparams() alone.
    s, z = viewed(scale, x, axis), viewed(zero, x, axis)
    values = x.numpy()
    if isinstance(estimator, GDNSQ) and estimator.learns_width and estimator.scheme != "symmetric":
        # Until its width is whole, the range need not end on the grid: where it ends on a tie, what is beyond decides.
        values = np.clip(values, *(viewed(end.detach(), x, axis) for end in estimator.range()))
    if estimator.binary:
        expected = np.where(x.numpy() >= 0, np.float32(1), np.float32(-1))
    else:
        expected = np.clip(np.round(values * (np.float32(1) / s)) + z, quant_min, quant_max)
    np.testing.assert_array_equal(codes.numpy(), expected)
    np.testing.assert_array_equal(out.numpy(), (expected.astype(np.float32) - z.astype(np.float32)) * s)

    with torch.no_grad():
        assert torch.equal(estimator(out), out)  # idempotent
        if not estimator.binary:
            assert torch.equal(estimator(torch.zeros_like(x)), torch.zeros_like(x))
    return out


@each(VARIANTS)
@settings(max_examples=4)
@given(x=tensors(), axis=st.sampled_from([0, 1]), init=st.sampled_from(["minmax", "minmax", "percentile", "mse"]))
def test_grid(variant, bits, scheme, granularity, x, axis, init):
    """One grid in forward, qparams and codes; idempotent; zero stays zero. Also after freeze."""
    estimator = calibrated(variant, bits, scheme, granularity, x, axis, init)
    out = check_grid(estimator, x, axis)
    if variant in ESTIMATORS:
        assert (estimator.whole_bits, estimator.bit_width().tolist()) == (bits, [bits])
    estimator.freeze()
    frozen = check_grid(estimator, x, axis)
    if not variant.startswith("gdnsq_"):
        assert torch.equal(out, frozen)
    assert torch.equal(estimator.train()(x), frozen)


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("scheme", SCHEMES)
@settings(max_examples=12)
@given(x=tensors(), bits=st.integers(1, 8))
def test_first_range_is_that_of_the_table(name, scheme, x, bits):
    """After min-max calibration, step and zero-point are those of the grid on [min, max] widened to 0."""
    x = x.abs() if scheme == "one_sided" else x
    assume(float(x.abs().max()) > 2.0**-109)  # ranges down to 2**16 times the least normal float32 count as zero
    estimator = calibrated(name, bits, scheme, "tensor", x, 0)
    low, high = rederived.double(x.min().clamp(max=0)), rederived.double(x.max().clamp(min=0))
    if scheme == "symmetric":
        high = torch.maximum(-low, high)
    step, _ = rederived.step_of_range(low, high, bits, scheme)
    scale, zero = estimator.calculate_qparams()
    torch.testing.assert_close(rederived.double(scale), step.reshape(1), rtol=1e-5, atol=0)
    assert abs(float(zero) + (float(low / step) if scheme == "affine" else 0)) <= 0.5 + 1e-4


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("variant", LEARNED)
@every
@settings(max_examples=5)
@given(x=tensors(), axis=st.sampled_from([0, 1]), share=st.floats(-4, 4))
@example(x=TIE, axis=0, share=1.0)
def test_grid_of_a_learned_width(variant, scheme, granularity, x, axis, share):
    """The same wherever the width has got to."""
    estimator = calibrated(variant, None, scheme, granularity, x, axis)
    with torch.no_grad():
        if variant == "nipq_learned":
            estimator.raw_width.fill_(share)
        else:
            estimator.log2_scale.add_(share)
    check_grid(estimator, x, axis)
    estimator.freeze()
    assert 1 <= estimator.whole_bits <= 8
    check_grid(estimator, x, axis)


@each(DETERMINISTIC)
@settings(max_examples=3)
@given(x=tensors(), axis=st.sampled_from([0, 1]))
def test_trains_what_it_evaluates(variant, bits, scheme, granularity, x, axis):
    """Where training draws nothing at random, its forward is that of eval."""
    estimator = calibrated(variant, bits, scheme, granularity, x, axis)
    with torch.no_grad():
        assert torch.equal(estimator.train()(3 * x), estimator.eval()(3 * x))


@pytest.mark.parametrize("scheme", SCHEMES)
@every
@settings(max_examples=20)
@given(x=tensors(), axis=st.sampled_from([0, 1]), bits=st.floats(2.1, 6))
def test_trains_what_it_evaluates_while_squeezed(scheme, granularity, x, axis, bits):
    """Also at a width that is not whole: the ends of the range are the same in training and in eval."""
    channels = {"channels": x.shape[axis], "axis": axis} if granularity == "channel" else {}
    estimator = ESTIMATORS["gdnsq"]((2, 8), initial_bits=bits, scheme=scheme, **channels)
    estimator.initialize_from(x)
    with torch.no_grad():
        assert torch.equal(estimator.train()(3 * x), estimator.eval()(3 * x))


@pytest.mark.parametrize("name", ESTIMATORS)
@given(x=tensors())
def test_auto_scheme(name, x):
    """``auto`` is one-sided exactly for data without a negative value, and says so to nobody but the grid."""
    estimator = ESTIMATORS[name](4)
    estimator.initialize_from(x)
    assert estimator.grid_scheme == ("one_sided" if x.min() >= 0 else "affine")
    assert (estimator.quant_min, estimator.quant_max) == (0, 15)
    check_grid(estimator, x, 0)


# ---- learning --------------------------------------------------------------------------------------------


def step_once(estimator, x, seed):
    """One SGD step on a random linear loss; the largest change of each parameter is a hundredth of its size."""
    estimator.train()
    torch.manual_seed(seed)
    before = {name: p.detach().clone() for name, p in estimator.named_parameters()}
    learning = [p for p in estimator.parameters() if p.requires_grad]
    if not learning:
        assert not estimator(x).requires_grad
        return before
    out = estimator(x.clone().requires_grad_())
    (out * torch.randn_like(out)).sum().backward()
    for p in learning:
        if p.grad is not None and p.grad.abs().max() > 0:
            lr = 0.01 * max(1.0, float(p.detach().abs().max())) / float(p.grad.abs().max())
            torch.optim.SGD([p], lr=lr).step()
    return before


def moved(estimator, before):
    """The parameters of which every value moved, and those of which any did."""
    changed = {name: p.detach() != before[name] for name, p in estimator.named_parameters()}
    return {n for n, c in changed.items() if c.all()}, {n for n, c in changed.items() if c.any()}


@each(VARIANTS)
@settings(max_examples=3)
@given(seed=st.integers(0, 1000), magnitude=st.floats(-3, 3), axis=st.sampled_from([0, 1]))
def test_parameters(variant, bits, scheme, granularity, seed, magnitude, axis):
    """All there from the start, none added later; each that should learn moves in one step."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, 3, 6, 6, generator=generator) * 10**magnitude
    if scheme == "one_sided":
        x = x.abs()
    estimator = build(variant, bits, scheme, granularity, x, axis)
    names = {name: p.shape for name, p in estimator.named_parameters()}
    state = set(estimator.state_dict())
    estimator.initialize_from(x)
    before = step_once(estimator, 2 * x, seed)  # twice the range: there is something to clip
    expected = {"raw_range"} if variant == "nipq" else {"log2_scale"}
    squeezed = variant == "gdnsq_squeezed" and not (scheme == "symmetric" and bits == 1)
    if scheme == "affine":
        expected.add("zero_fraction")
    if squeezed and scheme != "symmetric":
        expected.add("log2_range")
    if variant == "ste":
        expected = set()
    all_moved, any_moved = moved(estimator, before)
    assert all_moved == any_moved == expected
    assert {name: p.shape for name, p in estimator.named_parameters()} == names
    assert set(estimator.state_dict()) == state
    assert all(torch.isfinite(p).all() for p in estimator.parameters())


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", ["lsq", "ewgs", "pege", "gdnsq", "nipq"])
def test_zero_fraction_rests_without_clipping(name, scheme):
    """The zero-point's gradient comes from clipped values alone."""
    x = torch.randn(4, 4)
    estimator = ESTIMATORS[name](8, scheme=scheme, init="minmax")
    estimator.initialize_from(x)
    before = step_once(estimator, 0.9 * x, 0)
    assert moved(estimator, before)[1] == ({"raw_range"} if name == "nipq" else {"log2_scale"})


@pytest.mark.parametrize("name", ["lsq", "ewgs", "pege", "gdnsq"])
@pytest.mark.parametrize(("fraction", "sign"), [(-0.01, -1), (1.01, 1)])
def test_a_zero_fraction_beyond_its_range_comes_back(name, fraction, sign):
    """Negative data on a grid from 0 up, and the other way round: all are clipped until the zero-point moves."""
    x = sign * torch.rand(256)
    estimator = ESTIMATORS[name](4, scheme="affine")
    estimator.initialize_from(torch.linspace(-1, 1, 256))
    gradients = {}
    for wanted in (x, -x):
        with torch.no_grad():
            estimator.zero_fraction.fill_(fraction)
        estimator.zero_fraction.grad = None
        (estimator.train()(x) - wanted).square().sum().backward()
        gradients[wanted is x] = float(estimator.zero_fraction.grad)
    assert gradients[True] * (fraction - 0.5) > 0, "descent brings it back"
    assert gradients[False] == 0, "and takes it no farther out"


@pytest.mark.parametrize("variant", LEARNED)
def test_learned_width_moves(variant):
    """A learned width has a gradient: from the task in NIPQ, from the step and the range in GDNSQ."""
    x = torch.randn(64, 8)
    estimator = calibrated(variant, None, "affine", "tensor", x, 0)
    with torch.no_grad():
        before = estimator.bit_width().clone()
    step_once(estimator, 2 * x, 0)
    assert (estimator.bit_width().detach() != before).all()


@pytest.mark.parametrize("name", ESTIMATORS)
def test_prepare_makes_every_parameter(name):
    """After prepare(), with or without data, a training step adds and loses no parameter, and reaches all in use."""
    torch.manual_seed(1)
    x = torch.randn(4, 3, 16, 16)
    rules = [fxquant.Rule("*", 3, 3, estimator=name)]
    without_data = fxquant.prepare(TinyResidual(), rules, example_inputs=(x,))
    model = fxquant.prepare(TinyResidual(), rules, calibration=[x]).train()
    names = {n: p.shape for n, p in model.named_parameters()}
    assert {n: p.shape for n, p in without_data.named_parameters()} == names
    optimizer = torch.optim.SGD(model.parameters(), lr=1e3)  # steps of a 10-bit grid have small gradients
    fxquant.QATLoss(torch.nn.functional.cross_entropy)(model, 3 * x, torch.arange(4)).total.backward()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer.step()
    assert {n: p.shape for n, p in model.named_parameters()} == names
    still = {n for n, p in model.named_parameters() if torch.equal(p, before[n])}
    learning = {"ste": (), "nipq": ("raw_range",), "gdnsq": ("log2_scale",)}.get(name, ("log2_scale",))
    for layer in ("stem", "conv1", "conv2", "shortcut", "head"):
        assert not {f"{layer}.weight"} & still
        for kind in ("weight_fake_quant", "input_fake_quant"):
            assert not {f"{layer}.{kind}.{parameter}" for parameter in learning} & still
            if name == "ste":
                assert f"{layer}.{kind}.log2_scale" in still


# ---- state -----------------------------------------------------------------------------------------------


@each(VARIANTS)
@settings(max_examples=3)
@given(x=tensors(), axis=st.sampled_from([0, 1]), stage=st.sampled_from(["training", "fixed", "frozen"]))
def test_state(variant, bits, scheme, granularity, x, axis, stage):
    """A strict state dict through a file, and a deep copy, carry everything: while training, fixed and frozen."""
    estimator = calibrated(variant, bits, scheme, granularity, x, axis).train()
    out = estimator(x.clone().requires_grad_())
    assert out.requires_grad
    if stage != "training":
        estimator.fix_width(bits)
    if stage == "frozen":
        estimator.freeze()
    copied = copy.deepcopy(estimator)  # its training graph is still alive
    file = io.BytesIO()
    torch.save(estimator.state_dict(), file)
    file.seek(0)
    loaded = build(variant, bits, scheme, granularity, x, axis)
    loaded.load_state_dict(torch.load(file, weights_only=True), strict=True)
    with torch.no_grad():
        expected = estimator.eval()(x)
        for other in (copied, loaded):
            assert torch.equal(other.eval()(x), expected)
            assert other.learns_width == estimator.learns_width
            assert torch.equal(other.bit_width(), estimator.bit_width())
            assert all(map(torch.equal, other.calculate_qparams(), estimator.calculate_qparams()))
            for name, parameter in estimator.named_parameters():
                assert other.get_parameter(name).requires_grad == parameter.requires_grad


@pytest.mark.parametrize("name", ESTIMATORS)
def test_one_sided_survives_the_state_dict(name):
    """``auto`` that became one-sided is one-sided in the estimator that loads it."""
    estimator = ESTIMATORS[name](4)
    estimator.initialize_from(torch.rand(100))
    loaded = ESTIMATORS[name](4)
    loaded.load_state_dict(estimator.state_dict())
    assert loaded.grid_scheme == "one_sided"
    assert not loaded.zero_fraction.requires_grad


@pytest.mark.parametrize("name", ESTIMATORS)
def test_without_a_range(name):
    """Nothing is quantized, frozen or guessed before a range is set."""
    estimator = ESTIMATORS[name](4)
    with pytest.raises(fxquant.FxQuantError, match="no range has been set yet"):
        estimator.freeze()
    estimator.disable_observer()
    with pytest.raises(fxquant.FxQuantError, match="no range has been set yet"):
        estimator(torch.randn(3))


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 9}, "bits=9"),
        ({"bits": 0}, "bits=0"),
        ({"bits": 2.5}, "bits=2.5"),
        ({"scheme": "other"}, "scheme='other'"),
        ({"init": "other"}, "init='other'"),
        ({"percentile": 0.0}, "percentile=0.0"),
        ({"channels": 3}, "channels=3"),
    ],
)
def test_refused_options(name, options, message):
    with pytest.raises(fxquant.FxQuantError, match=message):
        ESTIMATORS[name](**options)


@pytest.mark.parametrize("name", ["ste", "lsq", "ewgs", "pege"])
def test_whole_widths_only(name):
    with pytest.raises(fxquant.FxQuantError, match=r"bits=\(2, 8\) asks the estimator .* which it cannot"):
        ESTIMATORS[name]((2, 8))


@pytest.mark.parametrize("bits", [(4, 4), (5, 2), (1, 9), (1, 2, 3)])
def test_refused_intervals(bits):
    with pytest.raises(fxquant.FxQuantError, match="was asked for"):
        ESTIMATORS["nipq"](bits)


def test_unknown_estimator():
    with pytest.raises(fxquant.FxQuantError, match="did you mean 'nipq'"):
        fxquant.Rule("*", 4, 4, estimator="nipk")
