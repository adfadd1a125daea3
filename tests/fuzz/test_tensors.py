"""Tensors of every value, layout and type through each estimator, and through a model at each of its stages."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

import fxquant as fq
from fxquant import grid
from fxquant.errors import EmptyDataError, NonFiniteError
from fxquant.estimators import ESTIMATORS
from tests.models import TinyResidual

from . import cases

LARGEST, SMALLEST = torch.finfo(torch.float32).max, 2.0**-149
VARIANTS = {name: partial(cls) for name, cls in ESTIMATORS.items()}
VARIANTS |= {
    "gdnsq_squeezed": partial(ESTIMATORS["gdnsq"], initial_bits=10.0),
    "pege_halfway": partial(ESTIMATORS["pege"]),
    "nipq_bootstrap": partial(ESTIMATORS["nipq"], sampler="bootstrap"),
    "nipq_histogram": partial(ESTIMATORS["nipq"], sampler="histogram"),
}
LEARNED = {"nipq_learned": ESTIMATORS["nipq"], "gdnsq_learned": ESTIMATORS["gdnsq"]}

SPECIAL = [0.0, -0.0, 1.0, -1.0, 1e30, -1e30, LARGEST, -LARGEST, SMALLEST, -SMALLEST, 2.0**-126, 1e-20]
LAYOUTS = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x,
    "transposed": lambda x: x.mT.contiguous().mT if x.ndim > 1 else x,
    "strided": lambda x: torch.stack([x, x + 1], -1)[..., 0],
    "offset": lambda x: torch.cat([x[:1], x])[1:] if x.ndim else x,
    "expanded": lambda x: x[:1].expand_as(x) if x.ndim else x,
}


@st.composite
def tensors(draw, special: bool = True, shapes=None) -> Tensor:
    """A float32 tensor of 0 to 4 dimensions, contiguous, of any finite values."""
    if shapes is None:
        shapes = st.one_of(
            st.tuples(*[st.integers(1, 4)] * 4), st.tuples(st.integers(1, 5), st.integers(1, 6)),
            st.tuples(st.integers(1, 9)), st.just(()),
        )  # fmt: skip
    shape = draw(shapes)
    torch.manual_seed(draw(st.integers(0, 2**31)))
    x = torch.randn(shape) * 10.0 ** draw(st.sampled_from([0, 0, 0, -3, 4, -30, 18, -38, -44]))
    kind = draw(st.sampled_from(["as drawn", "constant", "relu", "special", "mixed"]))
    if kind == "constant":
        x = torch.full(shape, draw(st.sampled_from(SPECIAL)))
    elif kind == "relu":
        x = x.relu()
    elif special and kind in ("special", "mixed") and x.numel():
        values = torch.tensor(SPECIAL)[torch.randint(len(SPECIAL), shape)]
        x = values if kind == "special" else torch.where(torch.rand(shape) < 0.2, values, x)
    return x


def build(draw, x: Tensor):
    """An estimator for tensors like ``x``, without a range."""
    name = draw(st.sampled_from([*VARIANTS, *LEARNED]))
    options = {"scheme": draw(st.sampled_from([*grid.SCHEMES, "auto"]))}
    options["init"] = draw(st.sampled_from(["mse", "minmax", "percentile"]))
    if x.ndim > 1 and draw(st.booleans()):
        axis = draw(st.integers(0, 1))
        options |= {"channels": x.shape[axis], "axis": axis}
    estimator = (
        LEARNED[name]((1, 8), **options) if name in LEARNED else VARIANTS[name](draw(st.integers(1, 8)), **options)
    )
    if name == "pege_halfway":
        estimator.replaced = 0.5
    estimator.where = "layer7.input_fake_quant"
    return estimator


@st.composite
def calibrated(draw):
    """(estimator with its range set, a finite tensor to go through it)."""
    seen = draw(tensors())
    assume(float(seen.abs().max()) < LARGEST / 4)  # else the range is refused
    estimator = build(draw, seen)
    estimator.initialize_from(seen)
    x = draw(tensors(shapes=st.just(seen.shape)))
    return estimator, x


def on_its_grid(estimator, x: Tensor) -> None:
    """Eval gives codes inside the width, read back; and calculate_qparams() says which."""
    with torch.no_grad():
        out = estimator.eval()(x)
    assert out.dtype == torch.float32
    assert out.shape == x.shape
    assert torch.isfinite(out).all()
    scale, zero = estimator.calculate_qparams()
    assert torch.isfinite(scale).all()
    assert (scale > 0).all()
    codes = estimator.codes(x.float())
    assert ((codes >= estimator.quant_min) & (codes <= estimator.quant_max) & (codes == codes.round())).all()
    scale, zero = (grid.channel_view(v, x.ndim, estimator.axis) for v in (scale, zero))
    assert torch.equal(out, (codes - zero) * scale)


# ---- values ----------------------------------------------------------------------------------------------


@cases(100)
@given(calibrated(), st.sampled_from(["training", "fixed", "frozen"]))
def test_finite_tensors_stay_finite_and_on_the_grid(case, stage):
    estimator, x = case
    if stage == "fixed":
        assume(float(x.abs().max()) < LARGEST / 4)  # the next tensor may set the range anew
        estimator.fix_width(estimator.whole_bits)
    elif stage == "frozen":
        estimator.freeze()
    # Training computes with x/s: what is more than float32's largest number of steps away is no training any more.
    if stage == "frozen" or float(x.abs().max() / estimator.calculate_qparams()[0].min()) <= 1e30:
        x.requires_grad_()
        out = estimator.train()(x)
        assert out.shape == x.shape
        assert torch.isfinite(out).all()
        if stage != "frozen" and float(x.detach().abs().max()) <= 1e30:
            (out * torch.randn_like(out)).sum().backward()
            assert torch.isfinite(x.grad).all()
            assert all(torch.isfinite(p.grad).all() for p in estimator.parameters() if p.grad is not None)
    on_its_grid(estimator, x.detach())
    estimator.freeze()
    on_its_grid(estimator, x.detach())
    with torch.no_grad():
        assert torch.equal(estimator.train()(x), estimator.eval()(x))


@cases(50)
@given(st.data(), tensors(), st.sampled_from([math.nan, math.inf, -math.inf]))
def test_no_range_is_set_from_what_is_no_number(data, x, value):
    assume(x.numel())
    x.view(-1)[data.draw(st.integers(0, x.numel() - 1))] = value
    estimator = build(data.draw, x)
    for train in (True, False):
        with pytest.raises(NonFiniteError, match=r"layer7.input_fake_quant: \d+ of \d+ values are NaN or infinite"):
            estimator.train(train)(x)
    assert not estimator.initialized


@cases(50)
@given(calibrated(), st.integers(0, 10**6), st.booleans())
def test_nan_stays_nan_and_infinity_saturates(case, place, train):
    """Neither becomes an ordinary number by the way; but for the two-level grid, which has a level for everything."""
    estimator, x = case
    assume(x.numel() and not estimator.binary)
    x = x.contiguous()
    index = place % x.numel()
    with torch.no_grad():
        x.view(-1)[index] = math.nan
        assert estimator.train(train)(x).reshape(-1)[index].isnan()
        low, high = (end.max() if i else end.min() for i, end in enumerate(estimator.range()))
        for value in (math.inf, -math.inf):
            x.view(-1)[index] = value
            out = estimator.eval()(x).reshape(-1)[index]
            step = float(estimator.calculate_qparams()[0].max())  # until a width is whole, ranges need not end on it
            assert low - step <= out <= high + step


# ---- layouts and types -----------------------------------------------------------------------------------


@cases(60)
@given(calibrated(), st.sampled_from(sorted(LAYOUTS)), st.sampled_from([torch.float16, torch.bfloat16, torch.float64]))
def test_layouts_and_types_make_no_difference(case, layout, dtype):
    """Nor do they to the gradient of the tensor."""
    estimator, x = case
    assume(float(x.abs().max() if x.numel() else 0) <= 1e18)
    laid = LAYOUTS[layout](x)
    results = []
    for tensor in (laid.contiguous().clone(), laid, laid.contiguous().to(dtype).float(), laid.to(dtype)):
        tensor = tensor.detach().requires_grad_()
        torch.manual_seed(0)
        out = estimator.train()(tensor)
        torch.manual_seed(1)
        (out * torch.randn(out.shape)).sum().backward()
        assert out.dtype == torch.float32
        assert tensor.grad.dtype == tensor.dtype
        results.append((out.detach(), tensor.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert torch.equal(results[2][0].nan_to_num(), results[3][0].nan_to_num())


@cases(40)
@given(st.data(), st.sampled_from([(0, 3, 4, 4), (0, 5), (2, 0), (0,)]), st.booleans())
def test_an_empty_batch_passes_and_sets_no_range(data, shape, train):
    empty = torch.empty(shape)
    example = torch.randn([size or 3 for size in shape])
    estimator = build(data.draw, example).train(train)
    with pytest.raises(
        EmptyDataError, match=r"layer7.input_fake_quant: an empty tensor of shape .* cannot set a range"
    ):
        estimator(empty)
    estimator.initialize_from(example)
    empty.requires_grad_()
    out = estimator(empty)
    assert out.shape == shape
    if train:
        out.sum().backward()
        assert empty.grad.shape == shape
        extra = type(estimator).regularizer([estimator], torch.tensor(1.0))
        assert extra is None or torch.isfinite(extra)
    estimator.freeze()
    assert estimator(empty).shape == shape


# ---- what was found --------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [torch.full((4, 3), 1e-44), torch.full((4, 3), math.inf), torch.zeros(4, 3)])
def test_a_weight_without_a_range_leaves_a_squeezed_one_its_own(weight):
    """Denormal numbers made its step 0, infinity its number of levels."""
    estimator = ESTIMATORS["gdnsq"]((2, 8), scheme="symmetric", channels=4, axis=0)
    estimator.initialize_from(torch.randn(4, 3))
    before = estimator.weight_range.clone()
    estimator.train()(weight)
    assert torch.equal(estimator.weight_range, before)
    assert estimator.eval()(weight.double()).dtype == torch.float32


@pytest.mark.parametrize("name", ["stem.weight", "shortcut.bias", "conv1.bn.running_var", "conv2.bn.weight"])
def test_a_model_that_has_diverged_is_not_frozen(name):
    """Its NaN would have become integers."""
    x = torch.randn(4, 3, 16, 16)
    prepared = fq.prepare(TinyResidual(), [fq.Rule("*", 4, 4)], calibration=[x])
    prepared.state_dict(keep_vars=True)[name].data.view(-1)[0] = math.nan
    with pytest.raises(NonFiniteError, match=r"(stem|shortcut|conv1|conv2): its '.*' holds NaN or infinity"):
        fq.freeze(prepared, calibration=())


def test_a_range_at_the_end_of_float32_is_refused():
    estimator = ESTIMATORS["lsq"](8)
    with pytest.raises(
        NonFiniteError, match=r"a quantizer: values up to 3.4e\+38 were seen; a range ends at 8.51e\+37"
    ):
        estimator.initialize_from(torch.tensor([-LARGEST, LARGEST]))
