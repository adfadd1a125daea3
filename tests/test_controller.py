"""Controller: phases, what it writes to the estimators, resuming; and the optimizer's parameter groups."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fxquant
from fxquant import Budget, Controller, Rule, cost, param_groups
from fxquant._torch_ao import deprecations_silenced, prepare_qat_fx
from fxquant.errors import CheckpointError, SpecError
from fxquant.estimators import ESTIMATORS, GDNSQ, NIPQ, PEGE, Estimator
from tests.models import TinyMobile, TinyResidual

from .estimators import rederived


@pytest.fixture
def images():
    return torch.randn(4, 3, 16, 16)


def prepared(images, estimator="nipq", bits=(2, 8), model=TinyResidual, **options):
    rules = [Rule("*", bits, bits, estimator=estimator, options=options)]
    return fxquant.prepare(model(), rules, calibration=[images]).train()


def members(model, cls):
    found = [m for m in model.modules() if isinstance(m, cls)]
    assert found
    return found


# ---- phases ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("total", "finetune", "begins"), [(8, 0.25, 6), (10, 0.5, 5), (10, 0.0, 10), (1, 0.25, 1), (4, 0.9, 0)]
)
def test_phases(images, total, finetune, begins):
    """The last share of the steps; without one, widths are whole when training ends."""
    controller = Controller(prepared(images), total, finetune=finetune)
    phases = [controller.phase]
    for _ in range(total):
        controller.step()
        phases.append(controller.phase)
    assert phases == ["train"] * begins + ["finetune"] * (total + 1 - begins)


@pytest.mark.parametrize(("after", "held"), [(None, [0, 0, 0, 0]), (2, [0, 0, 1, 1]), (0, [1, 1, 1, 1])])
def test_batch_norm_is_frozen_after_so_many_steps(images, after, held):
    """Trained throughout, frozen on the way, or frozen from the start; a resumed training goes on so."""
    model = prepared(images)
    controller = Controller(model, 8, freeze_batch_norm=after)
    seen = []
    for _ in range(4):
        before = model.stem.bn.running_mean.clone()
        model.train()(images)
        seen.append(int(torch.equal(before, model.stem.bn.running_mean)))
        controller.step()
    assert seen == held
    resumed = prepared(images)
    Controller(resumed, 8, freeze_batch_norm=after).load_state_dict(controller.state_dict())
    before = resumed.stem.bn.running_mean.clone()
    resumed.train()(images)
    assert torch.equal(before, resumed.stem.bn.running_mean) is (after is not None)


def test_another_controller_lets_batch_norm_train_again(images):
    model = prepared(images)
    Controller(model, 8, freeze_batch_norm=0)
    for after, held in ((None, False), (0, True), (3, False)):
        Controller(model, 8, freeze_batch_norm=after)
        before = model.stem.bn.running_mean.clone()
        model.train()(images)
        assert torch.equal(before, model.stem.bn.running_mean) is held


def test_a_budget_out_of_reach_is_refused_before_training(images):
    with pytest.raises(SpecError, match=r"budget mean_weight_bits=3 was asked for, but the lowest widths .* take 4"):
        Controller(prepared(images, bits=(4, 8)), 8, budget=Budget(mean_weight_bits=3.0))


def test_a_negative_number_of_steps_is_refused(images):
    with pytest.raises(SpecError, match="freeze_batch_norm=-1"):
        Controller(prepared(images), 8, freeze_batch_norm=-1)


def test_finetune_fixes_widths_and_ends_the_noise(images):
    """Exactly at its first step; from then on a training forward is the eval forward."""
    model = prepared(images)
    controller = Controller(model, 8, budget=Budget(mean_weight_bits=4.0, mean_activation_bits=5.0))
    with torch.no_grad():
        for _ in range(5):
            controller.step()
        assert all(e.noise and e.learns_width for e in members(model, NIPQ))
        assert not torch.equal(model(images), model(images))
        controller.step()
        assert not any(e.noise or e.learns_width for e in members(model, NIPQ))
        for estimator in members(model, NIPQ):
            x = torch.randn(estimator.channels, 50).abs()
            assert torch.equal(estimator.train()(x), estimator.eval()(x))
    layers, costs = cost.qat_layers(model), model.meta["fxquant"].costs
    assert float(cost.mean_weight_bits(layers, costs)) <= 4.0
    assert float(cost.mean_activation_bits(layers, costs)) <= 5.0
    assert all(float(e.bit_width()).is_integer() for e in members(model, NIPQ))


def test_whole_widths_lose_their_noise_too(images):
    model = prepared(images, bits=4)
    controller = Controller(model, 4)
    for _ in range(3):
        controller.step()
    assert not any(e.noise for e in members(model, NIPQ))


def test_finetune_learns_what_will_ship(images):
    """Weights and ranges go on learning in finetune; widths do not."""
    model = prepared(images)
    controller = Controller(model, 4, budget=Budget(mean_weight_bits=4))
    for _ in range(3):
        controller.step()
    model(images).square().sum().backward()
    for layer in cost.qat_layers(model).values():
        assert layer.weight.grad.any()
        assert layer.weight_fake_quant.raw_range.grad.any()
        assert layer.weight_fake_quant.raw_width.grad is None


def test_without_a_budget_learned_widths_stay_open_until_freeze(images):
    model = prepared(images)
    controller = Controller(model, 4)
    for _ in range(4):
        controller.step()
    assert all(layer.weight_fake_quant.learns_width for layer in cost.qat_layers(model).values())
    widths = fxquant.freeze(model, Budget(mean_weight_bits=4), calibration=[images])
    sizes = {name: layer.weight.numel() for name, layer in cost.qat_layers(model).items()}
    assert sum(widths[name][0] * size for name, size in sizes.items()) <= 4 * sum(sizes.values())


@pytest.mark.parametrize("steps", [0, -3])
def test_refused_steps(images, steps):
    with pytest.raises(SpecError, match=f"total_steps={steps}"):
        Controller(nn.Identity(), steps)


@pytest.mark.parametrize("finetune", [1.0, -0.1, float("nan")])
def test_refused_finetune(finetune):
    with pytest.raises(SpecError, match="finetune="):
        Controller(nn.Identity(), 5, finetune=finetune)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_on_torch_aos_own_prepare(images, estimator):
    """Its model has no budget and no record of ours, but the same phases."""
    with deprecations_silenced():
        mapping = fxquant.get_qat_qconfig_mapping(estimator, 4, 4)
        config = fxquant.get_backend_config()
        model = prepare_qat_fx(TinyResidual().train(), mapping, (images,), backend_config=config)
    model(images)
    controller = Controller(model, 4)
    for _ in range(4):
        controller.step()
    assert controller.phase == "finetune"
    assert all(e.settled for e in members(model, ESTIMATORS[estimator]))


@pytest.mark.parametrize(("estimator", "bits", "changes"), [
    ("lsq", 2, 0), ("pege", 2, 0), ("ste", 2, 0), ("nipq", (2, 8), 1), ("gdnsq", (2, 8), 1),
])  # fmt: skip
def test_fine_tuning_counts_as_another_width_where_widths_change(images, estimator, bits, changes):
    """What averages weights begins anew at every change."""
    controller = Controller(prepared(images, estimator, bits), 8, budget=Budget(mean_weight_bits=5), finetune=0.5)
    for _ in range(8):
        controller.step()
    assert controller.phase == "finetune"
    assert controller.width_changes == changes


def test_a_range_that_is_to_be_set_anew_is_not_final(images):
    model = prepared(images, "gdnsq", 2, initial_bits=8)
    controller = Controller(model, 4, finetune=0.5)
    for _ in range(2):
        model(images).sum().backward()
        assert not controller.final
        controller.step()
    assert all(e.settled for e in members(model, GDNSQ))
    assert not controller.final
    model(images)
    assert controller.final


# ---- schedules -------------------------------------------------------------------------------------------


def test_pege_curriculum(images):
    """p(t) over the estimator's share of the train phase, written at every step; the same for all."""
    model = prepared(images, "pege", 3, kappa=5.0, curriculum=0.5)
    controller, seen = Controller(model, 40, finetune=0.5), []
    for _ in range(40):
        (value,) = {e.replaced for e in members(model, PEGE)}
        assert controller.scheduled == {"replaced": pytest.approx(value)}
        seen.append(value)
        controller.step()
    assert seen == pytest.approx([rederived.pege_curriculum(t, 5.0, 10) for t in range(40)], abs=1e-12)


