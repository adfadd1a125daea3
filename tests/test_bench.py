"""fxquant bench: what it measures and in what order, its statistics, its rows for what is missing, its files."""

import importlib.util
import io
import json
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from fxquant import bench
from fxquant.bench import artefacts, command, peers, plot, processes, rounds, runners, table, worker
from fxquant.bench.job import FLOAT, FLOAT_ONNX, Job
from fxquant.bench.machine import machine, processor
from fxquant.bench.processes import WorkerError
from fxquant.bench.result import Entry, Result
from fxquant.cli import app
from fxquant.errors import FxQuantError, SpecError, UnknownNameError
from fxquant.spec import BACKENDS

JOB = Job("test_resnet", (3, 32, 32), "nowhere")


# ---- what is measured ------------------------------------------------------------------------------------


def test_every_backend_of_the_table_at_each_width_after_the_floats():
    names = [c.name for c in bench.contenders((8, 4))]
    assert names[:2] == ["eager fp32", "onnxruntime fp32"]
    assert names[2:] == [f"{backend} W{b}A{b}" for backend in BACKENDS for b in (8, 4)]


def test_peers_name_the_runtime_fed_by_us():
    peers_only = bench.contenders((8,), ["x86"], peers=True)[3:]
    assert {c.name: c.counterpart for c in peers_only} == {
        "torch.ao alone": "x86",
        "onnxruntime quantizer": "onnxruntime",
        "openvino fp32": "",
        "nncf": "openvino",
    }


def test_names_and_widths_that_do_not_exist():
    with pytest.raises(UnknownNameError, match="unknown backend 'onxruntime': did you mean 'onnxruntime'"):
        bench.contenders((8,), ["onxruntime"])
    with pytest.raises(SpecError, match="9"):
        bench.contenders((9,), ["x86"])
    with pytest.raises(UnknownNameError, match="unknown timm model 'test_resnt'"):
        bench.of_model("test_resnt", None, Path("nowhere"))


def test_a_transformer_is_built_at_the_size_asked_for():
    job = bench.of_model("test_vit", 96, Path("nowhere"))
    assert job.input_shape == (3, 96, 96)
    assert job.blank_model()(torch.randn(1, 3, 96, 96)).shape[0] == 1


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"batches": (0,)}, "at least 1"),
        ({"batches": (1, 1)}, "different sizes"),
        ({"rounds": 0}, "rounds=0 was asked for"),
        ({"threads": 2}, "--wall"),
        ({"burst": 0}, "burst=0 was asked for"),
    ],
)
def test_what_cannot_be_measured(settings, words):
    with pytest.raises(SpecError, match=words):
        bench.Settings(**settings)


def test_lists_of_numbers():
    assert command.numbers("1, 16", "--batch") == (1, 16)
    with pytest.raises(SpecError, match="--batch one was asked for; give whole numbers with commas"):
        command.numbers("one", "--batch")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "a finished run, or --model NAME"),
        (["somewhere", "--model", "test_resnet"], "not both"),
        (["somewhere", "--bits", "4"], "leave out --bits"),
        (["somewhere"], "does not exist"),
        (["--model", "test_resnet", "--backends", "cuda"], "unknown backend 'cuda'"),
        (["--model", "test_resnet", "--threads", "2"], "adds up over threads"),
        (["--model", "test_resnet", "--image-size", "0"], "at least 1"),
    ],
)
@pytest.mark.parametrize("named", [[], ["latency"]])
def test_arguments_that_make_no_sense(named, arguments, words):
    done = CliRunner().invoke(app, ["bench", *named, *arguments])
    assert isinstance(done.exception, FxQuantError)
    assert words in str(done.exception)


# ---- in what order ---------------------------------------------------------------------------------------


