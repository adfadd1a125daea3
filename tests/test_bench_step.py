"""fxquant bench step: what takes part, its rows and ratios, the order of bursts, and real steps of a small model."""

from __future__ import annotations

import dataclasses
import io
import json
import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from typer.testing import CliRunner

from fxquant import meter
from fxquant.bench import step
from fxquant.bench.processes import WorkerError
from fxquant.bench.step import rounds, steps, worker
from fxquant.bench.worker import answer_all
from fxquant.cli import app
from fxquant.errors import FxQuantError, SpecError, UnknownNameError

JOB = step.StepJob("test_resnet", image_size=32, batch=4)


# ---- what is measured ------------------------------------------------------------------------------------


def test_rows():
    assert step.contenders(["nipq", "lsq", "nipq"], peers=False) == ["float", "nipq", "lsq"]
    assert step.contenders()[:3] == ["float", "torch.ao fused", "torch.ao learnable"]


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"bits": 9}, SpecError, "9"),
        ({"batch": 1}, SpecError, "batch=1 was asked for; it must be at least 2"),
        ({"threads": 0}, SpecError, "threads=0"),
        ({"autocast": "fp8"}, UnknownNameError, "unknown autocast dtype 'fp8'"),
        ({"device": "tpu"}, SpecError, "device='tpu' was asked for"),
    ],
)
def test_jobs_that_cannot_be_measured(changes, error, words):
    with pytest.raises(error, match=words):
        step.StepJob("test_resnet", **changes)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "test_resnt"], "did you mean 'test_resnet'"),
        (["--model", "test_resnet", "--estimators", "lsq,pgee"], "did you mean 'pege'"),
        (["--model", "test_resnet", "--rounds", "0"], "rounds=0 was asked for"),
    ],
)
def test_commands_that_make_no_sense(arguments, words):
    done = CliRunner().invoke(app, ["bench", "step", *arguments])
    assert isinstance(done.exception, FxQuantError)
    assert words in str(done.exception)


# ---- order and result ------------------------------------------------------------------------------------


class FakeProcess:
    """A step takes 100 milliseconds, and 25 more a letter beyond the five of float; a burst notes who was asked."""

    log: list = []  # noqa: RUF012 - one for all

    def __init__(self, threads, module):
        assert module == "fxquant.bench.step"

    def ask(self, request, seconds):
        if "contender" in request:
            self.name = request["contender"]
            if self.name == "ste":
                raise WorkerError("SpecError: cannot be opened")
            return {"milliseconds": self._milliseconds()}
        if "peak" in request:
            return {"bytes": 2**20 * len(self.name)}
        self.log.append((self.name, request["burst"]))
        if self.name == "nipq" and len(self.log) > 6:
            raise WorkerError("NonFiniteError: the loss became nan")
        return {"milliseconds": self._milliseconds()}

    def _milliseconds(self):
        return 100 + 25 * (len(self.name) - 5)

    def close(self):
        pass


@pytest.fixture
def fakes(monkeypatch):
    monkeypatch.setattr(rounds, "Process", FakeProcess)
    monkeypatch.setattr(FakeProcess, "log", [])
    return FakeProcess.log


def test_bursts_are_interleaved_and_ratios_are_to_float(fakes):
    names = ["float", "torch.ao fused", "ste", "lsq"]
    result = step.measure(JOB, names, step.StepSettings(rounds=4, burst=450.0))
    assert [sorted(name for name, _ in fakes[i : i + 3]) for i in (0, 3, 6, 9)] == [
        ["float", "lsq", "torch.ao fused"]
    ] * 4
    assert dict(fakes) == {"float": 4, "lsq": 9, "torch.ao fused": 1}  # steps that fill 450 milliseconds
    by_name = {row["name"]: row for row in result.to_json()["contenders"]}
    assert by_name["lsq"]["median_vs_float"] == 0.5
    assert by_name["lsq"]["peak_vs_float"] == pytest.approx(3 / 5)
    assert by_name["torch.ao fused"]["lower_vs_float"] == 3.25
    assert by_name["ste"] == {"name": "ste", "failed": "SpecError: cannot be opened"}
    assert result.remarks() == ["ste: SpecError: cannot be opened"]
    json.dumps(result.to_json(), allow_nan=False)
    assert result.table().row_count == 3


def test_who_fails_on_the_way_has_a_reason_and_no_figures(fakes):
    result = step.measure(JOB, ["float", "nipq"], step.StepSettings(rounds=9))
    float_row, failed = result.to_json()["contenders"]
    assert len(float_row["rounds_ms"]) == 9
    assert failed == {"name": "nipq", "failed": "NonFiniteError: the loss became nan"}


