"""A loss that is no number or explodes: which layer went first, and stopping or going back to the last checkpoint."""

from __future__ import annotations

import math
import time
import tomllib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fxquant as fq
from fxquant import checkpoint
from fxquant.errors import DivergenceError
from fxquant.recipe import DivergenceSection, RecipeError, load_recipe, parse_recipe
from fxquant.train import Silent, run
from fxquant.train.divergence import all_finite, first_not_finite, furthest, weights_of
from fxquant.train.guard import Diverged, Guard
from tests.models import TinyResidual, settle

from .conftest import RECIPES
from .test_train import Cut

PLACE = ("quantized", 1, 1)

# ---- which layer went first ------------------------------------------------------------------------------


class Rooted(nn.Module):
    """Layers whose names are not in the order of their calls, and a root of which the gradient at 0 is infinite."""

    def __init__(self):
        super().__init__()
        self.last, self.second, self.first = nn.Linear(4, 2), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        second = self.second(torch.relu(self.first(x)))
        return self.last((second - second.detach()).sqrt())


def test_of_layers_that_a_gradient_spoilt_the_nearest_to_the_loss_went_first():
    model, x = Rooted(), torch.randn(8, 4)
    model(x).square().sum().backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    assert torch.isfinite(model.last.weight).all()
    assert not torch.isfinite(model.first.weight).all()
    assert not all_finite(model)
    assert first_not_finite(model, x) == "'second.bias' holds NaN or infinity, by the gradient of the step before"


def test_of_activations_that_overflow_the_first_one_is_named():
    model, x = Rooted(), torch.randn(8, 4)
    model.second.weight.data.fill_(3e38)
    assert all_finite(model)
    assert first_not_finite(model, x) == "activations overflow, first in 'second'"
    assert first_not_finite(Rooted(), x) == "every activation is finite, the loss itself is not"


@pytest.mark.parametrize("estimator", ["lsq", "pege", "gdnsq", "nipq"])
def test_a_quantized_layer_is_named(estimator):
    x = torch.randn(4, 3, 16, 16)
    model = fq.prepare(settle(TinyResidual(), x), [fq.Rule("*", 4, 4, estimator)], calibration=[x]).train()
    model.conv2.weight.data[0, 0, 0, 0] = math.nan
    assert first_not_finite(model, x).startswith("'conv2.weight' holds NaN")
    model.conv2.weight.data[0, 0, 0, 0] = 0
    model.conv2.bn.weight.data.fill_(3e38)
    assert "first in 'conv2" in first_not_finite(model, x)


def test_statistics_of_batch_norm_are_looked_at_too():
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    assert all_finite(model)
    model[1].running_var[0] = math.inf
    assert not all_finite(model)


def test_the_layer_that_moved_most_is_named():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    before = weights_of(model)
    assert before.keys() == {"0.weight", "1.weight"}
    with torch.no_grad():
        model[0].weight.mul_(1.5)
        model[1].weight.mul_(-3)
    assert (
        furthest(model, before)
        == "furthest from where the epoch began are the weights '1.weight', by 4 times their norm"
    )


# ---- what counts as a divergence -------------------------------------------------------------------------


def judge(guard, epochs):
    """Take a guard through epochs of losses; the (epoch, step) at which it says that they diverge."""
    model, step = nn.Linear(2, 2), 0
    for epoch, losses in enumerate(epochs, 1):
        guard.begin_epoch(model)
        for loss in losses:
            step += 1
            try:
                guard.check(("float", epoch, step), model, torch.ones(1, 2), {"loss": loss})
            except Diverged as diverged:
                return diverged.epoch, diverged.step
        guard.end_epoch(("float", epoch, step), model, torch.ones(1, 2))
    return None


def guard(**values):
    return Guard(DivergenceSection(**values))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_loss_or_a_part_that_is_no_number_has_diverged(value):
    assert judge(guard(), [[2.0, 1.0], [1.0, value]]) == (2, 4)
    with pytest.raises(Diverged, match=r"in epoch 1 of quantized training, step 1, the loss is NaN or infinite: every"):
        guard().check(PLACE, nn.Linear(2, 2), torch.ones(1, 2), {"total": 1.0, "budget": value})


