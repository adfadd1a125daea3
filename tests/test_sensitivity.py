"""Sensitivities against measurements made by hand, and their prediction against what is measured."""

from __future__ import annotations

import copy

import pytest
import torch
from scipy.stats import spearmanr
from torch import nn
from torch.nn import functional as F

import fxquant as fq
from fxquant import cost
from fxquant.capacity import measure_capacity
from fxquant.errors import EmptyDataError, SpecError, UnknownNameError
from fxquant.sensitivity import measure_sensitivity
from tests.models import TinyMobile, TinyResidual, settle, smooth_images

LAYERS = ("stem", "conv1", "conv2", "shortcut", "head")
BITS = (2, 3, 4, 6, 8)


@pytest.fixture(scope="module")
def images():
    return smooth_images(64)


@pytest.fixture(scope="module")
def network(images):
    """A float network and the prepared one."""
    torch.manual_seed(0)
    model = settle(TinyResidual(), images)
    return model, fq.prepare(model, [fq.Rule("*", 4, 4)], calibration=images.split(32))


def measured(network, images, method, bits=BITS, layers=LAYERS):
    return measure_sensitivity(network[1], images.split(32), method, dict.fromkeys(layers, (bits, bits)))


def test_loss_is_the_divergence_with_one_tensor_quantized(network, images):
    model, prepared = network
    found = measured(network, images, "loss")
    only = copy.deepcopy(prepared)
    for name, layer in cost.qat_layers(only).items():
        layer.input_fake_quant.disable_fake_quant()
        if name != "conv2":
            layer.weight_fake_quant.disable_fake_quant()
    for name, module in only.named_modules():
        if name.endswith("_edge"):
            module.disable_fake_quant()
    with torch.no_grad():
        want = model(images).log_softmax(-1)
        divergence = F.kl_div(only.eval()(images).log_softmax(-1), want, reduction="batchmean", log_target=True)
    assert found.tensors["conv2.weight"][4] == pytest.approx(float(divergence), rel=1e-3)
    assert found.tensors.keys() == {f"{n}.{k}" for n in LAYERS for k in ("weight", "input")}


def test_fisher_predicts_what_is_measured(network, images):
    """Second order: exact for little noise but for the draw of labels, of the right order for more."""
    real, predicted = (measured(network, images, method).tensors for method in ("loss", "fisher"))
    for bits, tolerance in ((6, 3.0), (8, 3.0)):
        for name in ("conv1.weight", "conv2.weight", "conv1.input", "conv2.input"):
            assert 1 / tolerance < predicted[name][bits] / real[name][bits] < tolerance, (name, bits)
    figures = [(real[t][b], predicted[t][b]) for t in real for b in BITS]
    assert spearmanr(*zip(*figures, strict=True)).statistic > 0.95


def test_fisher_of_layers_that_apply_relu_themselves(images):
    """Without BatchNorm a layer's ReLU works in place on the product that is differentiated."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(200, 5)
    ).eval()
    prepared = fq.prepare(model, [fq.Rule("*", 4, 4)], calibration=[images])
    real, predicted = (
        measure_sensitivity(prepared, [images], method, {"2": ((4, 6), (4, 6))}).tensors
        for method in ("loss", "fisher")
    )
    ratios = [predicted[tensor][bits] / real[tensor][bits] for tensor in real for bits in (4, 6)]
    assert all(0.5 < ratio < 2 for ratio in ratios), ratios


@pytest.mark.parametrize("method", ["fisher", "loss"])
def test_fewer_bits_cost_more(network, images, method):
    for row in measured(network, images, method, (2, 4, 8)).tensors.values():
        assert row[2] > row[4] > row[8] > 0


def test_fisher_follows_its_seed(network, images):
    batches, candidates = images.split(32), {"conv1": ((3,), (3,))}
    runs = [measure_sensitivity(network[1], batches, "fisher", candidates, seed=seed).tensors for seed in (0, 0, 1)]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


def test_capacity_is_that_of_a_network_quantized_there_alone(network, images):
    """The first layer's input has nothing before it that the widths of others could change."""
    found = measured(network, images, "capacity", (4,))
    in_place = measure_capacity(network[1], images.split(32))
    assert found.tensors["stem.input"][4] == pytest.approx(in_place["stem.input"].total, rel=0.02)
    assert found.edges == {n: t.total for n, t in in_place.items() if t.kind == "edge"}
    rows = measured(network, images, "capacity").tensors.values()
    assert all(row[2] < row[4] < row[8] for row in rows)


@pytest.mark.parametrize("method", ["capacity", "fisher", "loss"])
def test_measuring_leaves_no_trace(network, images, method):
    model = network[1].train()
    before = copy.deepcopy(model.state_dict())
    measured(network, images, method, (4,))
    assert model.training
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all("_compute" not in vars(m) and m.weight.grad is None for m in cost.qat_layers(model).values())
    assert all(m.fake_quant_enabled for m in model.modules() if hasattr(m, "fake_quant_enabled"))


def test_layers_that_share_a_tensor_and_two_sided_inputs():
    x = torch.randn(8, 3, 16, 16)
    model = fq.prepare(settle(TinyMobile(), x), [fq.Rule("*", 8, 8)], calibration=[x])
    candidates = dict.fromkeys(cost.qat_layers(model), ((2, 8), (2, 8)))
    for method in ("capacity", "fisher", "loss"):
        found = measure_sensitivity(model, [x], method, candidates).tensors
        assert all(row[2] != row[8] for row in found.values())


def test_what_cannot_be_measured_says_so(network, images):
    with pytest.raises(UnknownNameError, match=r"unknown sensitivity 'fischer': did you mean 'fisher'"):
        measured(network, images, "fischer")
    with pytest.raises(EmptyDataError, match="yielded no batch"):
        measure_sensitivity(network[1], [], "loss", {"conv1": ((2,), (2,))})
    with pytest.raises(SpecError, match=r"max_batches=0 was asked for; it must be a whole number from 1"):
        measure_sensitivity(network[1], [images], "loss", {"conv1": ((2,), (2,))}, max_batches=0)
    frozen = copy.deepcopy(network[1])
    fq.freeze(frozen)
    with pytest.raises(SpecError, match=r"is frozen, its widths are settled; measure sensitivities before"):
        measure_sensitivity(frozen, [images], "loss", {"conv1": ((2,), (2,))})
