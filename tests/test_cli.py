"""The command line, run as a user runs it: what it prints, what it leaves, how it fails."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest

from fxquant import cli
from fxquant.coverage import row

from .conftest import RECIPES, ROOT

SHORT = ["--set", "float.epochs=1", "--set", "train.epochs=1", "--set", "quantization.lower=['x86']"]


def fxquant(*arguments, cwd=ROOT, columns="160"):
    command = [sys.executable, "-m", "fxquant", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=_environment(columns), check=False)


def _environment(columns="160"):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1", "COLUMNS": columns}
    return {name: value for name, value in environment.items() if value}


@pytest.mark.parametrize(("columns", "whole"), [("", True), ("60", False)])
def test_a_table_in_a_file_is_as_wide_as_it_needs(columns, whole):
    done = fxquant("ls", RECIPES / "ablation", columns=columns)
    assert done.returncode == 0, done.stderr
    assert ("w2a2_lsq_no_distillation.toml" in done.stdout) == whole


@pytest.fixture(scope="module")
def short_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "run"
    return fxquant("run", RECIPES / "digits_mixed4_nipq.toml", "--output", folder, *SHORT), folder


def test_run_leaves_its_files_and_prints_the_tables(short_run):
    done, folder = short_run
    assert done.returncode == 0, done.stderr
    assert {p.name for p in folder.iterdir() if p.is_file()} == {
        "recipe.json",
        "checkpoint.pt",
        "model.fxq",
        "result.json",
        "capacity.json",
    }
    for words in ("Prepared: which rule each layer got", "layer1.0.conv1", "W bits", "bit-exact", "lowered, x86"):
        assert words in done.stdout
    said = done.stderr.splitlines()
    assert all(re.fullmatch(r"warning: layers? .*: weight_bits=.* without VNNI .*", line) for line in said)
    assert len(said) <= 2  # of the layers that learn their width, and of the first and last


def test_warnings_are_a_line_each_and_those_of_others_say_where(monkeypatch, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        monkeypatch.setattr(warnings, "showwarning", cli._show_warning)
        warnings.warn_explicit("layer 'a': too wide [8]", UserWarning, str(Path(cli.__file__).parent / "prepare.py"), 7)
        assert capsys.readouterr().err == "warning: layer 'a': too wide [8]\n"
        warnings.warn_explicit("layer 'a': too wide [8]", UserWarning, str(Path(cli.__file__).parent / "cli.py"), 7)
        assert capsys.readouterr().err == ""
        warnings.warn_explicit("mind the gap", UserWarning, "/elsewhere/library.py", 7)
        assert "/elsewhere/library.py:7: UserWarning: mind the gap" in capsys.readouterr().err


def test_result_json_has_what_was_promised(short_run):
    result = json.loads((short_run[1] / "result.json").read_text())
    promised = {
        "recipe", "model", "estimator", "seed", "float_accuracy", "fake_quant_accuracy", "reference_accuracy",
        "lowered", "mean_weight_bits", "mean_activation_bits", "bops", "weights_bytes", "parity", "seconds",
    }  # fmt: skip
    assert promised <= result.keys()
    assert {"accuracy", "argmax_agreement", "max_code_difference"} <= result["lowered"]["x86"].keys()
    assert {"float", "ideal"} <= result["weights_bytes"].keys()
    assert result["parity"]["reference_equals_fake_quant"] is True
    assert result["mean_weight_bits"] <= 4
    assert result["mean_activation_bits"] <= 4


def test_lower_reads_the_run_back_and_agrees(short_run, tmp_path):
    folder = short_run[1]
    done = fxquant("lower", folder, "--backend", "onednn", "--output", tmp_path / "onednn.json")
    assert done.returncode == 0, done.stderr
    assert "onednn.qconv_pointwise" in done.stdout
    outcome = json.loads((tmp_path / "onednn.json").read_text())
    result = json.loads((folder / "result.json").read_text())
    assert outcome["reference_accuracy"] == result["reference_accuracy"]
    assert outcome["argmax_agreement"] >= 99.9


def test_what_is_said_of_a_file_needs_a_backend_that_reads_one(short_run, tmp_path):
    for option in (("--weight-only",), ("--onnx", tmp_path / "x.onnx"), ("--two-bit", "int2")):
        done = fxquant("lower", short_run[1], "--backend", "x86", *option)
        assert done.returncode == 2
        assert f"{option[0]}" in done.stderr
        assert "backend 'x86' reads no file; leave it out" in done.stderr


def test_compare(short_run):
    done = fxquant("compare", short_run[1])
    assert done.returncode == 0, done.stderr
    assert "digits_mixed4_nipq" in done.stdout
    assert "gap to float" in done.stdout


def test_output_folder_that_is_not_empty(short_run):
    before = {p: p.read_bytes() for p in short_run[1].rglob("*") if p.is_file()}
    done = fxquant("run", RECIPES / "digits_mixed4_nipq.toml", "--output", short_run[1], *SHORT)
    assert done.returncode == 2
    assert "is not empty (it holds capacity.json, checkpoint.pt" in done.stderr
    assert "--resume" in done.stderr
    assert {p: p.read_bytes() for p in short_run[1].rglob("*") if p.is_file()} == before


def test_resume_with_another_recipe(short_run):
    done = fxquant("run", RECIPES / "digits_mixed4_nipq.toml", "--output", short_run[1], "--resume", "--seed", 3)
    assert done.returncode == 2
    assert "is of another recipe" in done.stderr
    assert "seed (0 there, 3 here)" in done.stderr


def test_resume_of_a_folder_that_is_no_run(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    done = fxquant("run", RECIPES / "digits_mixed4_nipq.toml", "--output", tmp_path, "--resume")
    assert done.returncode == 2
    assert "holds no checkpoint.pt" in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_ls_show_validate():
    listed = fxquant("ls", "recipes")
    assert listed.returncode == 0
    assert "digits_w2a2_gdnsq" in listed.stdout
    shown = fxquant("show", RECIPES / "digits_w4a4_nipq.toml", "--set", "train.epochs=3", "--seed", "7")
    values = json.loads(shown.stdout)
    assert (values["train"]["epochs"], values["seed"]) == (3, 7)
    assert fxquant("validate", *sorted(RECIPES.glob("*.toml"))).returncode == 0


def test_validate_lists_the_problems_of_all(tmp_path):
    (tmp_path / "a.toml").write_text('extends = "missing.toml"')
    (tmp_path / "b.toml").write_text("sed = 1")
    done = fxquant("validate", tmp_path / "a.toml", tmp_path / "b.toml", RECIPES / "digits_w4a4_nipq.toml")
    assert done.returncode == 2
    assert "missing.toml, which a.toml extends: cannot be read" in done.stderr
    assert "unknown key 'sed': did you mean 'seed'" in done.stderr
    assert "digits_w4a4_nipq.toml: ok" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "recipes/digits_w4a4_nipk.toml"], "did you mean digits_w4a4_nipq"),
        (["run", "recipes/digits_w4a4_nipq.toml", "--set", "model.name=test_resnt"], "did you mean 'test_resnet'"),
        (["run", "recipes/digits_w4a4_nipq.toml", "--set", "train.optimizer=adamv"], "optimizer 'adamv' was asked for"),
        (["lower", "nowhere"], "nowhere does not exist"),
        (["lower", "nowhere", "--backend", "x68"], "unknown backend 'x68': did you mean 'x86'"),
        (["compare", "nowhere"], "give the folder of a finished run"),
        (["ls", "nowhere"], "not a folder"),
    ],
)
def test_bad_input_is_one_message_and_leaves_nothing(arguments, message, tmp_path):
    if arguments[0] == "run":
        arguments = [*arguments, "--output", str(tmp_path / "out"), "--set", "float.epochs=1"]
    done = fxquant(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out" / "result.json").exists()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupt_keeps_the_last_epoch_and_resume_goes_on(number, status, tmp_path):
    folder = tmp_path / "run"
    command = ["run", "recipes/digits_w4a4_nipq.toml", "--output", folder, "--set", "train.epochs=2", *SHORT[:2]]
    arguments = [sys.executable, "-m", "fxquant", *map(str, command)]
    process = subprocess.Popen(
        arguments,
        cwd=ROOT,
        env=_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # A shell's background jobs, and what they start, ignore the signal otherwise.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while not (folder / "checkpoint.pt").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    process.send_signal(number)
    _, stderr = process.communicate()
    assert process.returncode == status
    said = f"{folder / 'checkpoint.pt'} holds epoch 1 of 1 of float training. Go on with: fxquant run recipes/digits"
    assert said in stderr.decode()
    assert "Traceback" not in stderr.decode()
    assert not (folder / "result.json").exists()
    assert not list(folder.glob(".*"))
    if number == signal.SIGTERM:
        return
    assert fxquant(*command, "--resume").returncode == 0
    assert (folder / "result.json").exists()


def test_compare_with_a_foreign_result(tmp_path):
    (tmp_path / "result.json").write_text("{}")
    done = fxquant("compare", tmp_path)
    assert done.returncode == 2
    assert "is no result of fxquant run" in done.stderr


def test_coverage_of_a_model_is_resumed(tmp_path):
    (tmp_path / "models.txt").write_text("test_resnet 64  # small\n\nno_such_model 64\n")
    arguments = ["coverage", "--models", tmp_path / "models.txt", "--output", tmp_path, "--bits", "4"]
    done = fxquant(*arguments)
    assert done.returncode == 0, done.stderr
    assert "test_resnet: ok; 16 layers, MACs on integers 100.0%" in done.stdout
    assert "1 of 2 models pass every stage" in done.stdout
    assert "no_such_model: create:" in done.stdout
    table = (tmp_path / "coverage_w4.csv").read_text()
    header, passed, failed = csv.reader(table.splitlines())
    spent = [i for i, name in enumerate(header) if name.endswith(("_seconds", "_mb"))]
    assert len(spent) == 11  # five stages and the highest peak
    assert all(float(passed[i]) > 0 and float(failed[i]) == 0 for i in spent)
    assert "test_resnet, 0.5 M parameters: prepare" in done.stdout
    again = fxquant(*arguments, "--resume")
    assert again.stdout == done.stdout
    assert (tmp_path / "coverage_w4.csv").read_text() == table
    again = fxquant(*arguments)
    assert (again.returncode, "Traceback" in again.stderr) == (2, False)
    assert "holds 2 rows; pass --resume to keep them" in again.stderr.replace("\n", " ")
    assert (tmp_path / "coverage_w4.csv").read_text() == table


def test_what_coverage_cannot_read_is_said(tmp_path):
    done = fxquant("coverage", "--models", tmp_path / "none.txt", "--output", tmp_path)
    assert (done.returncode, "Traceback" in done.stderr) == (2, False)
    assert "cannot be read (FileNotFoundError" in done.stderr
    (tmp_path / "models.txt").write_text("test_resnet 64\n")
    row.begin(tmp_path / "coverage_w4.csv")
    with (tmp_path / "coverage_w4.csv").open("a") as file:
        file.write("test_resnet,64\n")  # cut short
    done = fxquant("coverage", "--models", tmp_path / "models.txt", "--output", tmp_path, "--bits", "4", "--resume")
    assert (done.returncode, "Traceback" in done.stderr) == (2, False)
    assert "is no table of fxquant coverage" in done.stderr


@pytest.mark.parametrize("action", ["stop", "rollback"])
def test_a_divergence_is_not_answered_with_the_command_that_diverged(action, monkeypatch, tmp_path, capsys):
    from fxquant import cli
    from fxquant.errors import DivergenceError

    def diverge(*_, **__):
        raise DivergenceError("the loss is NaN")

    arguments = ["run", str(RECIPES / "digits_w4a4_nipq.toml"), "--output", str(tmp_path)]
    arguments += ["--set", "divergence.action=rollback"] * (action == "rollback")
    monkeypatch.setattr("fxquant.train.run", diverge)
    monkeypatch.setattr(sys, "argv", ["fxquant", *arguments])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert exit_.value.code == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "holds no checkpoint yet" in said
    assert ("--set divergence.action=rollback --resume" in said) is (action == "stop")
    assert ("Go on with" in said) is (action == "stop")


def test_failed_parity_is_its_own_exit_status(monkeypatch, digits_run, tmp_path):
    from fxquant import cli
    from fxquant.verify import LoweredParity

    outcome, _ = digits_run
    monkeypatch.setitem(outcome.report.lowered, "x86", LoweredParity(50.0, 20.0, 3, "fc_rescale", 40.0))
    monkeypatch.setattr("fxquant.train.run", lambda *_, **__: outcome)
    monkeypatch.setattr(sys, "argv", ["fxquant", "run", str(RECIPES / "digits_w4a4_nipq.toml"), "--output", "x"])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert exit_.value.code == 3
