"""A recipe with an allocation, from the run to what reads it back; fxquant analyze on either."""

from __future__ import annotations

import json
import tomllib

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from fxquant import analyze
from fxquant.checkpoint import load_checkpoint
from fxquant.cli import app
from fxquant.cut_check import check_cut
from fxquant.errors import CheckpointError, FxQuantError, SpecError
from fxquant.recipe import load_recipe
from fxquant.spec import Rule
from fxquant.train import accuracy_of, load_run, open_source, run

from .conftest import RECIPES
from .test_train import Cut

RECIPE = RECIPES / "digits_mixed4_fisher.toml"
SHORT = ["float.epochs=2", "train.epochs=2", "quantization.lower=[]", "quantization.vnni=true", "data.batch_size=256"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("allocation") / "run"
    return run(load_recipe(RECIPE, SHORT), folder), folder


def test_the_widths_that_were_chosen_are_trained_and_shipped(finished):
    outcome, folder = finished
    assert outcome.report.reference_equals_fake_quant
    assert outcome.result["mean_weight_bits"] <= 4
    assert outcome.result["mean_activation_bits"] <= 5
    written = tomllib.loads((folder / "rules.toml").read_text())["rules"]
    assert {r["pattern"]: r["weight_bits"] for r in written} == {
        row["layer"]: row["weight_bits"] for row in outcome.result["layers"]
    }
    assert len({r["weight_bits"] for r in written[1:-1]}) > 1
    assert (written[0]["weight_bits"], written[-1]["weight_bits"]) == (8, 8)


def test_a_run_that_is_cut_resumes_with_the_same_widths(finished, tmp_path):
    outcome, folder = finished
    recipe = load_recipe(RECIPE, SHORT)
    with pytest.raises(KeyboardInterrupt):
        run(recipe, tmp_path, progress=Cut("quantized", 6))  # 5 steps an epoch: in the middle of the last
    assert load_checkpoint(tmp_path / "checkpoint.pt")["rules"]
    resumed = run(recipe, tmp_path, resume=True)
    tensors = resumed.reference.state_dict()
    assert all(torch.equal(value, tensors[name]) for name, value in outcome.reference.state_dict().items())
    assert (tmp_path / "rules.toml").read_text() == (folder / "rules.toml").read_text()


def test_the_checkpoint_alone_gives_the_integers_back(finished):
    outcome, folder = finished
    again = load_run(folder / "checkpoint.pt").reference.state_dict()
    assert all(torch.equal(value, again[name]) for name, value in outcome.reference.state_dict().items())
    assert len(load_checkpoint(folder / "checkpoint.pt")["rules"]) == len(outcome.result["layers"])


@pytest.mark.parametrize("file", ["model.fxq", "checkpoint.pt"])
def test_a_run_is_read_on_another_cpu_with_its_own_widths(finished, without_vnni, file):
    outcome, folder = finished
    again = load_run(folder / file).reference
    assert all(torch.equal(t, again.state_dict()[name]) for name, t in outcome.reference.state_dict().items())
    assert [rule.weight_bits for rule in again.meta["fxquant"].rules.values()] == [
        row["weight_bits"] for row in outcome.result["layers"]
    ]


def test_a_run_for_another_cpu_is_no_run_for_this_one(finished, without_vnni):
    with pytest.raises(CheckpointError, match=r"is of another recipe than .* differs in quantization\.vnni"):
        run(load_recipe(RECIPE, [text for text in SHORT if "vnni" not in text]), finished[1], resume=True)


def test_a_run_is_analysed_as_it_was_trained(finished, tmp_path):
    _, folder = finished
    file = tmp_path / "found.json"
    done = CliRunner().invoke(app, ["analyze", str(folder), "--json", str(file)], env={"COLUMNS": "160"})
    assert done.exit_code == 0, done.output
    found = json.loads(file.read_text())["capacity"]
    assert "cut #1: " in done.output
    assert found["cuts"][0]["bits"] == found["bits"] > 0
    widths = {row["name"]: row["bits"] for row in found["tensors"]}
    rules = {r["pattern"]: r for r in tomllib.loads((folder / "rules.toml").read_text())["rules"]}
    assert all(widths[f"{name}.weight"] == rule["weight_bits"] for name, rule in rules.items())
    opened = open_source(folder / "checkpoint.pt")
    assert analyze(opened.model).to_dict()["cuts"] == found["cuts"]


def test_a_table_can_be_written_for_a_run(finished, tmp_path):
    table = tmp_path / "rules.toml"
    arguments = ["analyze", str(finished[1]), "--sensitivity", "fisher", "--batches", "1", "--output", str(table)]
    assert CliRunner().invoke(app, arguments, env={"COLUMNS": "160"}).exit_code == 0
    path = tmp_path / "mine.toml"
    path.write_text(f'extends = ["{RECIPES / "digits_w4a4_lsq.toml"}", "rules.toml"]\n')
    assert len(load_recipe(path).built_rules()) == len(finished[0].result["layers"])


def test_the_cut_is_compared_with_others(finished):
    opened = open_source(finished[1])
    rules = [Rule("first|last", 8, 8), Rule("*", 2, 2)]
    checked = check_cut(
        opened.float_model, rules, opened.data.plain(), lambda model: accuracy_of(model, opened.data.test()),
        draws=2, correlate=("fisher",), widths=(3,), max_batches=1,
    )  # fmt: skip
    assert len(checked.others) == 2
    assert len({names for names, _ in checked.others}) == 2
    assert not any(set(names) & set(checked.cut) for names, _ in checked.others)
    assert all(len(names) == len(checked.cut) for names, _ in checked.others)
    assert checked.correlation["fisher"][3] > 0.5
    assert checked.to_dict()["advantage"] == pytest.approx(checked.after - sum(a for _, a in checked.others) / 2)
    with pytest.raises(SpecError, match=r"the rule '\*' learns its widths"):
        check_cut(opened.float_model, [Rule("*", (2, 8), 4, "nipq")], [], lambda model: (0.0, 1))
    with pytest.raises(SpecError, match="holds no layer below full width"):
        check_cut(opened.float_model, [Rule("*", 8, 8)], opened.data.plain(), lambda model: (0.0, 1))


def seen_in_comparison(folder, look, **options):
    """What ``look`` sees of each of the three models: as it is, the cut raised, others raised."""
    opened, seen = open_source(folder), []

    def accuracy(model):
        seen.append(look(model))
        return 0.0, 1

    rules, images = [Rule("first|last", 8, 8), Rule("*", 2, 2)], opened.data.plain()
    check_cut(opened.float_model, rules, images, accuracy, draws=1, correlate=(), max_batches=1, **options)
    return seen


def test_the_cut_is_compared_at_the_width_of_residuals(finished):
    def bits(model):
        return {e.whole_bits for name, e in model.named_modules() if name.endswith("_edge")}

    assert seen_in_comparison(finished[1], bits, residual_bits=5) == [{5}] * 3


def test_the_cut_is_compared_with_batch_norm_of_images_as_in_training(finished):
    def mean(model):
        return next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d)).running_mean.clone()

    plain = seen_in_comparison(finished[1], mean)
    images = torch.rand(16, *open_source(finished[1]).data.example.shape[1:])
    others = seen_in_comparison(finished[1], mean, statistics_images=lambda: iter([images]))
    assert len(plain) == 3
    assert all(not torch.allclose(a, b) for a, b in zip(plain, others, strict=True))


def test_what_cannot_be_analysed_says_so(finished, tmp_path):
    with pytest.raises(
        FxQuantError, match=r"trains its float model first \(float.epochs = 20\).*give the run's folder"
    ):
        open_source(RECIPE)
    with pytest.raises(FxQuantError, match=r"--set train.lr=1 changes a recipe, but .* is a run; leave it out"):
        open_source(finished[1], ["train.lr=1"])
    with pytest.raises(CheckpointError, match="does not exist"):
        open_source(tmp_path)
    text = (RECIPES / "base" / "digits.toml").read_text().split("[train]")[0]
    (tmp_path / "digits_float.toml").write_text(text)
    with pytest.raises(FxQuantError, match="trains in float alone, so nothing in it is quantized"):
        open_source(tmp_path / "digits_float.toml")
    with pytest.raises(SpecError, match=r"budget mean_weight_bits=1.5 was asked for, but the lowest widths"):
        run(load_recipe(RECIPE, [*SHORT, "budget.mean_weight_bits=1.5"]), tmp_path / "out")
    assert not (tmp_path / "out").exists()
