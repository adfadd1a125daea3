"""The layers: what they compute while they train, and that folding changes nothing but roundings."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fxquant as fq
from fxquant.estimators import ESTIMATORS
from fxquant.layers import QATConv2d, QATLayer, QATLinear
from tests.models import TinyMobile, TinyResidual, settle

ESTIMATOR_NAMES = sorted(ESTIMATORS)


def images(count: int = 8) -> torch.Tensor:
    return torch.randn(count, 3, 16, 16)


def step(model: nn.Module, x: torch.Tensor) -> None:
    optimizer = torch.optim.SGD(fq.param_groups(model.train(), lr=0.02))
    loss = F.cross_entropy(model(x), torch.arange(len(x)) % 5)
    assert torch.isfinite(loss)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def prepared(x: torch.Tensor, bits=4, estimator: str = "lsq", model=TinyResidual, **rule) -> nn.Module:
    return fq.prepare(settle(model(), x), [fq.Rule("*", bits, bits, estimator, **rule)], calibration=[x])


def layer_inputs(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    seen: dict[str, torch.Tensor] = {}
    handles = [
        m.register_forward_pre_hook(lambda m, args, name=name: seen.update({name: args[0]}))
        for name, m in model.named_modules()
        if isinstance(m, QATLayer)
    ]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return seen


# ---- forward ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_a_layer_computes_bn_of_conv_of_fake_quantized_operands(training):
    x = images()
    layer = prepared(x).train(training).get_submodule("conv1")
    entering = torch.rand(4, 8, 8, 8)
    bn = copy.deepcopy(layer.bn)
    with torch.no_grad():
        want = F.conv2d(
            layer.input_fake_quant(entering), layer.weight_fake_quant(layer.weight), None, stride=2, padding=1
        )
        bn.bias += layer.bias_rounding()  # by the statistics before this batch
        got, want = layer(entering), bn(want)
        assert torch.equal(got, torch.relu(want))
    assert torch.equal(layer.bn.running_mean, bn.running_mean)


def test_gradients_reach_weights_batch_norm_and_quantizers():
    x = images()
    model = prepared(x).train()
    F.cross_entropy(model(x), torch.arange(8) % 5).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) is parameter.requires_grad, name
    for name in ("weight", "bn.weight", "bn.bias", "weight_fake_quant.log2_scale", "input_fake_quant.log2_scale"):
        assert model.get_submodule("conv1").get_parameter(name).grad.abs().max() > 0


@pytest.mark.parametrize("estimator", ESTIMATOR_NAMES)
def test_a_zero_initialised_gamma_trains_without_nan(estimator):
    x = images()
    model = settle(TinyResidual(), x)
    nn.init.zeros_(model.bn2.weight)
    quantized = fq.prepare(model, [fq.Rule("*", 4, 4, estimator)], calibration=[x])
    for _ in range(3):
        step(quantized, x)
    assert quantized.conv2.bn.weight.abs().max() > 0  # it does learn
    assert all(torch.isfinite(p).all() for p in quantized.parameters())


# ---- folding ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("model", [TinyResidual, TinyMobile])
@pytest.mark.parametrize("per_channel", [True, False])
def test_a_frozen_layer_is_the_one_that_trained(model, bits, per_channel):
    """In float, with BatchNorm unfolded, it differs by float rounding; without the rounded bias, by half its step."""
    x = images()
    quantized = prepared(x, bits, model=model, per_channel=per_channel)
    step(quantized, x)
    for module in quantized.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data[:3] = torch.tensor([-0.7, 0.0, -1.3])
    quantized.eval()
    inputs = layer_inputs(quantized, images())
    unfolded = {name: quantized.get_submodule(name)(tensor).detach() for name, tensor in inputs.items()}
    fq.freeze(quantized, calibration=[x])
    for name, tensor in inputs.items():
        layer = quantized.get_submodule(name)
        layer_before = unfolded[name] if layer.bn is None else None
        if layer_before is None:
            # freeze re-estimated BatchNorm, so that the unfolded form has to be computed anew
            with torch.no_grad():
                operands = layer.input_fake_quant(tensor), layer.weight_fake_quant(layer.weight)
                plain = layer.bn.eval()(layer._compute(*operands, layer.bias))
                rounding = layer.bias_rounding().reshape(-1, *[1] * (tensor.ndim - 2))
                layer_before = F.relu(plain + rounding) if layer.relu else plain + rounding
        _, _, _, sum_scale = layer.integer_parameters()
        # A channel whose scale was moved off ties differs by as much, and its bias may round to the next code.
        moved = (layer.scale_shift - 1).abs()
        allowed = (1e-5 + moved) * layer_before.abs().max() + torch.where(moved > 0, sum_scale, 0)
        gap = (layer(tensor) - layer_before).abs().transpose(0, 1).flatten(1).amax(1)
        assert (gap <= allowed).all(), name
        if layer.bn is not None:
            assert (layer.bias_rounding().abs() <= sum_scale * 0.5001).all()
            assert layer.bias_rounding().any()


def test_folding_flips_codes_with_the_sign_of_gamma_and_zeroes_them_at_zero():
    x = images()
    quantized = prepared(x)
    quantized.conv1.bn.weight.data[:3] = torch.tensor([-0.5, 0.0, 0.5])
    layer = quantized.conv1
    plain = layer.weight_fake_quant.codes(layer.weight)
    codes, scale, bias = layer.folded()
    assert torch.equal(codes[0], -plain[0])
    assert torch.equal(codes[1], torch.zeros_like(plain[1]))
    assert torch.equal(codes[2:], plain[2:])
    assert scale[1] == 0
    bn = layer.bn
    factor = bn.weight.double() / (bn.running_var.double() + bn.eps).sqrt()
    assert torch.allclose(scale, layer.weight_fake_quant.step().double() * factor.abs(), rtol=1e-12)
    assert torch.allclose(bias, bn.bias.double() - bn.running_mean.double() * factor, rtol=1e-12)


@pytest.mark.parametrize("gamma", [1e-20, -1e-20, 1e-38, 0.0, 1e-7])
def test_a_vanishing_gamma_keeps_its_bias_to_22_bits(gamma):
    x = images()
    quantized = prepared(x)
    quantized.conv1.bn.weight.data.fill_(gamma)
    quantized.conv1.bn.bias.data.copy_(torch.linspace(-2, 2, 16))
    fq.freeze(quantized)
    layer = quantized.conv1
    codes, _, bias, sum_scale = layer.integer_parameters()
    assert codes.dtype == torch.int8
    assert bias.dtype == torch.int32
    assert bias.abs().max() <= 2**22
    want = layer.folded()[2]
    assert torch.allclose(bias.double() * sum_scale, want, rtol=2**-22, atol=float(sum_scale.max()) / 2)
    out = layer(torch.rand(2, 8, 8, 8))
    assert torch.isfinite(out).all()
    assert torch.allclose(out, layer.bn.bias.relu()[:, None, None].expand_as(out), atol=1e-4 if gamma == 1e-7 else 1e-6)


def test_a_gamma_and_a_bias_of_zero_give_zero_whatever_the_input_scale():
    """The folded scale is as small as float32 goes, times an input scale that is small as well."""
    x = 1e-12 * images()
    model = settle(
        nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Conv2d(4, 5, 14), nn.Flatten()), x
    )
    quantized = fq.prepare(model, [fq.Rule("*", 4, 4)], calibration=[x])
    quantized.get_submodule("0").bn.weight.data[0] = 0
    quantized.get_submodule("0").bn.bias.data[0] = 0
    fq.freeze(quantized, calibration=[x])
    layer = quantized.get_submodule("0")
    _, _, bias, sum_scale = layer.integer_parameters()
    assert sum_scale.min() > 0
    assert bias[0] == 0
    assert (layer(x)[:, 0] == 0).all()


# ---- state -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ESTIMATOR_NAMES)
def test_a_prepared_model_restores_from_its_state_dict(estimator):
    x = images()
    bits = (2, 8) if estimator in ("nipq", "gdnsq") else 3
    first = prepared(x, bits, estimator)
    step(first, x)
    fresh = fq.prepare(settle(TinyResidual(), x), [fq.Rule("*", bits, bits, estimator)], example_inputs=(x,))
    fresh.load_state_dict(first.state_dict(), strict=True)
    probe = images()
    with torch.no_grad():
        assert torch.equal(fresh.eval()(probe), first.eval()(probe))
    torch.manual_seed(1)
    step(first, x)
    torch.manual_seed(1)
    step(fresh, x)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), fresh.parameters(), strict=True))


@pytest.mark.parametrize("estimator", ESTIMATOR_NAMES)
def test_a_frozen_model_restores_into_a_fresh_prepare(estimator):
    x = images()
    bits = (2, 8) if estimator in ("nipq", "gdnsq") else 3
    first = prepared(x, bits, estimator)
    step(first, x)
    fq.freeze(first)
    rules = [fq.Rule("*", bits, bits, estimator)]
    other = settle(TinyResidual(), x + 1)
    fresh = fq.prepare(other, rules, calibration=[x + 1])
    fresh.eval()(x)
    fresh.load_state_dict(first.state_dict(), strict=True)
    probe = images()
    with torch.no_grad():
        assert torch.equal(fresh.eval()(probe), first(probe))
        assert torch.equal(fq.convert(fresh)(probe), first(probe))


def test_loading_another_state_into_a_frozen_model_replaces_its_integers():
    x = images()
    first, second = prepared(x), prepared(2 * x)
    fq.freeze(first)
    fq.freeze(second)
    probe = images()
    with torch.no_grad():
        first(probe)  # integers are computed once, here
        assert not torch.equal(first(probe), second(probe))
        first.load_state_dict(second.state_dict())
        assert torch.equal(first(probe), second(probe))


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("estimator", ESTIMATOR_NAMES)
def test_a_copy_is_independent_and_computes_the_same(estimator, frozen):
    x = images()
    model = prepared(x, 4, estimator)
    step(model, x)
    if frozen:
        fq.freeze(model)
    model.eval()
    probe = images()
    want = model(probe).detach()
    duplicate = copy.deepcopy(model)
    assert torch.equal(duplicate(probe), want)
    if not frozen:
        step(duplicate, x)
        assert not torch.equal(duplicate.eval()(probe), want)
        fq.freeze(duplicate)
    assert fq.verify(duplicate, fq.convert(duplicate), [probe]).reference_equals_fake_quant
    assert torch.equal(model(probe), want)
    assert {id(p) for p in model.parameters()}.isdisjoint(id(p) for p in duplicate.parameters())


def test_from_float_takes_over_geometry_and_mode():
    conv = nn.Conv2d(4, 8, (3, 1), stride=(2, 1), padding=(1, 0), dilation=(1, 2), groups=2)
    conv.qconfig = fq.get_qat_qconfig("lsq", 4, 4)
    layer = QATConv2d.from_float(conv.eval())
    assert (layer.stride, layer.padding, layer.dilation, layer.groups) == ((2, 1), (1, 0), (1, 2), 2)
    assert layer.weight is conv.weight
    assert layer.bias is conv.bias
    assert not layer.training
    linear = nn.Linear(3, 2, bias=False)
    linear.qconfig = fq.get_qat_qconfig("lsq", 4, 4)
    assert QATLinear.from_float(linear).bias is None
