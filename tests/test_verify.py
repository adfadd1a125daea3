"""verify() sees what it is there to see: one code changed anywhere."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fxquant as fq
from fxquant.data import load_data
from fxquant.errors import EmptyDataError, ParityError, SpecError
from fxquant.lower.kernels import OnednnLayer
from fxquant.verify import VerifyReport
from tests.models import TinyResidual, settle


def images(count: int = 8) -> torch.Tensor:
    return torch.randn(count, 3, 16, 16)


@pytest.fixture
def pair():
    x = images()
    frozen = fq.prepare(settle(TinyResidual(), x), [fq.Rule("*", 4, 4)], calibration=[x])
    fq.freeze(frozen)
    return frozen, fq.convert(frozen)


def test_a_sound_reference_passes(pair):
    labels = pair[1](x := images()).argmax(1)
    report = fq.verify(*pair, [(x, labels), (x[:3], (labels[:3] + 1) % 5)])
    assert report.reference_equals_fake_quant
    assert report.different_tensors == {}
    assert report.images == 11
    assert report.reference_accuracy == report.fake_quant_accuracy == pytest.approx(100 * 8 / 11)
    report.raise_on_failure()


@pytest.mark.parametrize("layer", ["stem", "conv2", "shortcut", "head"])
def test_one_wrong_weight_code_is_found_and_named(pair, layer):
    frozen, reference = pair
    weight = reference.get_buffer(f"{layer}_integer.weight")
    weight.view(-1)[0] += 1 if weight.view(-1)[0] < 7 else -1
    report = fq.verify(frozen, reference, [images(32)])
    assert not report.reference_equals_fake_quant
    assert f"{layer}_rescale" in report.different_tensors
    assert all(gap > 0 for gap in report.different_tensors.values())
    worst = max(report.different_tensors, key=report.different_tensors.get)
    words = rf"differs from the frozen model in {len(report.different_tensors)} tensors, worst at '{worst}' by \d"
    with pytest.raises(ParityError, match=words):
        report.raise_on_failure()


def test_a_wrong_bias_scale_or_zero_point_is_found(pair):
    frozen, sound = pair
    for buffer, change in (
        ("conv1_integer.bias", 1),
        ("conv1_rescale.scale", 1e-6),
        ("conv2_edge_dequantize.zero_point", 1),
        ("stem_quantize.zero_point", 1),
    ):
        reference = copy.deepcopy(sound)
        reference.get_buffer(buffer).add_(change)
        assert not fq.verify(frozen, reference, [images()]).reference_equals_fake_quant, buffer


@pytest.mark.parametrize("kept", ["head", "conv1"])
def test_a_difference_in_a_layer_that_stayed_float_is_found(kept):
    """Every tensor of the reference is compared: a float layer's, though rounding may hide it from what follows."""
    x = images()
    rules = [fq.Rule(kept, None, None), fq.Rule("*", 4, 4)]
    frozen = fq.prepare(settle(TinyResidual(), x), rules, calibration=[x])
    fq.freeze(frozen)
    reference = fq.convert(frozen)
    assert fq.verify(frozen, reference, [x]).reference_equals_fake_quant
    module = next(m for m in reference.modules() if type(m) in (nn.Conv2d, nn.Linear))
    with torch.no_grad():
        module.weight.view(-1)[0] += 1e-4
    report = fq.verify(frozen, reference, [x])
    assert not report.reference_equals_fake_quant
    with pytest.raises(ParityError, match="differs from the frozen model"):
        report.raise_on_failure()


def test_not_a_number_is_a_difference(pair):
    frozen, reference = pair
    reference.get_buffer("head_rescale.scale").fill_(float("nan"))
    report = fq.verify(frozen, reference, [images()])
    assert not report.reference_equals_fake_quant
    with pytest.raises(ParityError, match="head_rescale"):
        report.raise_on_failure()


def test_a_difference_on_one_image_of_one_batch_is_enough(pair):
    frozen, reference = pair
    # Only an image with codes at the very top meets this bound.
    reference.get_buffer("stem_quantize.bounds")[1] = 14
    quiet, loud = torch.zeros(4, 3, 16, 16), torch.zeros(1, 3, 16, 16)
    loud[0, 0, 5, 5] = 100.0
    assert fq.verify(frozen, reference, [quiet, quiet]).reference_equals_fake_quant
    assert not fq.verify(frozen, reference, [quiet, loud, quiet]).reference_equals_fake_quant


# ---- lowered ---------------------------------------------------------------------------------------------


@pytest.fixture
def lowered(digits_run):
    outcome, _ = digits_run
    backend = next(iter(outcome.lowered))
    return outcome.reference, backend, copy.deepcopy(outcome.lowered[backend])


