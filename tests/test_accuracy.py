"""fxquant bench accuracy: what it runs, what it keeps, and its table against the results it is made of."""

from __future__ import annotations

import csv
import json
import statistics
import sys

import pytest

from fxquant import checkpoint, cli
from fxquant.bench import accuracy
from fxquant.errors import CheckpointError, DivergenceError, FxQuantError, ParityError, SpecError
from fxquant.recipe import RecipeError

from .conftest import RECIPES

FLOAT, W4A4 = "float.toml", "digits_w4a4_lsq.toml"


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """A float recipe and a quantized one on digits; the float one takes no override of [train]."""
    folder = tmp_path_factory.mktemp("recipes")
    text = (RECIPES / "base" / "digits.toml").read_text()
    (folder / FLOAT).write_text(text[: text.index("[train]")].replace("epochs = 20", "epochs = 2"))
    (folder / W4A4).write_text(f'extends = "{RECIPES / W4A4}"\n[float]\nepochs = 1\n[train]\nepochs = 1\n')
    return [folder / FLOAT, folder / W4A4]


SAME = ["quantization.lower=['x86']", "data.batch_size=256"]


@pytest.fixture(scope="module")
def finished(paths, tmp_path_factory):
    output = tmp_path_factory.mktemp("accuracy")
    recipes = accuracy.recipes_of(paths, 2, SAME)
    return recipes, output, accuracy.carry_out(recipes, output)


def test_the_table_says_what_the_results_say(finished):
    _, output, results = finished
    table = accuracy.rows(results)
    assert [(row.recipe, row.estimator, row.epochs, row.seeds) for row in table] == [
        ("float", "float", 2, 2),
        ("digits_w4a4_lsq", "lsq", 2, 2),
    ]
    read = [json.loads((output / "digits_w4a4_lsq" / f"seed{s}" / "result.json").read_text()) for s in (0, 1)]
    alone = [json.loads((output / "float" / f"seed{s}" / "result.json").read_text()) for s in (0, 1)]
    row = table[1]
    assert row.reference == [result["reference_accuracy"] for result in read]
    assert row.fake_quant == [result["simulated"]["accuracy"] for result in read]
    assert row.lowered == [result["lowered"]["x86"]["accuracy"] for result in read]
    assert row.gap == [a["reference_accuracy"] - b["float_accuracy"] for a, b in zip(read, alone, strict=True)]
    assert row.file_bytes == (output / "digits_w4a4_lsq" / "seed0" / checkpoint.PACKED_MODEL).stat().st_size
    assert row.exact
    text = accuracy.markdown(table)
    mean, deviation = statistics.mean(row.reference), statistics.stdev(row.reference)
    assert f"| {mean:.2f} ± {deviation:.2f} |" in text.splitlines()[3]
    assert "| - | - | - | - | - |" in text.splitlines()[2]  # of a float row, all that only a quantized one has
    accuracy.write(table, output)
    with (output / accuracy.CSV).open() as file:
        records = list(csv.DictReader(file))
    assert [float(value) for value in records[1]["reference"].split()] == row.reference


def test_what_is_finished_is_kept_and_what_was_cut_goes_on(finished, monkeypatch):
    recipes, output, results = finished
    lines = []
    assert accuracy.carry_out(recipes, output, watch=lines.append) == results
    assert lines == []
    folder = accuracy.folder_of(recipes[-1], output)
    before = (folder / checkpoint.RESULT).read_text()
    (folder / checkpoint.RESULT).unlink()
    again = accuracy.carry_out(recipes, output, watch=lines.append)
    assert lines == ["going on with digits_w4a4_lsq, seed 1"]
    drop = lambda result: {k: v for k, v in result.items() if k not in ("seconds", "file_bytes")}  # noqa: E731
    assert drop(again[-1]) == drop(json.loads(before))


def test_the_table_is_made_again_from_the_results_alone(finished):
    recipes, output, results = finished
    folder = accuracy.folder_of(recipes[-1], output)
    kept = [(folder / name, (folder / name).read_bytes()) for name in (checkpoint.PACKED_MODEL, checkpoint.RESULT)]
    (folder / checkpoint.PACKED_MODEL).unlink()
    assert accuracy.rows(accuracy.carry_out(recipes, output)) == accuracy.rows(results)
    older = {key: value for key, value in results[-1].items() if key != "file_bytes"}
    (folder / checkpoint.RESULT).write_text(json.dumps(older))
    with pytest.raises(CheckpointError, match=r"seed1 holds neither model.fxq nor float.safetensors"):
        accuracy.carry_out(recipes, output)
    for path, content in kept:
        path.write_bytes(content)
    (folder / checkpoint.RESULT).write_text(json.dumps(older))
    assert accuracy.carry_out(recipes, output) == results  # its size is looked up
    (folder / checkpoint.RESULT).write_bytes(kept[1][1])


def test_a_run_that_fails_keeps_no_other_from_its_row(finished, monkeypatch):
    recipes, output, results = finished
    folder = accuracy.folder_of(recipes[0], output)
    kept = (folder / checkpoint.RESULT).read_bytes()
    (folder / checkpoint.RESULT).unlink()

    def diverge(recipe, *args, **kwargs):
        raise DivergenceError("the loss became NaN in 'conv1'")

    found, lines = [], []
    monkeypatch.setattr(accuracy, "run", diverge)
    with pytest.raises(FxQuantError, match=r"1 of 4 runs failed. float, seed 0: the loss became NaN in 'conv1'"):
        accuracy.carry_out(recipes, output, watch=lines.append, so_far=lambda results: found.append(list(results)))
    assert [(r["recipe"], r["seed"]) for r in found[-1]] == [(r["recipe"], r["seed"]) for r in results[1:]]
    assert len(found) == 3
    assert lines[-1] == "float, seed 0: the loss became NaN in 'conv1'"
    (folder / checkpoint.RESULT).write_bytes(kept)