def test_order_has_everything_once_a_round_and_follows_the_seed():
    turns = bench.order("abcdefgh", 12, seed=3)
    assert all(sorted(turn) == list("abcdefgh") for turn in turns)
    assert len({tuple(turn) for turn in turns}) > 6
    assert turns == bench.order("abcdefgh", 12, seed=3) != bench.order("abcdefgh", 12, seed=4)


class FakeWorker:
    """Notes what it is asked; takes as many milliseconds as its name has letters, times the batch."""

    log: list = []  # noqa: RUF012 - one for all workers

    def __init__(self, job, contender):
        if contender.name == "broken":
            raise WorkerError("RuntimeError: no kernel")
        self.name, self.size, self.note = contender.name, 1000, ""

    def warm(self, batch):
        return 2.0 * batch, "channels_last" if batch == 1 else ""

    def burst(self, batch, calls):
        self.log.append((self.name, batch, calls))
        if self.name == "dies" and len(self.log) > 20:
            raise WorkerError("its process ended with status -11: no message")
        return float(len(self.name) * batch)

    def close(self):
        self.log.append(("close", self.name))


class FakeBuilder:
    def __init__(self, job, made):
        self.made = made

    def require(self, name):
        if name == "impossible":
            raise WorkerError("FxQuantError: torch cannot export this")

    def close(self):
        pass


@pytest.fixture
def fakes(monkeypatch):
    monkeypatch.setattr(rounds, "Worker", FakeWorker)
    monkeypatch.setattr(rounds, "Builder", FakeBuilder)
    monkeypatch.setattr(FakeWorker, "log", [])
    return FakeWorker.log


def test_rounds_are_interleaved_and_bursts_alike_in_length(fakes):
    chosen = [bench.Contender(name, "eager") for name in ("a", "bb", "ccc")]
    entries = bench.measure(JOB, chosen, bench.Settings((1, 4), rounds=5, burst=80.0))
    bursts = [line for line in fakes if line[0] != "close"]
    turns = [bursts[i : i + 6] for i in range(0, 30, 6)]
    every = {(name, batch) for name in ("a", "bb", "ccc") for batch in (1, 4)}
    assert all({line[:2] for line in turn} == every for turn in turns)
    assert len({tuple(turn) for turn in turns}) > 1
    assert {(batch, calls) for _, batch, calls in bursts} == {(1, 40), (4, 10)}
    assert [entry.rounds for entry in entries] == [{1: [n] * 5, 4: [4 * n] * 5} for n in (1.0, 2.0, 3.0)]
    assert entries[0].batch_notes == {1: "channels_last"}
    assert sorted(line for line in fakes if line[0] == "close") == [("close", n) for n in ("a", "bb", "ccc")]


def test_what_is_missing_or_fails_is_a_row_with_its_reason(fakes):
    chosen = [
        bench.Contender("a", "eager"),
        bench.Contender("missing", "onnx", packages=("no_such_runtime",)),
        bench.Contender("no file", "onnx", needs=("float", "impossible")),
        bench.Contender("broken", "eager"),
        bench.Contender("dies", "eager"),
    ]
    entries = {e.name: e for e in bench.measure(JOB, chosen, bench.Settings((1,), rounds=15))}
    assert entries["missing"].state == "absent"
    assert entries["missing"].failed == "no_such_runtime not installed: pip install no_such_runtime"
    assert (entries["no file"].state, entries["broken"].state, entries["dies"].state) == ("failed",) * 3
    assert entries["broken"].failed == "RuntimeError: no kernel"
    assert entries["dies"].spread(1) is None
    assert len(entries["a"].rounds[1]) == 15
    lines = "\n".join(table.remarks(result_of(list(entries.values()))))
    assert "missing: absent, no_such_runtime not installed" in lines
    assert "no file: failed, FxQuantError: torch cannot export this" in lines


def test_an_engine_that_torch_lacks_is_absent(monkeypatch):
    monkeypatch.setattr("fxquant.bench.contender.require_backend", lacks)
    (row,) = (c for c in bench.contenders((8,), ["qnnpack"]) if c.backend)
    assert "this build of torch" in row.absence()