def test_a_finite_loss_has_after_so_many_steps_above_the_lowest_mean_of_an_epoch():
    options = {"loss_factor": 3, "patience": 2}
    assert judge(guard(**options), [[2.0, 1.0], [3.1, 9.0]]) is None, "twice the lowest mean is 4.5"
    assert judge(guard(**options), [[2.0, 1.0], [9.0, 1.0, 9.0, 9.0]]) == (2, 6)
    assert judge(guard(**options), [[2.0, 7.0, 7.0]]) == (1, 3), "in the first epoch, its first loss"
    assert judge(guard(**options), [[1.0], [5.0], [5.0]]) == (3, 3), "in a row, over the end of an epoch"
    assert judge(guard(patience=2), [[1.0], [1e30], [1e30]]) is None, "not asked for"


@given(st.lists(st.lists(st.floats(1, 3), min_size=1, max_size=5), max_size=5), st.integers(1, 3))
def test_losses_within_the_factor_never_diverge(epochs, patience):
    assert judge(guard(loss_factor=3.001, patience=patience), epochs) is None


def test_a_guard_goes_on_from_its_state():
    first = guard(loss_factor=2, patience=3)
    assert judge(first, [[1.0, 1.0], [0.5, 9.0]]) is None
    second = guard(loss_factor=2, patience=3)
    second.load_state_dict(first.state_dict())
    assert judge(second, [[9.0, 9.0]]) == (1, 2)
    second.begin_stage()
    assert judge(second, [[9.0, 9.0]]) is None


def test_values_that_make_no_sense_are_refused():
    for override in ("lr_factor=0", "lr_factor=1.5", "max_rollbacks=0", "loss_factor=1", "patience=0", "action=go"):
        with pytest.raises(RecipeError, match=rf"divergence\.{override.split('=')[0]}"):
            load_recipe(RECIPES / "digits_w4a4_nipq.toml", [f"divergence.{override}"])


# ---- whole runs ------------------------------------------------------------------------------------------

SHORT = ["data.batch_size=256", "quantization.lower=[]"]  # four steps an epoch
QUANTIZED = ["float.epochs=1", "train.epochs=3", "train.finetune=0.5", "train.average=0.9", *SHORT]
NAME = "digits_mixed4_nipq"


class Notes(Silent):
    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)


def in_float(**divergence):
    """A recipe of three epochs in float alone, of four steps each."""
    values = tomllib.loads((RECIPES / "base" / "digits.toml").read_text())
    del values["train"]
    values["float"]["epochs"], values["data"]["batch_size"] = 3, 256
    return parse_recipe({"name": "float", **values, "divergence": divergence}, "here")


@pytest.fixture
def spoil(monkeypatch):
    """Spoils a weight after a step of a stage, until the run has been rolled back so often."""

    def arrange(stage, step, times=1, weight="layer2.0.conv1.weight"):
        check = Guard.check

        def spoiling(self, place, model, *rest):
            check(self, place, model, *rest)
            if (place[0], place[2]) == (stage, step) and len(self.rollbacks) < times:
                dict(model.named_parameters())[weight].data.view(-1)[0] = math.nan

        monkeypatch.setattr(Guard, "check", spoiling)

    return arrange