def test_ratios_pair_bursts_of_one_round():
    """The machine was twice as slow in the second round: for both."""
    entries = [step.StepEntry("float", [100.0, 200.0]), step.StepEntry("lsq", [120.0, 240.0])]
    result = step.StepResult(JOB, step.StepSettings(), {}, entries)
    ratio = result.ratio(entries[1])
    assert (ratio.lower, ratio.median, ratio.upper) == pytest.approx((1.2, 1.2, 1.2))
    assert result.clock == "CPU time, 1 thread"
    assert "test_resnet, batch 4 of 32x32, W4A4" in result.title


def test_the_command_prints_a_table_and_leaves_a_file(fakes, tmp_path):
    options = ["--model", "test_resnet", "--rounds", "2", "--estimators", "lsq,pege", "--output", str(tmp_path)]
    done = CliRunner().invoke(app, ["bench", "step", *options])
    assert done.exit_code == 0, done.exception
    assert "torch.ao fused" in done.stdout
    written = json.loads((tmp_path / "step.json").read_text(encoding="utf-8"))
    assert [row["name"] for row in written["contenders"]][-2:] == ["lsq", "pege"]
    assert written["machine"]["versions"]["torch"] == torch.__version__


# ---- real steps ------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Please use quant_min and quant_max")  # of torch.ao's own observers
@pytest.mark.parametrize("name", step.contenders(["lsq", "pege", "gdnsq", "nipq", "ste"]))
def test_every_contender_takes_steps_that_train(name):
    """The loss is finite, weights move, and the objective is the one of the estimator in the midst of its schedule."""
    taken = steps.build(name, JOB)
    before = float(taken())
    for _ in range(40):
        after = float(taken())
    assert math.isfinite(after)
    assert after < before or name in ("nipq", "pege", "gdnsq")  # noise, curriculum and penalty move the loss as well
    assert after != before


def test_all_start_from_the_same_model_and_batch():
    assert float(steps.build("float", JOB)()) == float(steps.build("float", JOB)())


def test_autocast_computes_in_less_precision():
    half = dataclasses.replace(JOB, autocast="bf16")
    plain, cast = (float(steps.build("float", job)()) for job in (JOB, half))
    assert plain != cast
    assert plain == pytest.approx(cast, rel=0.1)


@pytest.mark.filterwarnings("ignore:Please use quant_min and quant_max")  # of torch.ao's own observers
@pytest.mark.parametrize("name", ["float", "torch.ao fused", "lsq"])
@pytest.mark.parametrize("channels_last", [True, False])
def test_channels_are_last_where_that_is_asked(name, channels_last, monkeypatch):
    """Of what enters a convolution and of its weight, for all contenders alike; the loss is the same, but of torch.ao's
    one tensor's codes that a last digit changes move it by a thousandth."""
    seen, conv2d = [], F.conv2d

    def watching(x, weight, *arguments):
        wide = [tensor for tensor in (x, weight) if tensor.shape[1] > 1 and tensor.shape[2] > 1]
        seen.extend(tensor.is_contiguous(memory_format=torch.channels_last) for tensor in wide)
        return conv2d(x, weight, *arguments)

    taken = steps.build(name, dataclasses.replace(JOB, channels_last=channels_last))
    monkeypatch.setattr(F, "conv2d", watching)
    loss = float(taken())
    assert seen
    assert all(each == channels_last for each in seen)
    if name != step.job.FUSED:
        assert loss == pytest.approx(float(steps.build(name, JOB)()), rel=1e-3)


def test_a_worker_opens_measures_and_tells_its_peak():
    asked = [
        {"job": vars(JOB), "contender": "lsq"},
        {"burst": 2},
        {"peak": True},
    ]
    answers = io.StringIO()
    answer_all(io.StringIO("".join(json.dumps(line) + "\n" for line in asked)), answers, worker.StepWorker())
    opened, burst, peak = map(json.loads, answers.getvalue().splitlines())
    assert opened["milliseconds"] > 0
    assert burst["milliseconds"] > 0
    assert peak["bytes"] >= 0


def test_a_loss_that_is_not_finite_ends_the_measurement(monkeypatch):
    serving = worker.StepWorker()
    monkeypatch.setattr(worker, "build", lambda name, job: lambda: torch.tensor(float("nan")))
    with pytest.raises(FxQuantError, match="the loss became nan"):
        serving({"job": vars(JOB), "contender": "lsq"})


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_peak_memory_is_of_what_ran_since_the_reset():
    counted = meter.CpuMeter(threads=1)
    torch.ones(64 * 2**20)  # 256 MiB, freed again
    assert counted.peak() > 250 * 2**20
    counted.reset_peak()
    assert counted.peak() < 100 * 2**20
    torch.ones(32 * 2**20)
    assert 120 * 2**20 < counted.peak() < 250 * 2**20