def lacks(backend):
    raise SpecError(f"backend {backend!r} was asked for; this build of torch has the engines none")


# ---- what it comes to ------------------------------------------------------------------------------------


def result_of(entries, **changes) -> Result:
    settings = {"batches": (1,), "rounds": 4, "threads": 1, "wall": False, "seed": 0, "burst": 200.0}
    return Result("test_resnet", (3, 32, 32), settings, {"cpu": "some"}, entries, **changes)


@pytest.fixture
def result():
    return result_of(
        [
            Entry("eager fp32", size=2**20, rounds={1: [8.0, 8.0, 9.0, 8.0]}),
            Entry("onnxruntime fp32", size=2**20, rounds={1: [4.0, 4.0, 5.0, 4.0]}),
            Entry("x86 W8A8", "x86", size=2**18, rounds={1: [2.0, 2.0, 1.0, 2.0]}),
            Entry("onnxruntime W8A8", "onnxruntime", size=2**18, rounds={1: [2.0] * 4}),
            Entry("torch.ao alone", "", "x86", 2**18, {1: [1.6] * 4}),
            Entry("onnxruntime quantizer", "", "onnxruntime", 2**18, {1: [1.95] * 4}),
            Entry("nncf", "", "openvino", failed="nncf not installed: pip install nncf", absent=True),
        ]
    )


def test_median_and_quartiles_of_known_numbers():
    assert bench.spread([4.0, 1.0, 2.0, 3.0, 5.0]) == bench.Spread(3.0, 2.0, 4.0)
    assert bench.spread([7.0]) == bench.Spread(7.0, 7.0, 7.0)
    assert bench.spread([1.0, 2.0]) == bench.Spread(1.5, 1.25, 1.75)


def test_ratios_are_of_medians_and_above_one_is_faster(result):
    values = json.loads(json.dumps(result.to_json()))
    rows = {row["name"]: row for row in values["contenders"]}
    ours = rows["x86 W8A8"]["batches"]["1"]
    assert (ours["median_ms"], ours["speed_vs_onnxruntime_fp32"], ours["speed_vs_eager_fp32"]) == (2.0, 2.0, 4.0)
    assert rows["nncf"]["state"] == "absent"
    assert rows["nncf"]["batches"] == {}
    assert values["clock"] == "CPU time, 1 thread"
    assert "random" in values["weights"]


def test_a_peer_more_than_five_per_cent_faster_is_named(result):
    faster = {row["peer"]: row for row in result.peers()}
    assert faster["torch.ao alone"]["speed_vs_ours"] == pytest.approx(1.25)
    assert faster["torch.ao alone"]["faster_than_ours"]
    assert not faster["onnxruntime quantizer"]["faster_than_ours"]
    assert "nncf" not in faster
    lines = "\n".join(table.remarks(result))
    assert "torch.ao alone runs at 1.25 times the speed of x86 W8A8, batch 1: MORE than 5% faster" in lines


def test_table_files_and_a_plot_only_where_it_can_be_drawn(result, tmp_path, monkeypatch):
    (one,) = table.tables(result)
    assert "test_resnet, batch 1 of 3x32x32, CPU time, 1 thread" in one.title
    assert list(one.columns[0].cells) == [e.name for e in result.entries[:-1]]
    monkeypatch.setattr(command, "can_draw", lambda: False)
    (line,) = command.write(result, tmp_path)
    assert line.endswith("pip install 'fxquant[bench]'")
    assert [p.name for p in tmp_path.iterdir()] == ["bench.json"]
    if importlib.util.find_spec("matplotlib") is None:
        pytest.skip("matplotlib is not installed")
    plot.draw(result, tmp_path / "bench.png")
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_the_machine_is_told():
    text = "processor\t: 0\nmodel name\t: Some CPU\nflags\t\t: fpu avx2 avx512_vnni\n\nprocessor\t: 1\n"
    assert processor(text)["cpu"] == "Some CPU"
    assert processor(text)["flags"]["avx512_vnni"]
    assert not processor(text)["flags"]["amx_int8"]
    assert processor("")["flags"] == {}
    assert machine()["versions"]["torch"] == torch.__version__


