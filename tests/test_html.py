"""The page of a run: well-formed, self-contained, and the same numbers as the text and the JSON."""

from __future__ import annotations

import itertools
import json
import math
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from typer.testing import CliRunner

from fxquant import html, svg
from fxquant.cli import app
from fxquant.dynamics import CapacityRecorder, read_dynamics
from fxquant.errors import CheckpointError
from fxquant.run_report import collect, listings, tables

NUMBERS = st.floats(0, 1e12, allow_nan=False)
NAMES = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), max_size=20)


def shapes(text: str, kind: str) -> list[ET.Element]:
    return list(ET.fromstring(text).iter(f"{{http://www.w3.org/2000/svg}}{kind}"))


@given(st.dictionaries(NAMES, st.tuples(NUMBERS, NUMBERS), max_size=12), st.booleans())
def test_charts_of_any_numbers_are_well_formed_and_finite(figures, logarithmic):
    rows = list(figures.items())
    for text in (
        svg.bars(rows, ("a", "b"), marked=dict.fromkeys(list(figures)[:2], "why"), logarithmic=logarithmic),
        svg.points(figures, across="<x>", up="&y"),
        svg.ring({name: a for name, (a, _) in rows}),
        svg.lines({name: [(0, a), (1, b)] for name, (a, b) in rows}, across="x", up="y", logarithmic=logarithmic),
    ):
        root = ET.fromstring(text)
        for element in root.iter():
            for key in ("x", "y", "cx", "cy", "width", "height"):
                assert math.isfinite(float(element.get(key, 0)))
        assert "nan" not in text.replace("nano", "") or any("nan" in name for name in figures)


def test_bars_are_as_long_as_their_values():
    text = svg.bars([("a", (1.0,)), ("b", (4.0,))], ("v",), marked={"b": "why"})
    first, second = shapes(text, "rect")
    assert float(second.get("width")) == pytest.approx(4 * float(first.get("width")), rel=1e-3)
    assert (first.get("class"), second.get("class")) == ("c0", "mark")
    assert [t.text for t in shapes(text, "title")] == ["a: v 1", "b: v 4 – why"]


@pytest.mark.parametrize("runs", [2, 5, 40])
def test_names_of_points_do_not_overlap(runs):
    text = svg.points({f"run{i}": (10.0, 84 + i / 100) for i in range(runs)}, across="x", up="y", marked="run0")
    heights = sorted(float(t.get("y")) for t in shapes(text, "text") if (t.text or "").startswith("run"))
    assert len(heights) == runs
    assert min(b - a for a, b in itertools.pairwise(heights)) > (12.9 if runs < 15 else 4.0)
    assert heights[0] > 0
    assert [c.get("class") for c in shapes(text, "circle")] == ["c0"] * (runs - 1) + ["mark"]


