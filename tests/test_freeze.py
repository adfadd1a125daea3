"""freeze(): whole widths, BatchNorm of the rounded network, scales for good."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fxquant as fq
from fxquant.errors import EmptyDataError, SpecError
from fxquant.estimators import ESTIMATORS, Estimator
from fxquant.freeze import hold_batch_norm, reestimate_batch_norm
from fxquant.freeze import settle as settle_widths
from fxquant.layers import QATLayer
from tests.models import TinyMobile, TinyResidual, settle


def images(count: int = 8) -> torch.Tensor:
    return torch.randn(count, 3, 16, 16)


def prepared(x: torch.Tensor, bits=4, estimator: str = "lsq", model=TinyResidual) -> nn.Module:
    return fq.prepare(settle(model(), x), [fq.Rule("*", bits, bits, estimator)], calibration=[x])


def bn_state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: b.clone() for n, b in model.named_buffers() if "running" in n}


def same(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> bool:
    return list(before) == list(after) and all(torch.equal(before[n], after[n]) for n in before)


# ---- BatchNorm -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ["lsq", "nipq"])
def test_batch_norm_becomes_the_mean_over_batches_under_true_rounding(estimator):
    x = images()
    model = prepared(x, 2, estimator).train()
    batches = [images(), 2 * images() + 1, images() - 1]
    stem = model.stem
    quantized_weight = stem.weight_fake_quant.eval()(stem.weight).detach()
    entry = copy.deepcopy(stem.input_fake_quant).eval()
    sums = [F.conv2d(entry(batch), quantized_weight, padding=1).detach() for batch in batches]
    fq.freeze(model, calibration=batches)
    mean = torch.stack([s.mean((0, 2, 3)) for s in sums]).mean(0)
    variance = torch.stack([s.transpose(0, 1).flatten(1).var(1) for s in sums]).mean(0)
    assert torch.allclose(stem.bn.running_mean, mean, rtol=1e-4, atol=1e-5)
    assert torch.allclose(stem.bn.running_var, variance, rtol=1e-4)
    assert stem.bn.momentum == 0.1


def test_the_first_batch_sees_the_bias_as_it_will_be_rounded():
    """Layers round it by the statistics at hand, which are those of the training until this batch replaces them."""
    x = images()
    model = prepared(x, 2).train()
    bn = model.conv1.bn
    bn.weight.data.fill_(0.2)
    bn.bias.data.copy_(torch.linspace(0.1, 1, len(bn.bias)))
    seen = []
    handle = bn.register_forward_hook(lambda norm, args, out: seen.append((norm.training, out.detach())))
    reestimate_batch_norm(model, [x])
    seen.clear()
    reestimate_batch_norm(model, [x])
    model.eval()(x)
    handle.remove()
    (in_training, measured), (_, evaluated) = seen
    assert in_training
    assert torch.allclose(measured, evaluated, atol=0.02)  # but for the variance of n - 1


def test_statistics_that_became_nan_are_estimated_anew():
    x = images()
    model = prepared(x)
    whole = copy.deepcopy(model)
    model.conv1.bn.running_mean.fill_(torch.nan)
    for each in (model, whole):
        fq.freeze(each, calibration=[x])
    assert torch.isfinite(model.conv1.bn.running_mean).all()
    assert torch.equal(model.stem.bn.running_mean, whole.stem.bn.running_mean)


def test_the_data_of_prepare_are_used_when_no_others_are_given():
    x = images()
    model = prepared(x)
    explicit, implicit = copy.deepcopy(model), copy.deepcopy(model)
    explicit.meta["fxquant"].calibration = None
    before = bn_state(model)
    fq.freeze(explicit, calibration=[x])
    fq.freeze(implicit)
    assert same(bn_state(explicit), bn_state(implicit))
    assert not same(before, bn_state(implicit))


def test_batch_norm_keeps_its_statistics_without_data():
    x = images()
    model = fq.prepare(settle(TinyResidual(), x), [fq.Rule("*", 4, 4)], example_inputs=(x,))
    model.eval()(x)  # the first data set the ranges
    before = bn_state(model)
    fq.freeze(model)
    assert same(before, bn_state(model))


@pytest.mark.parametrize("norms", [True, False])
@pytest.mark.parametrize("calibration", [None, ()])
def test_ranges_of_widths_that_become_whole_here_are_set_anew(norms, calibration):
    """GDNSQ's, whose squeeze leaves min-max ends: also where BatchNorm's statistics stay, or there are none."""
    x, net = images(), TinyResidual()
    if not norms:
        for name, module in list(net.named_modules()):
            if isinstance(module, nn.BatchNorm2d):
                net.set_submodule(name, nn.Identity())
    rules = [fq.Rule("*", 2, 2, "gdnsq", options={"initial_bits": 8})]
    model = fq.prepare(net, rules, calibration=[x])
    before = bn_state(model)
    settle_widths(model, calibration=calibration)
    if calibration == ():
        assert same(before, bn_state(model))
    assert not any(estimator.refit for estimator in model.modules() if isinstance(estimator, Estimator))
    for layer in model.modules():
        if isinstance(layer, QATLayer):
            quantizer, fresh = layer.weight_fake_quant, ESTIMATORS["lsq"](2, scheme="symmetric", **_per_channel(layer))
            fresh.initialize_from(layer.weight)
            torch.testing.assert_close(quantizer.scale(), fresh.scale())


def _per_channel(layer: nn.Module) -> dict[str, int]:
    return {"channels": layer.weight_fake_quant.channels, "axis": 0}


def test_ranges_to_be_set_anew_without_an_image_are_refused():
    x = images()
    model = prepared(x)
    model.meta["fxquant"].calibration = None
    model.stem.input_fake_quant.change_width(3)
    with pytest.raises(SpecError, match=r"ranges are set anew from the next images, .* pass calibration=loader"):
        fq.freeze(model)
    fq.freeze(model, calibration=[x])


def test_held_statistics_stay_and_normalise_in_training_too():
    x = images()
    model = prepared(x).train()
    hold_batch_norm(model)
    hold_batch_norm(model)  # twice is once
    before = bn_state(model)
    with torch.no_grad():
        alone, together = model.train()(x[:1]), model.train()(x)[:1]
    assert torch.allclose(alone, together, atol=1e-5)  # batch mates do not matter
    assert same(before, bn_state(model))
    loss = model(images()).square().sum()
    loss.backward()
    assert model.stem.bn.weight.grad.abs().max() > 0
    copied = copy.deepcopy(model).train()
    copied(images())
    assert same(before, bn_state(copied))
    fq.freeze(model, calibration=[images()])  # still re-estimates
    assert not same(before, bn_state(model))


def test_reestimating_leaves_statistics_held():
    x = images()
    model = prepared(x).train()
    hold_batch_norm(model)
    reestimate_batch_norm(model, [images()])
    before = bn_state(model)
    model.train()(images())
    assert same(before, bn_state(model))


def test_an_empty_loader_is_refused_and_costs_no_statistics():
    x = images()
    model = prepared(x)
    before = bn_state(model)
    with pytest.raises(EmptyDataError, match="yielded no batch"):
        fq.freeze(model, calibration=iter(()))
    assert same(before, bn_state(model))
    assert all(m.momentum == 0.1 for m in model.modules() if isinstance(m, nn.BatchNorm2d))


def test_a_frozen_model_has_no_batch_norm_left_to_estimate():
    x = images()
    model = prepared(x)
    fq.freeze(model)
    with pytest.raises(SpecError, match="BatchNorm of a frozen model is folded away"):
        reestimate_batch_norm(model, [x])


# ---- what is fixed ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", sorted(ESTIMATORS))
@pytest.mark.parametrize("model", [TinyResidual, TinyMobile])
def test_freezing_again_changes_nothing(estimator, model):
    x = images()
    frozen = prepared(x, 3, estimator, model)
    widths = fq.freeze(frozen)
    state = copy.deepcopy(frozen.state_dict())
    probe = images()
    want = frozen(probe)
    assert fq.freeze(frozen) == widths
    assert fq.freeze(frozen, calibration=[images()]) == widths
    assert all(torch.equal(t, state[n]) for n, t in frozen.state_dict().items())
    assert torch.equal(frozen(probe), want)


@pytest.mark.parametrize("estimator", sorted(ESTIMATORS))
def test_a_frozen_model_computes_the_same_in_train_and_eval(estimator):
    x = images()
    model = prepared(x, 4, estimator).train()
    fq.freeze(model)
    assert not model.training
    probe = images()
    want, before = model(probe), bn_state(model)
    assert torch.equal(model.train()(probe), want)
    assert same(before, bn_state(model))


def test_a_frozen_scale_ignores_what_happens_to_its_parameters():
    x = images()
    model = prepared(x)
    fq.freeze(model)
    probe = images()
    want = model(probe)
    before = {n: m.calculate_qparams() for n, m in model.named_modules() if isinstance(m, Estimator)}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3)
    for name, (scale, zero) in before.items():
        after = model.get_submodule(name).calculate_qparams()
        assert torch.equal(after[0], scale)
        assert torch.equal(after[1], zero)
    assert torch.equal(model(probe), want)


@pytest.mark.parametrize("estimator", ["nipq", "gdnsq"])
def test_learned_widths_end_whole_and_are_returned(estimator):
    x = images()
    model = prepared(x, (2, 8), estimator)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, QATLayer)}
    assert all(q.learns_width for m in layers.values() for q in (m.weight_fake_quant, m.input_fake_quant))
    widths = fq.freeze(model, fq.Budget(mean_weight_bits=4, mean_activation_bits=5))
    assert set(widths) == set(layers)
    for name, layer in layers.items():
        seen = []
        for quantizer in (layer.weight_fake_quant, layer.input_fake_quant):
            assert not quantizer.learns_width
            assert quantizer.settled
            assert float(quantizer.bit_width().max()) == quantizer.whole_bits
            seen.append(quantizer.whole_bits)
        assert widths[name] == tuple(seen)
        codes = layer.weight_fake_quant.codes(layer.weight)
        assert codes.abs().max() <= 2 ** (seen[0] - 1) - 1
        assert layer.input_fake_quant.quant_max == 2 ** seen[1] - 1
    assert fq.verify(model, fq.convert(model), [images()]).reference_equals_fake_quant


@pytest.mark.parametrize("bits", [1, 2, 5])
def test_a_squeezed_width_ends_at_its_target(bits):
    x = images()
    model = prepared(x, bits, "gdnsq")
    assert model.conv1.input_fake_quant.learns_width
    assert set(fq.freeze(model).values()) == {(bits, bits)}


def test_a_budget_out_of_reach_is_refused_before_anything_changes():
    x = images()
    model = prepared(x, (3, 8), "nipq")
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(SpecError, match=r"budget mean_weight_bits=2 was asked for, but the lowest widths .* take 3"):
        fq.freeze(model, fq.Budget(mean_weight_bits=2))
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    assert model.conv1.weight_fake_quant.learns_width


def test_batches_of_one_image_have_no_statistics_and_the_old_ones_stay():
    x = torch.randn(4, 3, 8, 8)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(4), nn.Linear(4, 5))
    prepared = fq.prepare(settle(model, x), [fq.Rule("*", 4, 4)], calibration=list(x.split(1)))
    before = {name: tensor.clone() for name, tensor in prepared.state_dict().items()}
    with pytest.raises(
        SpecError, match=r"BatchNorm cannot be re-estimated from batches of one image .*calibration=\(\)"
    ):
        fq.freeze(prepared)
    assert all(torch.equal(tensor, before[name]) for name, tensor in prepared.state_dict().items())
    fq.freeze(prepared, calibration=())