# ---- a worker --------------------------------------------------------------------------------------------


def requests(*values) -> io.StringIO:
    return io.StringIO("".join(json.dumps(value) + "\n" for value in values))


def test_a_worker_answers_and_tells_cpu_time_from_wall_time(monkeypatch):
    opened = runners.Opened(lambda images: (lambda: time.sleep(0.01), f"{len(images)} images"), 123)
    monkeypatch.setattr(worker, "open_contender", lambda contender, job: opened)
    monkeypatch.setattr(Job, "batch", lambda job, size: torch.zeros(size, 1))
    contender = {"name": "a", "kind": "eager", "needs": ["float"]}
    for wall in (False, True):
        answers = io.StringIO()
        job = {"model": "m", "input_shape": [3, 32, 32], "folder": "f", "wall": wall}
        asked = requests({"job": job, "contender": contender}, {"warm": 3}, {"burst": 3, "calls": 2}, {"burst": 5})
        worker.serve(asked, answers)
        opening, warm, burst, wrong = map(json.loads, answers.getvalue().splitlines())
        assert opening == {"size": 123, "note": ""}
        assert warm["note"] == "3 images"
        assert (burst["milliseconds"] >= 10) == wall
        assert wrong["failed"].startswith("KeyError")


def test_a_worker_without_a_package_says_that_it_is_absent(monkeypatch):
    monkeypatch.setattr(worker, "open_contender", lambda contender, job: importlib.import_module("no_such_runtime"))
    answers = io.StringIO()
    job = {"model": "m", "input_shape": [3, 32, 32], "folder": "f"}
    worker.serve(requests({"job": job, "contender": {"name": "a", "kind": "eager"}}), answers)
    assert "no_such_runtime" in json.loads(answers.getvalue())["absent"]


def test_a_process_sleeps_when_idle_and_its_death_is_a_reason():
    process = processes.Process(threads=1)
    try:
        with pytest.raises(WorkerError, match="KeyError"):
            process.ask({"no": "job"}, 60)
        stat = Path(f"/proc/{process.process.pid}/stat")
        if stat.exists():

            def ticks() -> int:  # user and system time, in clock ticks of 10 ms
                return sum(map(int, stat.read_text().split()[13:15]))

            before = ticks()
            time.sleep(0.5)
            assert ticks() - before < 10  # a process that polls for requests would use up to 50
        process.process.kill()
        process.process.wait()
        with pytest.raises(WorkerError, match="ended with status -9"):
            process.ask({"no": "job"}, 60)
    finally:
        process.close()


# ---- the contenders themselves ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    job = bench.of_model("test_resnet", 32, tmp_path_factory.mktemp("bench"))
    profiles = (artefacts.reference_file(4, name) for name in ("x86", "onnxruntime"))
    for name in (FLOAT, FLOAT_ONNX, *profiles):
        artefacts.build(name, job)
    return job


@pytest.fixture
def engine():
    before = torch.backends.quantized.engine
    yield
    torch.backends.quantized.engine = before


def opened(job, name):
    contender = next(c for c in bench.contenders((4,), peers=True) if c.name == name)
    if reason := contender.absence():
        pytest.skip(reason)
    return runners.open_contender(contender, job)


@torch.no_grad()
def outcome(form, job):
    out = form.bind(job.batch(5))[0]()
    return out if isinstance(out, torch.Tensor) else torch.from_numpy(next(iter(out.values())))