def test_the_gap_is_to_the_float_run_of_the_same_model_and_data(finished):
    alone, _, quantized, _ = json.loads(json.dumps(finished[2]))
    assert accuracy.rows([alone, quantized])[1].gap
    for key in ("model", "data"):
        assert not accuracy.rows([alone | {key: "another"}, quantized])[1].gap
    with pytest.raises(SpecError, match=r"two float recipes train .* for 2 epochs from seed 0, so the gap"):
        accuracy.rows([alone, alone | {"recipe": "other"}, quantized])


def test_two_float_recipes_of_one_training_are_refused_before_anything_runs(paths, tmp_path):
    """The table could not be made: nor could that of the runs behind them."""
    other = tmp_path / "other.toml"
    other.write_text(f'extends = "{paths[0]}"\n[float]\nlr = 1e-4\n')
    with pytest.raises(SpecError, match=r"two float recipes train .* for 2 epochs from seed 0.* 'float' or 'other'"):
        accuracy.recipes_of([paths[0], other, paths[1]], 1, SAME)
    other.write_text(f'extends = "{paths[0]}"\n[float]\nepochs = 3\n')
    assert len(accuracy.recipes_of([paths[0], other, paths[1]], 2, SAME)) == 6


def test_widths_and_costs_are_the_mean_over_seeds(finished):
    """Learned ones differ from seed to seed."""
    *_, first, second = json.loads(json.dumps(finished[2]))
    same = accuracy.markdown(accuracy.rows([first, second])).splitlines()[2].split(" | ")
    assert same[2] == f"{first['mean_weight_bits']:.2f}"
    second |= {"mean_weight_bits": first["mean_weight_bits"] + 2, "bops": first["bops"] * 3}
    second["computed_in"] = {"float": "float32", "quantized": "bfloat16"}
    (row,) = accuracy.rows([first, second])
    assert row.weight_bits == [first["mean_weight_bits"], second["mean_weight_bits"]]
    assert row.computed_in == "float32, bfloat16"
    cells = accuracy.markdown([row]).splitlines()[2].split(" | ")
    assert cells[2] == f"{first['mean_weight_bits'] + 1:.2f} ± {2**0.5:.2f}"
    assert cells[11].startswith(f"{2 * first['bops'] / 1e9:.3f} ± ")


def test_a_folder_of_another_recipe_is_refused_before_anything_runs(finished, paths):
    _, output, _ = finished
    other = accuracy.recipes_of(paths, 3, [*SAME, "float.lr=0.5"])
    with pytest.raises(
        CheckpointError, match=r"holds a run of another recipe .* float\.lr \(0\.002 there, 0\.5 here\)"
    ):
        accuracy.carry_out(other, output)
    assert not (output / "float" / "seed2").exists()


def test_epochs_are_those_of_the_training_that_a_recipe_is_about(paths):
    plain, quantized = accuracy.recipes_of(paths, 1, SAME, epochs=7)
    assert plain.float_training.epochs == 7
    assert (quantized.float_training.epochs, quantized.train.epochs) == (1, 7)


def test_overrides_of_quantized_training_pass_by_a_float_recipe(paths, tmp_path):
    alone, quantized = accuracy.recipes_of(paths, 1, [*SAME, "train.lr=0.5"])
    assert not alone.quantizes
    assert (quantized.train.lr, alone.float_training.lr) == (0.5, 2e-3)
    with pytest.raises(RecipeError, match=r"'train\.lrr'"):
        accuracy.recipes_of(paths, 1, [*SAME, "train.lrr=0.5"])
    unfinished = tmp_path / "unfinished.toml"
    unfinished.write_text(paths[0].read_text() + '[[rules]]\npattern = "*"\nbits = 4\n')
    (quantized,) = accuracy.recipes_of([unfinished], 1, [*SAME, "train.epochs=3"])
    assert quantized.train.epochs == 3


def test_what_makes_no_table_is_refused(paths):
    with pytest.raises(SpecError, match=r"--seeds 0 was asked for; a row is the mean over at least one"):
        accuracy.recipes_of(paths, 0)
    with pytest.raises(SpecError, match=r"'float' was given more than once"):
        accuracy.recipes_of([paths[0], paths[0]], 1)
    with pytest.raises(SpecError, match=r"--set seed=5 was asked for; .* the seeds 0 to N - 1 of --seeds N"):
        accuracy.recipes_of(paths, 1, ["seed=5"])


@pytest.mark.parametrize("damage", [{"parity": {"reference_equals_fake_quant": False}}, {"agreement": 90.0}])
def test_a_run_whose_integers_are_others_is_named(finished, damage):
    results = json.loads(json.dumps(finished[2]))
    if "parity" in damage:
        results[-1] |= damage
    else:
        results[-1]["lowered"]["x86"]["argmax_agreement"] = damage["agreement"]
    with pytest.raises(ParityError, match="the integers of digits_w4a4_lsq do not compute what was trained"):
        accuracy.require_exact(accuracy.rows(results))
    accuracy.require_exact(accuracy.rows(finished[2]))


def test_the_command_prints_the_table(finished, paths, monkeypatch, capsys):
    _, output, results = finished
    arguments = ["bench", "accuracy", *map(str, paths), "--seeds", "2", "--output", str(output)]
    for override in SAME:
        arguments += ["--set", override]
    monkeypatch.setattr(sys, "argv", ["fxquant", *arguments])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert exit_.value.code in (None, 0)
    assert accuracy.markdown(accuracy.rows(results)) in capsys.readouterr().out
    assert (output / accuracy.MARKDOWN).read_text() == accuracy.markdown(accuracy.rows(results))