def test_gdnsq_temperature(images):
    """0 in warm-up, then linear up to the end of the train phase."""
    model = prepared(images, "gdnsq", 4, warmup=0.25, temperature=6.0)
    controller, seen = Controller(model, 16, finetune=0.25), []
    for _ in range(16):
        (value,) = {e.temperature for e in members(model, GDNSQ)}
        seen.append(value)
        controller.step()
    assert seen == pytest.approx([0, 0, 0] + [6.0 * min(t / 9, 1) for t in range(13)])
    assert not any(e.learns_width for e in members(model, GDNSQ))
    assert all(e.whole_bits == 4 for e in members(model, GDNSQ))


def test_what_is_scheduled_is_told_in_the_mean(images):
    rules = [
        Rule("stem", 3, 3, estimator="pege", options={"curriculum": 0.0}),
        Rule("*", 3, 3, estimator="pege", options={"curriculum": 1.0}),
    ]
    model = fxquant.prepare(TinyResidual(), rules, calibration=[images]).train()
    controller = Controller(model, 10, finetune=0.0)
    assert 0 < controller.scheduled["replaced"] < 1
    assert {e.replaced for e in members(model, PEGE)} == {0.0, 1.0}
    for _ in range(10):
        controller.step()
    assert controller.scheduled == {"replaced": pytest.approx(1.0)}
    assert Controller(prepared(images, "lsq", 3), 10).scheduled == {}


