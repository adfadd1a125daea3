"""The pieces of training that low widths need: averages, the choice of an epoch, learning rates, float alone."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from fxquant import checkpoint
from fxquant.bench.machine import machine
from fxquant.errors import CheckpointError
from fxquant.layers import QATConv2d
from fxquant.recipe import load_recipe
from fxquant.train import Silent, load_run, precision, run
from fxquant.train.average import WeightAverage
from fxquant.train.keeper import Keeper
from fxquant.train.loop import learning_rate

from .conftest import RECIPES
from .test_inductor import lacking as no_compiler
from .test_train import SHORT, Cut


def net():
    return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))


# ---- learning rate ---------------------------------------------------------------------------------------


def test_learning_rate_rises_holds_and_falls():
    factor = learning_rate(100, 0.1, 0.6)
    values = [factor(step) for step in range(101)]
    assert values[:10] == pytest.approx([(0.1 + 0.09 * step) for step in range(10)])
    assert values[10:61] == [1.0] * 51
    assert values[60:] == sorted(values[60:], reverse=True)
    assert values[80] == pytest.approx(0.5)
    assert values[100] == pytest.approx(0, abs=1e-12)
    assert learning_rate(100, 0.1)(55) == pytest.approx(0.5)


# ---- average ---------------------------------------------------------------------------------------------


def test_average_is_the_recursion_of_its_docstring():
    model = net()
    average = WeightAverage(model, 0.5)
    expected = model[0].weight.detach().double()
    for update in range(12):
        with torch.no_grad():
            model[0].weight.add_(torch.randn(2, 3))
            model[1].running_mean.add_(1)
        average.update()
        d = min(0.5, (1 + update) / (10 + update))
        expected = d * expected + (1 - d) * model[0].weight.detach().double()
    torch.testing.assert_close(average.values["0.weight"].double(), expected, rtol=1e-5, atol=1e-6)
    assert 0 < average.values["1.running_mean"].max() < model[1].running_mean.max()
    average.restart()
    assert average.updates == 0
    assert torch.equal(average.values["0.weight"], model[0].weight)


def test_average_goes_on_from_its_state():
    model = net()
    average, other = WeightAverage(model, 0.9), WeightAverage(net(), 0.9)
    average.update()
    other.load_state_dict(average.state_dict())
    assert other.updates == 1
    assert all(torch.equal(value, other.values[name]) for name, value in average.values.items())


# ---- which epoch -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("right", "final", "chosen"),
    [
        ([1, 3, 2], [True] * 3, 2),
        ([9, 1, 2], [False, True, True], 3),
        ([9, 1, 1], [False] * 3, 3),
        ([2, 2], [True] * 2, 1),
    ],
)
def test_the_best_epoch_of_those_at_final_widths_is_kept(right, final, chosen):
    """Of equals the first; the last one where widths never became final."""
    model, epoch = net(), 0
    images, labels = torch.eye(3).repeat(4, 1)[:10], torch.zeros(10, dtype=torch.int64)
    keeper = Keeper(model, None, [(images, labels)], lambda: final[epoch])
    states = []
    for epoch in range(len(right)):
        with torch.no_grad():
            model[0].weight.copy_(torch.randn(2, 3))
            # As many predictions of class 0 as are to be right.
            labels.fill_(0)
            wanted = model.eval()(images).argmax(-1)
            labels.copy_(1 - wanted)
            labels[: right[epoch]] = wanted[: right[epoch]]
        states.append(model[0].weight.clone())
        assert keeper.after_epoch(epoch + 1) == {"validation": pytest.approx(10 * right[epoch])}
    keeper.restore()
    assert keeper.epoch == chosen
    assert torch.equal(model[0].weight, states[chosen - 1])


def test_without_average_and_choice_the_model_stays_as_it_is():
    model = net()
    keeper = Keeper(model)
    assert keeper.after_epoch(1) == {}
    before = model[0].weight.clone()
    keeper.restore()
    assert torch.equal(model[0].weight, before)
    assert keeper.state_dict()["kept"] is None


# ---- whole runs ------------------------------------------------------------------------------------------

EVERYTHING = [
    "float.autocast=bfloat16", "float.average=0.9", "train.autocast=bfloat16", "train.average=0.9",
    "train.start_bits=4", "train.schedule=hold", "train.dampening=0.01", "data.image_size=24",
    "float.channels_last=true", "train.channels_last=true",
    f"train.compile={'false' if no_compiler else 'true'}",
]  # fmt: skip


def test_with_every_piece_a_run_that_was_cut_ends_with_the_same_integers(tmp_path):
    recipe = load_recipe(RECIPES / "digits_w2a2_lsq.toml", [*SHORT, *EVERYTHING])
    whole = run(recipe, tmp_path / "whole")
    for stage, steps in (("float", 6), ("quantized", 6), ("quantized", 5)):
        torch._dynamo.reset()  # as in a process of its own
        with pytest.raises(KeyboardInterrupt):
            run(recipe, tmp_path / "cut", resume=(tmp_path / "cut").exists(), progress=Cut(stage, steps))
    torch._dynamo.reset()
    resumed = run(recipe, tmp_path / "cut", resume=True)
    read_back = load_run(tmp_path / "cut" / checkpoint.CHECKPOINT)
    for name, tensor in whole.reference.state_dict().items():
        assert torch.equal(tensor, resumed.reference.state_dict()[name]), name
        assert torch.equal(tensor, read_back.reference.state_dict()[name]), name
    assert whole.report.reference_equals_fake_quant
    assert "dampening" in whole.result["history"][-1]
    assert {(row["weight_bits"], row["activation_bits"]) for row in whole.result["layers"][1:-1]} == {(2, 2)}


@pytest.mark.parametrize(
    "piece", ["train.autocast=bfloat16", "train.average=0.9", "train.dampening=0.1", "train.start_bits=4"]
)
def test_each_piece_changes_what_is_trained(piece, tmp_path):
    if "bfloat16" in piece and not precision.has_bfloat16(torch.device("cpu")):
        pytest.skip("this CPU would emulate bfloat16, so that a run computes in float32")
    short = [*SHORT, "float.epochs=1", "train.epochs=1", "quantization.lower=[]", "data.image_size=24"]
    plain = run(load_recipe(RECIPES / "digits_w2a2_lsq.toml", short), tmp_path / "plain").reference.state_dict()
    other = run(load_recipe(RECIPES / "digits_w2a2_lsq.toml", [*short, piece]), tmp_path / "other").reference
    assert any(not torch.equal(tensor, plain[name]) for name, tensor in other.state_dict().items())


def test_channels_are_last_while_it_trains_and_not_after(tmp_path):
    """Of images, weights and what layers compute; the files are those of any other run."""
    seen = []

    class Watching(Silent):
        def prepared(self, model):
            self.layers = [module for module in model.modules() if isinstance(module, QATConv2d)]
            for layer in self.layers:
                layer.register_forward_hook(self.see)

        def see(self, layer, args, out):
            if layer.training and out.shape[2] > 1:
                seen.append([is_last(tensor) for tensor in (*args, layer.weight, out) if tensor.shape[1] > 1])

    def is_last(tensor):
        return tensor.is_contiguous(memory_format=torch.channels_last)

    watching = Watching()
    recipe = load_recipe(RECIPES / "digits_w2a2_lsq.toml", [*SHORT, "train.channels_last=true"])
    outcome = run(recipe, tmp_path / "run", progress=watching)
    assert seen
    assert all(all(each) for each in seen)
    assert all(tensor.is_contiguous() for tensor in outcome.model.state_dict().values())
    assert outcome.report.reference_equals_fake_quant


def test_without_bfloat16_a_run_computes_in_float32_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(precision, "has_bfloat16", lambda device: False)
    notes = []
    watching = Silent()
    watching.note = notes.append
    short = [*SHORT, "float.epochs=1", "train.epochs=1", "quantization.lower=[]", "data.image_size=24"]
    plain = run(load_recipe(RECIPES / "digits_w2a2_lsq.toml", short), tmp_path / "plain", progress=watching)
    assert not notes
    recipe = load_recipe(RECIPES / "digits_w2a2_lsq.toml", [*short, "train.autocast=bfloat16"])
    asked = run(recipe, tmp_path / "asked", progress=watching)
    for name, tensor in plain.reference.state_dict().items():
        assert torch.equal(tensor, asked.reference.state_dict()[name]), name
    assert [note.split(",")[0] for note in notes] == ["autocast = 'bfloat16' was asked for"]
    assert asked.result["computed_in"] == {"float": "float32", "quantized": "float32"}


@pytest.mark.parametrize("native", [True, False])
def test_layers_are_computed_in_what_the_device_has(native, monkeypatch):
    monkeypatch.setattr(precision, "has_bfloat16", lambda device: native)
    cpu = torch.device("cpu")
    assert precision.computed_in("bfloat16", cpu) == (torch.bfloat16 if native else torch.float32)
    assert precision.computed_in("float32", cpu) == torch.float32


def test_the_processor_tells_whether_it_has_bfloat16():
    flags = machine()["flags"]
    if not flags:
        pytest.skip("only Linux on x86 lists its processor's instructions")
    assert precision.has_bfloat16(torch.device("cpu")) == (flags["avx512_bf16"] or flags["amx_bf16"])


def test_a_device_that_does_not_say_what_it_has_is_given_what_was_asked_for():
    assert precision.computed_in("bfloat16", torch.device("mps")) == torch.bfloat16


def test_a_run_in_float_alone_leaves_weights_that_another_begins_with(tmp_path):
    text = (RECIPES / "base" / "digits.toml").read_text().split("[train]")[0]
    (tmp_path / "digits_float.toml").write_text(text)
    recipe = load_recipe(tmp_path / "digits_float.toml", ["float.epochs=2"])
    with pytest.raises(KeyboardInterrupt):
        run(recipe, tmp_path / "float", progress=Cut("float", 20))
    outcome = run(recipe, tmp_path / "float", resume=True)
    whole = run(recipe, tmp_path / "whole")
    weights = load_file(tmp_path / "float" / checkpoint.FLOAT_MODEL)
    for name, tensor in load_file(tmp_path / "whole" / checkpoint.FLOAT_MODEL).items():
        assert torch.equal(tensor, weights[name]), name
    assert outcome.result["float_accuracy"] == whole.result["float_accuracy"] > 50
    assert outcome.result["epochs"] == {"float": 2, "quantized": 0}
    assert (outcome.report, outcome.reference) == (None, None)
    options = [f"model.checkpoint={tmp_path / 'float' / checkpoint.FLOAT_MODEL}", *SHORT, "float.epochs=0"]
    begun = run(load_recipe(RECIPES / "digits_w4a4_lsq.toml", options), tmp_path / "begun")
    assert begun.result["float_accuracy"] == outcome.result["float_accuracy"]
    with pytest.raises(CheckpointError, match="trained in float alone; there are no integers in it"):
        load_run(tmp_path / "float" / checkpoint.CHECKPOINT)