def test_it_stops_with_the_layer_and_may_be_resumed_with_rollbacks(spoil, tmp_path):
    spoil("float", 6)
    with pytest.raises(DivergenceError) as error:
        run(in_float(), tmp_path)
    for words in (
        "in epoch 2 of float training, step 7, the loss is NaN or infinite: ",
        "'layer2.0.conv1.weight' holds NaN or infinity",
        "Lower float.lr and run anew, or resume with --set divergence.action=rollback",
    ):
        assert words in str(error.value)
    state = checkpoint.load_checkpoint(tmp_path / checkpoint.CHECKPOINT)
    assert (state["stage"], state["epochs_done"]) == ("float", 1)
    before = state["optimizer"]["param_groups"][0]["lr"]
    progress = Notes()
    result = run(in_float(action="rollback", lr_factor=0.25), tmp_path, resume=True, progress=progress).result
    assert result["rollbacks"][0]["cause"] in progress.notes[0]
    assert len(progress.notes) == 1
    assert "back to the last checkpoint, with learning rates times 0.25 (rollback 1 of at most 3)" in progress.notes[0]
    state = checkpoint.load_checkpoint(tmp_path / checkpoint.CHECKPOINT)
    assert state["epochs_done"] == 3
    assert state["divergence"]["rollbacks"][0]["step"] == 7
    assert state["optimizer"]["param_groups"][0]["lr"] <= 0.25 * before


def test_weights_spoilt_by_the_last_step_of_an_epoch_never_reach_a_checkpoint(spoil, tmp_path):
    spoil("float", 8)
    progress = Notes()
    run(in_float(action="rollback"), tmp_path, progress=progress)
    assert "in epoch 2 of float training, step 8, the weights are NaN or infinite: 'layer2.0.conv1" in progress.notes[0]
    state = checkpoint.load_checkpoint(tmp_path / checkpoint.CHECKPOINT)
    assert all(torch.isfinite(tensor).all() for tensor in state["model"].values())


def test_what_was_rolled_back_took_its_time_too(spoil, tmp_path, monkeypatch):
    spoil("float", 2)
    roll_back = Guard.roll_back

    def slowly(self, diverged):
        time.sleep(2)
        return roll_back(self, diverged)

    monkeypatch.setattr(Guard, "roll_back", slowly)
    began = time.perf_counter()
    seconds = run(in_float(action="rollback"), tmp_path).result["seconds"]
    assert time.perf_counter() - began - seconds < 1.5


def test_after_so_many_rollbacks_it_stops(spoil, tmp_path):
    spoil("float", 2, times=9)
    progress = Notes()
    words = r"after 2 rollbacks \(divergence.max_rollbacks\), with learning rates times 0.25. Lower float.lr"
    with pytest.raises(DivergenceError, match=words):
        run(in_float(action="rollback", max_rollbacks=2), tmp_path, progress=progress)
    assert len(progress.notes) == 2


def test_a_run_killed_during_or_after_a_rollback_ends_as_one_that_was_not(spoil, tmp_path):
    """Spoilt in the second quantized epoch; cut after it was rolled back, and an epoch later."""
    recipe = load_recipe(RECIPES / f"{NAME}.toml", [*QUANTIZED, "divergence.action=rollback"])
    spoil("quantized", 7)
    whole = run(recipe, tmp_path / "whole")
    (rollback,) = whole.result["rollbacks"]
    assert (rollback["stage"], rollback["epoch"], rollback["step"]) == ("quantized", 2, 8)
    for steps in (8, 8):  # of four an epoch: the second one takes three, is rolled back, and takes four
        with pytest.raises(KeyboardInterrupt):
            run(recipe, tmp_path / "cut", resume=True, progress=Cut("quantized", steps))
    resumed = run(recipe, tmp_path / "cut", resume=True)
    assert {**whole.result, "seconds": 0} == {**resumed.result, "seconds": 0}
    for name, tensor in whole.reference.state_dict().items():
        assert torch.equal(tensor, resumed.reference.state_dict()[name]), name


def test_a_stage_that_diverges_before_its_first_checkpoint_begins_anew(tmp_path):
    """By the learning rate alone, and back to a healthy one."""
    options = ["float.epochs=1", "train.epochs=1", "train.quantizer_lr=1e5", *SHORT]
    options += ["divergence.action=rollback", "divergence.lr_factor=1e-7"]
    result = run(load_recipe(RECIPES / f"{NAME}.toml", options), tmp_path).result
    (rollback,) = result["rollbacks"]
    assert (rollback["stage"], rollback["epoch"]) == ("quantized", 1)
    assert "fake_quant'" in rollback["cause"]
    assert result["parity"]["reference_equals_fake_quant"]