def held_out() -> list:
    data = load_data("digits", 16)
    return [(data.test_images, data.test_labels)]


def test_an_output_that_alone_differs_is_told():
    report = VerifyReport(images=3, reference_equals_fake_quant=False)
    with pytest.raises(ParityError, match="differs from the frozen model in its output alone; this is a defect"):
        report.raise_on_failure()


def test_a_corrupted_lowered_model_is_found(lowered):
    reference, backend, model = lowered
    sound = fq.verify(None, reference, held_out(), lowered={backend: model})
    sound.raise_on_failure()
    assert sound.lowered[backend].argmax_agreement >= 99.9
    name, kernel = next((n, m) for n, m in model.named_modules() if isinstance(m, OnednnLayer))
    kernel.result = (4 * kernel.result[0], *kernel.result[1:])  # the codes come out a quarter of what they should be
    report = fq.verify(None, reference, held_out(), lowered={backend: model})
    parity = report.lowered[backend]
    assert parity.max_code_difference > 1
    assert parity.worst_layer in [node.name for node in reference.graph.nodes]
    assert parity.argmax_agreement < 99.9
    assert report.reference_equals_fake_quant  # the reference is not at fault
    words = rf"lowered to {backend}, [\d.]+ % of 599 images keep the reference's argmax, 99\.9 % was asked for"
    with pytest.raises(ParityError, match=words):
        report.raise_on_failure()
    assert name.endswith(backend)


def test_a_wrong_classifier_is_found(lowered):
    reference, backend, model = lowered
    model.get_submodule(f"fc_rescale_{backend}").bias.add_(torch.arange(10, dtype=torch.int32) * 1_000_000)
    report = fq.verify(None, reference, held_out(), lowered={backend: model})
    with pytest.raises(ParityError, match=f"lowered to {backend}"):
        report.raise_on_failure()


def test_accuracies_are_those_of_each_model(lowered):
    reference, backend, model = lowered
    ((images_, labels),) = held_out()
    with torch.no_grad():
        right = float((reference(images_).argmax(1) == labels).float().mean() * 100)
    report = fq.verify(None, reference, held_out(), lowered={backend: model})
    assert report.reference_accuracy == pytest.approx(right)
    assert report.lowered[backend].accuracy == pytest.approx(right, abs=0.2)
    assert report.fake_quant_accuracy is None
    unlabelled = fq.verify(None, reference, [images_[:10]], lowered={backend: model})
    assert unlabelled.reference_accuracy is None
    assert unlabelled.lowered[backend].accuracy is None


def test_no_batch_is_refused(pair):
    with pytest.raises(EmptyDataError, match="verify was given no batch; pass a loader with held-out images"):
        fq.verify(*pair, [])


def test_the_class_of_each_image_is_told(pair):
    frozen, reference = pair
    batches = [torch.randn(4, 3, 16, 16), torch.randn(3, 3, 16, 16)]
    with torch.no_grad():
        expected = torch.cat([reference(images_).argmax(1) for images_ in batches])
    predicted = fq.verify(frozen, reference, batches).predicted
    assert predicted.keys() == {"frozen", "reference"}
    assert all(torch.equal(classes, expected) for classes in predicted.values())
    assert fq.verify(None, reference, batches).predicted.keys() == {"reference"}


def test_classes_are_along_dimension_one():
    """As nn.CrossEntropyLoss takes them: an image has a class for each position."""
    x = torch.randn(4, 3, 8, 6)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 7, 1))
    frozen = fq.prepare(model, [fq.Rule("*", 8, 8)], calibration=[x])
    fq.freeze(frozen)
    reference = fq.convert(frozen)
    labels = reference(x).argmax(1)
    labels[0] += 1
    report = fq.verify(frozen, reference, [(x, labels)], lowered={"x86": fq.lower(reference, "x86")})
    assert report.reference_accuracy == report.lowered["x86"].accuracy == 75
    assert report.predicted["reference"].shape == (4, 8, 6)
    with pytest.raises(SpecError, match=r"labels of shape \[4\] .* \[4, 7, 8, 6\].*; give labels of shape \[4, 8, 6\]"):
        fq.verify(frozen, reference, [(x, labels[:, 0, 0])])


def test_a_model_without_classes_is_refused():
    x = images()
    model = nn.Sequential(nn.Conv2d(3, 1, 16), nn.Flatten(0))
    frozen = fq.prepare(model, [fq.Rule("*", 8, 8)], calibration=[x])
    fq.freeze(frozen)
    with pytest.raises(SpecError, match=r"scores of classes, \[N, C\]; the model returned \[8\]"):
        fq.verify(frozen, fq.convert(frozen), [x])