def test_names_from_both_sides_of_a_chart_do_not_meet():
    runs = {f"a_rather_long_name_of_a_run_{i}": (100.0 + 100 * (i % 2), 84 + i // 2) for i in range(8)}
    text = svg.points(runs, across="x", up="y")
    heights = sorted(float(t.get("y")) for t in shapes(text, "text") if t.text in runs)
    assert len(heights) == 8
    assert min(b - a for a, b in itertools.pairwise(heights)) > 12.9
    assert any(line.get("class") == "lead" for line in shapes(text, "line"))


@pytest.mark.parametrize(
    ("names", "shown"),
    [
        (("net_w2a2_lsq", "net_w2a2_ste", "net_w3a3_lsq"), ["w2a2_lsq", "w2a2_ste", "w3a3_lsq"]),
        (("net_w2a2",), ["net_w2a2"]),
        (("net_", "net_a"), ["net_", "net_a"]),
        (("mine", "yours"), ["mine", "yours"]),
    ],
)
def test_names_of_runs_leave_out_what_they_share(names, shown):
    named = dict.fromkeys(names, (1.0, 2.0))
    assert list(html._without_common_words(named)) == shown


def test_a_ring_has_shares_that_add_up():
    text = svg.ring({f"layer{i}": 10.0 - i for i in range(10)})
    rings = [c for c in shapes(text, "circle") if c.get("fill") == "none"]
    lengths = [float(c.get("stroke-dasharray").split()[0]) for c in rings]
    assert len(rings) == 8
    assert sum(lengths) == pytest.approx(2 * math.pi * 90, rel=1e-3)
    assert "3 others" in text


class Page(HTMLParser):
    """Checks that tags close in order; collects what would be fetched."""

    VOID = ("meta", "line", "br")

    def __init__(self, text: str):
        super().__init__()
        self.open, self.fetched, self.text = [], [], ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.fetched += [value for name, value in attrs if name in ("src", "href", "xlink:href", "data")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def run(digits_run):
    return digits_run[1]


def test_page_text_and_json_of_a_run_agree(run, tmp_path):
    page, file = tmp_path / "page.html", tmp_path / "page.json"
    arguments = ["report", str(run), str(run), "--output", str(page), "--json", str(file), "--text"]
    done = CliRunner().invoke(app, arguments, env={"COLUMNS": "220"})
    assert done.exit_code == 0, done.output
    data, read = json.loads(file.read_text()), Page(page.read_text())
    assert not read.fetched
    assert "http" not in page.read_text().replace("http://www.w3.org/2000/svg", "")
    assert "<script" not in page.read_text()
    assert len(data["runs"]) == 2
    epochs = json.loads((run / "result.json").read_text())["epochs"]["quantized"]
    assert [row[:3] for row in listings(data)["runs"].rows] == [(data["recipe"], "0", str(epochs))] * 2
    wide = Console(width=1000)  # no cell broken, however long the folder's name
    with wide.capture() as printed:
        wide.print(*tables(data))
    shown = " ".join(printed.get().split())
    for listing in listings(data).values():
        assert listing.rows
        for cell in {cell for row in listing.rows for cell in row}:
            assert cell in " ".join(read.text.split()), cell
            assert cell in shown, cell
    for text in (read.text, done.output):
        for value in data["accuracy"].values():
            assert f"{value:.2f}" in text
        assert all(row["layer"] in text for row in data["layers"])
        assert all(row["name"] in text for row in data["capacity"]["tensors"])
        assert all(tensor in text for tensor in data["capacity"]["cuts"][0]["tensors"])
        assert all(operator["name"] in text for operator in data["parity"]["x86"]["operators"])
        assert f"{data['weights_bytes']['ideal'] / 1024:,.1f}" in text or f"{data['weights_bytes']['ideal']:,}" in text
    shares = [row["bops"] for row in data["layers"] if row["bops"]]
    assert sum(shares) == pytest.approx(data["bops"], rel=1e-5)


def test_the_objective_is_drawn_part_by_part(run):
    data = collect(run, [])
    assert len(data["history"]) == 4
    page = html.page(data)
    assert "Objective while training" in page
    assert f"<title>task {svg._number(data['history'][-1]['task'])}</title>" in page
    assert all(f"{entry['total']:,.6g}" in page for entry in data["history"])
    data["history"][0]["estimator"] = 2.5  # off in the other epochs
    assert "<title>estimator 2.5</title>" in html.page(data)
    assert "Objective while training" not in html.page(data | {"history": data["history"][:1]})


def test_the_run_recorded_capacities_after_each_epoch(run):
    entries = read_dynamics(run)
    assert [entry["epoch"] for entry in entries] == [0, 1, 2, 3, 4]
    first, last = entries[0]["tensors"], entries[-1]["tensors"]
    assert first.keys() == last.keys()
    mean = [sum(t["bits"] for n, t in e["tensors"].items() if n.endswith(("weight", "input"))) for e in entries]
    assert mean[0] >= mean[-1]
    assert all(t["total"] > 0 for t in last.values())
    assert all(entry["bits"] == entry["cuts"][0]["bits"] for entry in entries)


def test_a_recorder_that_resumes_keeps_what_came_before(digits_run, tmp_path):
    model = digits_run[0].model
    batches = list(model.meta["fxquant"].calibration)[:1]
    first = CapacityRecorder(model, batches, tmp_path)
    for epoch in range(3):
        first(epoch)
    second = CapacityRecorder(model, batches, tmp_path, resumed=True)
    second(2)
    assert [entry["epoch"] for entry in read_dynamics(tmp_path)] == [0, 1, 2]
    assert read_dynamics(tmp_path / "none") == []


def test_tensorboard_gets_the_same_capacities(digits_run, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    model = digits_run[0].model
    recorder = CapacityRecorder(model, list(model.meta["fxquant"].calibration)[:1], tmp_path)
    recorder(0)
    recorder(1)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    for name, tensor in read_dynamics(tmp_path)[1]["tensors"].items():
        values = events.Scalars(f"capacity/{name}")
        assert [value.step for value in values] == [0, 1]
        assert values[1].value == pytest.approx(tensor["total"], rel=1e-5)
    assert events.Scalars("minimum cut/network")[0].value == pytest.approx(recorder.entries[0]["bits"], rel=1e-5)


def test_rollbacks_are_told(run, tmp_path):
    result = json.loads((run / "result.json").read_text())
    assert result["rollbacks"] == []
    result["rollbacks"] = [{"stage": "float", "epoch": 2, "step": 7, "cause": "first in '<fc>'", "lr_factor": 0.5}]
    (tmp_path / "result.json").write_text(json.dumps(result))
    data = collect(tmp_path, [])
    assert data["rollbacks"] == ["epoch 2 of float training, step 7: first in '<fc>'; learning rates times 0.5"]
    assert "Rolled back in epoch 2 of float training, step 7: first in &#x27;&lt;fc&gt;&#x27;;" in html.page(data)
    assert list(tables(data)[0].columns[1].cells).count(data["rollbacks"][0]) == 1


def test_files_that_cannot_be_reported_say_so(run, tmp_path):
    (tmp_path / "capacity.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"capacity.json cannot be read .* remove it"):
        read_dynamics(tmp_path)
    (tmp_path / "capacity.json").write_text('[{"epoch": 1, "bits": 1, "cuts": [], "tensors": {}}]')
    with pytest.raises(CheckpointError, match=r"capacity.json is no record of capacities; remove it"):
        read_dynamics(tmp_path)
    (tmp_path / "result.json").write_text('{"recipe": "x", "lowered": {}, "float_accuracy": 1}')
    with pytest.raises(CheckpointError, match="trained in float alone; there are no integers to report on"):
        collect(tmp_path, [])
    old = json.loads((run / "result.json").read_text())
    del old["capacity"]
    (tmp_path / "result.json").write_text(json.dumps(old))
    with pytest.raises(CheckpointError, match="was left by a version that wrote no capacity; run its recipe again"):
        collect(tmp_path, [])


def test_names_cannot_break_the_page(run):
    data = collect(run, [])
    data["recipe"] = data["runs"][0]["recipe"] = '</title><script>alert("x")</script>'
    text = html.page(data)
    Page(text)
    assert "<script" not in text