# ---- resuming --------------------------------------------------------------------------------------------


def train(model, controller, optimizer, images, steps):
    trace = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(images).square().mean()
        loss.backward()
        optimizer.step()
        controller.step()
        trace.append((loss.item(), controller.phase))
    return trace


@pytest.mark.parametrize(
    ("estimator", "stop"), [("nipq", 2), ("nipq", 6), ("nipq", 7), ("gdnsq", 2), ("gdnsq", 6), ("pege", 2)]
)
def test_resume_continues_identically(images, estimator, stop):
    """Interrupted in training, at the change of phase, or after it, and resumed in fresh objects."""
    bits = 4 if estimator == "pege" else (2, 6)
    build = {"estimator": estimator, "bits": bits}

    def fresh():
        torch.manual_seed(7)
        model = prepared(images, **build)
        return model, Controller(model, 8), torch.optim.Adam(model.parameters(), lr=1e-2)

    model, controller, optimizer = fresh()
    train(model, controller, optimizer, images, stop)
    saved = copy.deepcopy((model.state_dict(), controller.state_dict(), optimizer.state_dict()))
    torch.manual_seed(11)
    straight = train(model, controller, optimizer, images, 8 - stop)

    resumed_model, resumed_controller, resumed_optimizer = fresh()
    resumed_model.load_state_dict(saved[0], strict=True)
    resumed_controller.load_state_dict(saved[1])
    resumed_optimizer.load_state_dict(saved[2])
    torch.manual_seed(11)
    assert train(resumed_model, resumed_controller, resumed_optimizer, images, 8 - stop) == straight
    for name, value in model.state_dict().items():
        assert torch.equal(resumed_model.state_dict()[name], value), name


def test_state_is_plain_numbers(images):
    state = Controller(prepared(images), 8).state_dict()
    assert {type(value) for value in state.values()} <= {int, bool, float}


def test_schedules_are_applied_on_load(images):
    """A curriculum is where it was right after loading, before another step."""
    model = prepared(images, "pege", 3)
    controller = Controller(model, 20)
    for _ in range(4):
        controller.step()
    other = prepared(images, "pege", 3)
    resumed = Controller(other, 20)
    assert {e.replaced for e in members(other, PEGE)} == {0.0}
    resumed.load_state_dict(controller.state_dict())
    assert {e.replaced for e in members(other, PEGE)} == {e.replaced for e in members(model, PEGE)} != {0.0}


def test_state_of_another_length(images):
    state = Controller(prepared(images), 8).state_dict()
    with pytest.raises(CheckpointError, match="of a training of 8 steps, this one has 9"):
        Controller(prepared(images), 9).load_state_dict(state)


