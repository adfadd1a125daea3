"""Scales away from ties: every runtime rounds alike, the trained codes stay, and nothing else notices."""

from __future__ import annotations

import sys

import pytest
import torch

import fxquant as fq
from fxquant import ties
from fxquant.cost import qat_layers
from fxquant.estimators import Estimator
from tests.models import TinyMobile, TinyResidual, settle


def pictures(count: int, seed: int = 0) -> torch.Tensor:
    """Normalised bytes, as images are: of arbitrary floats a few lie at a tie of the first quantizer."""
    drawn = torch.randint(0, 256, (count, 3, 32, 32), generator=torch.Generator().manual_seed(seed))
    return (drawn / 255 - 0.45) / 0.25


def frozen(bits: int, backend: str = "onnxruntime", model=TinyResidual, seed: int = 1):
    torch.manual_seed(seed)
    x = pictures(16)
    rules = [fq.Rule("first|last", 8, 8), fq.Rule("*", bits, bits)]
    prepared = fq.prepare(settle(model(channels=32), x), rules, calibration=[x], backend=backend)
    fq.freeze(prepared, calibration=())
    return prepared


@pytest.fixture
def without(monkeypatch):
    """freeze() as it would be without avoid_ties."""

    def use() -> None:
        monkeypatch.setattr(sys.modules["fxquant.freeze"], "avoid_ties", lambda model: {})

    return use


@pytest.mark.parametrize(("bits", "seed"), [(2, 1), (4, 1), (8, 0), (8, 1), (8, 2)])
def test_onnxruntime_gives_the_references_logits_bit_for_bit(tmp_path, bits, seed):
    pytest.importorskip("onnxruntime", reason="the extra fxquant[onnx] is not installed")
    model = frozen(bits, seed=seed)
    reference = fq.convert(model)
    fq.export_onnx(reference, tmp_path / "m.onnx")
    runtimes = {"onnxruntime": fq.OnnxModel(tmp_path / "m.onnx")}
    report = fq.verify(model, reference, [pictures(256, seed=5)], lowered=runtimes)
    assert report.reference_equals_fake_quant
    assert report.lowered["onnxruntime"].logits_equal == 100


def test_without_it_onnxruntime_differs(tmp_path, without):
    pytest.importorskip("onnxruntime", reason="the extra fxquant[onnx] is not installed")
    without()
    equal = []
    for seed in range(3):
        reference = fq.convert(frozen(8, seed=seed))
        fq.export_onnx(reference, tmp_path / "m.onnx")
        runtimes = {"onnxruntime": fq.OnnxModel(tmp_path / "m.onnx")}
        report = fq.verify(None, reference, [pictures(256, seed=5)], lowered=runtimes)
        equal.append(report.lowered["onnxruntime"].logits_equal)
    assert min(equal) < 100


@pytest.mark.parametrize("model", [TinyResidual, TinyMobile])
@pytest.mark.parametrize("bits", [3, 8])
def test_codes_stay_and_scales_move_by_less_than_a_thousandth(without, bits, model):
    after = frozen(bits, model=model)
    without()
    before = frozen(bits, model=model)
    was = dict(qat_layers(before))
    for name, layer in qat_layers(after).items():
        codes, scale, _, sums = layer.integer_parameters()
        old_codes, old_scale, _, old_sums = was[name].integer_parameters()
        assert torch.equal(codes, old_codes)
        torch.testing.assert_close(scale, old_scale, rtol=5e-4, atol=0)
        torch.testing.assert_close(sums, old_sums, rtol=1e-3, atol=0)
        assert layer.input_fake_quant.frozen_zero_point == was[name].input_fake_quant.frozen_zero_point


def test_ties_by_construction_are_left():
    """Two edges of step 1 into one of step 2: every odd sum is a tie, until the scale moves."""
    model = frozen(4)
    (add,) = (n for n in model.graph.nodes if n.name == "add")
    left, right = (model.get_submodule(n.target) for n in add.args)
    edge = model.relu_2_edge
    for quantizer, scale in ((left, 1.0), (right, 1.0), (edge, 2.0)):
        quantizer.frozen_scale.fill_(scale)
    assert ties._ties_of_sums(left, right, edge) > 1000
    assert "relu_2_edge" not in ties.avoid_ties(model)
    assert ties._ties_of_sums(left, right, edge) == 0
    assert edge.frozen_scale.item() == pytest.approx(2, rel=1e-3)
    assert edge.frozen_scale.item() != 2


def test_codes_that_are_requantized_by_a_whole_factor_lie_at_ties():
    model = frozen(4)
    narrow, edge = model.conv2.input_fake_quant, model.conv2_edge
    levels = ties._levels(edge) * 0.25
    narrow.frozen_scale.fill_(0.5)
    assert ties._ties_of_values(levels, narrow) == 15  # between each two of 16 codes
    narrow.frozen_scale.fill_(0.5003)
    assert ties._ties_of_values(levels, narrow) == 0


def test_ties_that_no_sum_reaches_do_not_count():
    """Of a channel that has all but vanished, beside others on one grid."""
    torch.manual_seed(0)
    x = pictures(16)
    model = settle(TinyResidual(channels=32), x)
    with torch.no_grad():
        model.stem.weight[3] *= 1e-4
        model.bn.running_mean[3] = model.bn.bias[3] = 0  # its sums are about the code 0, half a code from a tie
    prepared = fq.prepare(model, [fq.Rule("*", 8, 8)], calibration=[x], backend="onnxruntime")
    fq.freeze(prepared, calibration=())
    layer = qat_layers(prepared)["stem"]
    assert layer.scale_shift[3] == 1
    assert ties.avoid_ties(prepared).get("stem", 0) == 0


def test_sums_lie_between_their_bounds():
    model = frozen(4)
    for layer in qat_layers(model).values():
        codes, entry = layer._coarsened()[0], layer.input_fake_quant
        lowest, highest = ties._reach(codes, entry)
        ends = torch.tensor([entry.quant_min, entry.quant_max]) - entry.frozen_zero_point
        drawn = ends.to(codes.dtype)[torch.randint(0, 2, (64, *codes.shape[1:]))]
        sums = drawn.flatten(1) @ codes.flatten(1).T
        assert (sums >= lowest).all()
        assert (sums <= highest).all()
        largest = torch.where(codes > 0, ends.max(), ends.min()) * codes
        assert torch.equal(largest.flatten(1).sum(1).float(), highest)


def test_where_no_scale_is_free_of_ties_the_best_is_kept_and_named(monkeypatch):
    monkeypatch.setattr(ties, "_CANDIDATES", 1)
    model = frozen(4)
    model.relu_2_edge.frozen_scale.copy_(2 * model.conv2_edge.frozen_scale)
    model.shortcut_edge.frozen_scale.copy_(model.conv2_edge.frozen_scale)
    left = ties.avoid_ties(model)
    assert left["relu_2_edge"] > 1000


def test_the_shift_is_part_of_the_state():
    model = frozen(8)
    assert any(name.endswith("scale_shift") and (t != 1).any() for name, t in model.state_dict().items())
    assert all(isinstance(m, Estimator) or not hasattr(m, "scale_shift") or m.frozen for m in model.modules())
