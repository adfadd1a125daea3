"""Quantizers that torch compiles give what those that it does not compile give, and are compiled once."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fxquant as fq
from fxquant.errors import SpecError
from fxquant.estimators import ESTIMATORS, Estimator, get_estimator, passes
from fxquant.recipe import load_recipe
from fxquant.train import run

from ..conftest import RECIPES
from ..models import TinyResidual
from ..test_inductor import needs_compiler

pytestmark = needs_compiler

WIDTHS = [(name, bits) for name in ESTIMATORS for bits in (1, 4)] + [("nipq", (2, 6)), ("gdnsq", (2, 6))]
KINDS = {
    "weight": {"scheme": "symmetric", "channels": 6, "axis": 0},
    "one-sided": {"scheme": "one_sided"},
    "affine": {"scheme": "affine"},
}


def step_of(estimator, x, grad, compiled: bool):
    """Output, and gradients, of a copy, by what is drawn from one seed."""
    estimator, x = copy.deepcopy(estimator), x.detach().requires_grad_()
    torch.manual_seed(1)
    with fq.compiled_quantizers(compiled):
        out = estimator(x)
        total = (out * grad).sum()
        term = type(estimator).regularizer([estimator], torch.tensor(1.0))
        total = total if term is None else total + term
        total.backward()
    return out.detach(), x.grad, {name: p.grad for name, p in estimator.named_parameters()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "bits"), WIDTHS)
def test_outputs_are_the_same_bits_and_gradients_equal_to_rounding(name, bits, kind):
    torch.manual_seed(0)
    x = torch.randn(6, 5, 7, 3)
    x = x.relu() if kind == "one-sided" else x
    estimator = get_estimator(name)(bits, **KINDS[kind]).train()
    estimator.initialize_from(0.7 * x)  # some lie beyond
    if name == "pege":
        estimator.replaced = 0.6
    grad = torch.randn_like(x)
    plain, compiled = (step_of(estimator, x, grad, how) for how in (False, True))
    assert torch.equal(plain[0], compiled[0])
    torch.testing.assert_close(compiled[1], plain[1], rtol=1e-6, atol=1e-9)
    assert any(g is not None for g in plain[2].values()) or name == "ste"
    for parameter, expected in plain[2].items():
        if expected is not None:
            torch.testing.assert_close(compiled[2][parameter], expected, rtol=1e-4, atol=1e-4, msg=parameter)


COMPILED = passes._compiled


def channels_last(x):
    return x.contiguous(memory_format=torch.channels_last)


LAYOUTS = {
    "channels last": (channels_last, channels_last),
    "input channels last": (channels_last, lambda grad: grad),
    "gradient channels last": (lambda x: x, channels_last),
    "transposed": (lambda x: x.transpose(0, 2).contiguous().transpose(0, 2), lambda grad: grad),
    "every other": (lambda x: x.repeat_interleave(2, -1)[..., ::2], lambda grad: grad),
    "expanded": (lambda x: x[..., :1].expand_as(x), lambda grad: grad[:1].expand_as(grad)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ESTIMATORS)
def test_any_order_in_memory(name, layout, kind, monkeypatch):
    torch.manual_seed(0)
    calls = []
    monkeypatch.setattr(
        passes, "_compiled", lambda function, *kinds: calls.append(function) or COMPILED(function, *kinds)
    )
    x, grad = (torch.randn(6, 5, 7, 3) for _ in range(2))
    x, grad = (arrange(t) for arrange, t in zip(LAYOUTS[layout], (x, grad), strict=True))
    assert not (x.is_contiguous() and grad.is_contiguous())
    estimator = get_estimator(name)(4, **KINDS[kind]).train()
    estimator.initialize_from(0.7 * x)
    if name == "pege":
        estimator.replaced = 0.6
    plain, compiled = (step_of(estimator, x, grad, how) for how in (False, True))
    assert torch.equal(plain[0], compiled[0])
    torch.testing.assert_close(compiled[1], plain[1], rtol=1e-6, atol=1e-9)
    for parameter, expected in plain[2].items():
        if expected is not None:
            torch.testing.assert_close(compiled[2][parameter], expected, rtol=1e-4, atol=1e-4, msg=parameter)
    if layout == "channels last":
        assert calls
    if name not in ("pege", "nipq"):  # which draw in the order of memory
        contiguous = step_of(estimator, x.contiguous(), grad.contiguous(), compiled=False)
        assert torch.equal(plain[0], contiguous[0])
        torch.testing.assert_close(plain[1], contiguous[1], rtol=1e-6, atol=1e-9)


def test_a_sum_over_millions_is_not_lost_in_rounding():
    x, grad = torch.randn(3_000_000).relu(), torch.randn(3_000_000) + 0.1
    estimator = get_estimator("lsq")(4, scheme="one_sided").train()
    estimator.initialize_from(x)
    plain, compiled = (step_of(estimator, x, grad, how)[2]["log2_scale"] for how in (False, True))
    torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", ["pege", "gdnsq", "nipq"])
def test_nothing_is_compiled_anew_from_step_to_step(name):
    """Though shares, ranges and widths move; but the first two steps, which meet all there is."""
    torch.manual_seed(0)
    images, labels = torch.randn(4, 3, 16, 16), torch.arange(4)
    bits = 3 if name == "pege" else (2, 5)
    model = fq.prepare(TinyResidual(), [fq.Rule("*", bits, bits, name)], calibration=[images]).train()
    controller, criterion = fq.Controller(model, 40), fq.QATLoss(nn.CrossEntropyLoss(), fq.Budget(mean_weight_bits=3))
    optimizer = torch.optim.Adam(fq.param_groups(model, lr=1e-2, quantizer_lr=0.1))
    widths = set()
    with fq.compiled_quantizers():
        for step in range(8):
            with torch._dynamo.config.patch(error_on_recompile=step >= 2):
                optimizer.zero_grad()
                criterion(model, images, labels).total.backward()
                optimizer.step()
                controller.step()
            widths.add(sum(float(e.bit_width().detach().mean()) for e in model.modules() if isinstance(e, Estimator)))
    assert name == "pege" or len(widths) > 4


def test_a_machine_without_a_compiler_is_told_before_anything_is_trained(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    recipe = load_recipe(RECIPES / "digits_w2a2_pege.toml", ["train.compile=true"])
    with torch._inductor.config.patch({"cpp.cxx": (None, "no-such-compiler")}):
        with pytest.raises(SpecError, match=r"train.compile = true .* no C\+\+ compiler was found: install g\+\+"):
            run(recipe, tmp_path / "run")
        with pytest.raises(SpecError, match=r"no C\+\+ compiler was found"), fq.compiled_quantizers():
            pass
    assert not list(tmp_path.rglob("*.pt"))


def test_the_switch_holds_within_and_goes_back():
    with fq.compiled_quantizers():
        assert passes._compiles
        with fq.compiled_quantizers(False):
            assert passes._compiles  # what is not asked for leaves it as it is
    with pytest.raises(KeyError), fq.compiled_quantizers():
        raise KeyError
    assert not passes._compiles