@pytest.mark.parametrize("name", ["onnxruntime fp32", "openvino fp32"])
def test_float_contenders_compute_the_same(job, name):
    torch.testing.assert_close(
        outcome(opened(job, name), job), outcome(opened(job, "eager fp32"), job), atol=1e-3, rtol=0
    )


@pytest.mark.usefixtures("engine")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["x86 W4A4", "onnxruntime W4A4", "torch.ao alone", "onnxruntime quantizer"])
def test_quantized_contenders_run_and_are_smaller(job, name):
    if name == "onnxruntime quantizer" and opened(job, "onnxruntime fp32"):
        artefacts.build(peers.ORT_QUANTIZED, job)
    form = opened(job, name)
    assert outcome(form, job).shape == (5, 1000)
    assert 10_000 < form.size < job.file(FLOAT).stat().st_size / 2


@pytest.mark.usefixtures("engine")
def test_a_finished_run_brings_its_own_integers(digits_run, tmp_path):
    job, name = bench.of_run(digits_run[1], tmp_path)
    assert (job.model, job.input_shape, name) == ("test_resnet", (1, 16, 16), "digits_w4a4_nipq")
    artefacts.build(FLOAT, job)
    chosen = {c.name: c for c in bench.contenders((), ["x86"], run=name)}
    assert list(chosen) == ["eager fp32", "onnxruntime fp32", "x86 digits_w4a4_nipq"]
    form = runners.open_contender(chosen["x86 digits_w4a4_nipq"], job)
    assert torch.equal(outcome(form, job), digits_run[0].lowered["x86"](job.batch(5)))


def test_shared_files_are_made_in_a_process_and_not_tried_twice(tmp_path):
    builder = processes.Builder(bench.of_model("test_resnet", 32, tmp_path))
    try:
        builder.require(FLOAT)
        assert (tmp_path / FLOAT).exists()
        reasons = []
        for _ in range(2):
            with pytest.raises(WorkerError, match="unknown backend 'nowhere'") as raised:
                builder.require("w4.nowhere.fxq")
            reasons.append(raised.value)
        assert reasons[0] is reasons[1]
    finally:
        builder.close()


def test_processes_measure_real_models(job):
    chosen = [c for c in bench.contenders((4,), ["x86"]) if c.kind != "eager"]
    settings = bench.Settings((1, 2), rounds=2, burst=5.0)
    entries = bench.measure(job, chosen, settings, built={name for c in chosen for name in c.needs})
    assert [(e.name, e.state) for e in entries] == [("onnxruntime fp32", "measured"), ("x86 W4A4", "measured")]
    assert all(len(entry.rounds[batch]) == 2 and min(entry.rounds[batch]) > 0 for entry in entries for batch in (1, 2))
    assert entries[0].size == job.file(FLOAT_ONNX).stat().st_size
    assert entries[1].size == job.file(artefacts.reference_file(4, "x86")).stat().st_size


def test_the_command_prints_tables_and_leaves_its_files(fakes, tmp_path):
    arguments = "bench --model test_resnet --image-size 32 --bits 4 --batch 1,2 --backends x86 --rounds 2 --output"
    done = CliRunner().invoke(app, [*arguments.split(), str(tmp_path)], env={"COLUMNS": "160"})
    assert done.exit_code == 0, done.exception
    assert "test_resnet, batch 2 of 3x32x32, CPU time, 1 thread" in done.stdout
    assert "x86 W4A4" in done.stdout
    values = json.loads((tmp_path / "bench.json").read_text())
    assert [row["name"] for row in values["contenders"]] == ["eager fp32", "onnxruntime fp32", "x86 W4A4"]
    assert Counter(row["state"] for row in values["contenders"]) == {"measured": 3}
    assert values["contenders"][2]["batches"]["2"]["rounds_ms"] == [16.0, 16.0]
    assert values["settings"] == {
        "batches": [1, 2], "rounds": 2, "threads": 1, "wall": False, "seed": 0, "burst": 200.0,
    }  # fmt: skip