# ---- parameter groups ------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("network", [TinyResidual, TinyMobile])
def test_param_groups(images, estimator, network):
    """Every trainable parameter in one group, and no other; decay on weights alone."""
    model = prepared(images, estimator, 4, network)
    groups = param_groups(model, 0.1, quantizer_lr=0.01, weight_decay=1e-4)
    names = {id(p): n for n, p in model.named_parameters()}
    grouped = [names[id(p)] for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(n for n, p in model.named_parameters() if p.requires_grad)
    quantizers = {id(p) for m in model.modules() if isinstance(m, Estimator) for p in m.parameters() if p.requires_grad}
    norms = {id(p) for m in model.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()}
    biases = {id(p) for n, p in model.named_parameters() if n.endswith(".bias")}
    by_name = {group["name"]: {id(p) for p in group["params"]} for group in groups}
    assert by_name["norms"] == norms | biases
    assert by_name.get("quantizers", set()) == quantizers
    assert quantizers  # even STE's model has edges that learn
    assert {group["name"]: (group["lr"], group["weight_decay"]) for group in groups} == {
        "weights": (0.1, 1e-4),
        "norms": (0.1, 0.0),
        "quantizers": (0.01, 0.0),
    }


def test_quantizers_learn_at_the_common_rate_by_default(images):
    groups = param_groups(prepared(images), 0.3)
    assert {group["lr"] for group in groups} == {0.3}
    torch.optim.SGD(groups, lr=0.3, momentum=0.9)  # any optimizer takes them


def test_no_empty_group():
    """Some optimizers and schedulers refuse them."""
    groups = param_groups(nn.Linear(3, 2, bias=False), 0.1)
    assert [group["name"] for group in groups] == ["weights"]
    model = nn.Linear(3, 2)
    model.weight.requires_grad_(False)
    assert [group["name"] for group in param_groups(model, 0.1)] == ["norms"]


# ---- gradual widths --------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ["lsq", "pege", "nipq"])
def test_widths_come_down_one_bit_at_a_time(with_vnni, images, estimator):
    """From start_bits to the rule's own, on a range fitted anew; 8-bit layers and the edges are left alone."""
    rules = [Rule("stem", 8, 8, estimator=estimator), Rule("*", 2, 3, estimator=estimator)]
    model = fxquant.prepare(TinyResidual(), rules, calibration=[images]).train()
    layer, stem = model.get_submodule("conv1"), model.get_submodule("stem")
    before = layer.weight_fake_quant.calculate_qparams()[0]
    controller = Controller(model, 8, start_bits=4, squeeze=0.5, finetune=0.25)
    seen, changes, final = [], [], []
    for _ in range(8):
        model(images)
        seen.append((layer.weight_fake_quant.whole_bits, layer.input_fake_quant.whole_bits))
        changes.append(controller.width_changes)
        final.append(controller.final)
        controller.step()
    assert seen == [(4, 4), (4, 4), (3, 4), (3, 4), (2, 3), (2, 3), (2, 3), (2, 3)]
    last = 4 if estimator == "nipq" else 3  # where noise ends, weights mean something else too
    assert changes == [1, 1, 2, 2, 3, 3, last, last]
    assert final == [False] * 4 + [estimator != "nipq"] * 2 + [True] * 2
    assert stem.weight_fake_quant.whole_bits == 8
    # No optimizer took a step: the last fit is the one that prepare() made.
    torch.testing.assert_close(layer.weight_fake_quant.calculate_qparams()[0], before)


@pytest.mark.parametrize("estimator", ["lsq", "pege", "nipq"])
@pytest.mark.parametrize(("squeeze", "finetune"), [(0.5, 0.5), (0.33, 0.67), (1.0, 0.0), (0.25, 0.5)])
@pytest.mark.parametrize("total", [4, 5, 16])
def test_widths_that_come_down_reach_the_rule_s_own(images, estimator, squeeze, finetune, total):
    model = fxquant.prepare(TinyResidual(), [Rule("*", 2, 2, estimator=estimator)], calibration=[images]).train()
    controller = Controller(model, total, start_bits=4, squeeze=squeeze, finetune=finetune)
    widths = []
    for _ in range(total):
        model(images)
        widths.append(model.get_submodule("conv1").weight_fake_quant.whole_bits)
        controller.step()
    assert widths[0] == 4
    assert widths[-1] == 2
    assert controller.final or finetune == 0
    assert set(fxquant.freeze(model).values()) == {(2, 2)}


def test_a_squeeze_that_leaves_no_time_is_refused(images):
    with pytest.raises(SpecError, match=r"squeeze=0.8 was asked for with finetune=0.25; widths come down before"):
        Controller(prepared(images, "lsq", 2), 8, start_bits=4, squeeze=0.8)
    with pytest.raises(SpecError, match=r"start_bits=9 was asked for"):
        Controller(prepared(images, "lsq", 2), 8, start_bits=9)
