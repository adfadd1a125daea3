"""One page on a run, in one file: no script, no font and no picture is fetched from anywhere."""

from __future__ import annotations

from html import escape
from typing import Any

from . import svg
from .loss import LossParts
from .run_report import Listing, cut_of, listings

_STYLE = """
:root { --ink: #1c2430; --soft: #667085; --line: #e3e7ee; --paper: #fff; --ground: #f5f7fa; --mark: #d9480f; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 20px 16px 48px; }
h1 { font-size: 1.5rem; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.05rem; margin: 0 0 4px; }
p { margin: 2px 0 8px; color: var(--soft); }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(140px, 1fr)); gap: 10px; margin: 16px 0; }
.card, section { background: var(--paper); border: 1px solid var(--line); border-radius: 8px; padding: 12px 14px; }
.card b { display: block; font-size: 1.3rem; }
.card span { color: var(--soft); font-size: .85rem; }
.columns { columns: 2 460px; column-gap: 12px; }
.columns section { break-inside: avoid; margin: 0 0 12px; }
section { margin-top: 12px; min-width: 0; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 3px 8px; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
td.long, th.long { text-align: left; white-space: normal; overflow-wrap: anywhere; min-width: 16em; }
tr.mark td { color: var(--mark); font-weight: 600; }
.bad { color: #c92a2a; }
svg { width: 100%; max-width: 620px; height: auto; display: block; }
svg .t { font: 12px system-ui, sans-serif; fill: var(--ink); }
svg .s { font-size: 11px; fill: var(--soft); }
svg .t.mark { fill: var(--mark); font-weight: 600; }
svg .mark { fill: var(--mark); }
svg .grid { stroke: var(--line); }
svg .lead { stroke: var(--soft); stroke-width: .7; }
svg polyline { fill: none; stroke-width: 2.2; }
svg polyline.thin { stroke: #c3cad5; stroke-width: 1; }
"""
_COLOURS = ("#2f6fde", "#12a594", "#8e4ec6", "#f2a20c", "#5b6b7f", "#d6409f", "#3d9a50", "#b08968")
_CLASSES = "\n".join(
    f"svg .c{i} {{ fill: {c}; }} svg polyline.l{i}, svg .s{i} {{ stroke: {c}; }}" for i, c in enumerate(_COLOURS)
)


def page(data: dict[str, Any]) -> str:
    """The numbers of :func:`fxquant.run_report.collect` as a page of HTML."""
    listed = listings(data)
    title = escape(f"{data['recipe']}, seed {data['seed']}")
    body = "".join(
        (
            _head(data),
            '<div class="columns">',
            _section("Accuracy", f"Per cent of {data['images']:,} held-out images.", _accuracy(data)),
            _section("Cost", "Share of bit operations, layer by layer.", _cost(data)),
            _section("Bits per layer", "Weights, and the tensor that enters.", _widths(data)),
            _dynamics(data["dynamics"]),
            _objective(data["history"]),
            _section("Capacity along the network", _cut_words(data["capacity"]), _capacity(data)),
            "</div>",
            _section(
                "Accuracy against bit operations",
                "Converted models; this run is marked.",
                _runs(data) + _table(listed["runs"]),
            ),
            _section("Layers", "Those in a cut are marked.", _table(listed["layers"])),
            _section("Capacity of each tensor", "Those in a cut are marked.", _table(listed["capacity"])),
            _section(listed["dynamics"].title, "After each epoch.", _table(listed["dynamics"])),
            _section(listed["history"].title, "Mean of each epoch's steps.", _table(listed["history"])),
            _section(
                "Parity", "Each kernel against the converted model, on its check batch.", _table(listed["parity"])
            ),
            _section("In figures", "", _table(listed["summary"])),
        )
    )
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{_STYLE}{_CLASSES}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _head(data: dict[str, Any]) -> str:
    float_bytes, packed = data["weights_bytes"]["float"], data["weights_bytes"]["ideal"]
    network = data["capacity"]["bits"]
    cards = [
        (f"{data['accuracy']['converted']:.2f} %", f"converted; float {data['accuracy']['float']:.2f} %"),
        (f"{data['mean_weight_bits']:.2f} / {data['mean_activation_bits']:.2f}", "mean bits, weights / activations"),
        (f"{data['bops'] / 1e6:,.1f} M", "bit operations per image"),
        (f"{packed / 1024:,.1f} KiB", f"packed; float {float_bytes / 1024:,.1f} KiB"),
        ("unlimited" if network is None else f"{network:,.0f}", "bits per image through the minimum cut"),
        ("yes" if data["exact"] else "NO", "converted equals trained, bit for bit"),
    ]
    shown = "".join(
        f'<div class="card"><b>{escape(value)}</b><span>{escape(what)}</span></div>' for value, what in cards
    )
    about = f"{data['model']}, {data['estimator']}, seed {data['seed']}, {data['seconds']:,.0f} s"
    rollbacks = "".join(f"<p>Rolled back in {escape(rollback)}</p>" for rollback in data["rollbacks"])
    return f'<h1>{escape(data["recipe"])}</h1><p>{escape(about)}</p>{rollbacks}<div class="cards">{shown}</div>'


def _section(title: str, words: str, content: str) -> str:
    note = f"<p>{escape(words)}</p>" if words else ""
    return f"<section><h2>{escape(title)}</h2>{note}{content}</section>"


def _accuracy(data: dict[str, Any]) -> str:
    return svg.bars([(name, (value,)) for name, value in data["accuracy"].items()], ("accuracy",), unit=" %")


def _cost(data: dict[str, Any]) -> str:
    return svg.ring({row["layer"]: row["bops"] for row in data["layers"] if row["bops"]}, " bit operations")


def _widths(data: dict[str, Any]) -> str:
    rows = [(r["layer"], (r["weight_bits"], r["activation_bits"])) for r in data["layers"] if r["bops"] is not None]
    return svg.bars(rows, ("weights", "activations"))


def _cut_words(capacity: dict[str, Any]) -> str:
    cut, between = capacity["cuts"][0], capacity["layer_cut"]
    words = f"Bits per image, logarithmic. Minimum cut: {', '.join(cut['tensors']) or 'none'}"
    return f"{words}; smallest between 8-bit layers: {', '.join(between['tensors']) or 'none'}."


def _capacity(data: dict[str, Any]) -> str:
    rows = [(row["name"], (row["total"],)) for row in data["capacity"]["tensors"]]
    return svg.bars(rows, ("capacity",), marked=cut_of(data["capacity"]), logarithmic=True)


def _dynamics(entries: list[dict[str, Any]]) -> str:
    if len(entries) < 2:
        return ""
    cuts = {
        "minimum cut": [(e["epoch"], e["bits"]) for e in entries if e["bits"] is not None],
        "cut between 8-bit layers": [
            (e["epoch"], e["layer_cut"]["bits"]) for e in entries if e["layer_cut"]["bits"] is not None
        ],
    }
    tensors = {
        name: [(e["epoch"], e["tensors"][name]["total"]) for e in entries if name in e["tensors"]]
        for name in entries[-1]["tensors"]
    }
    widths: dict[str, list[tuple[float, float]]] = {
        name: [(e["epoch"], e["tensors"][name]["bits"]) for e in entries if name in e["tensors"]]
        for name in entries[-1]["tensors"]
        if name.endswith((".weight", ".input"))
    }
    mean = [(e["epoch"], sum(e["tensors"][n]["bits"] for n in widths) / len(widths)) for e in entries]
    shown = {name: points for name, points in cuts.items() if points}
    return _section(
        "Capacity while training",
        "Bits per image, logarithmic: each tensor, and the cuts.",
        svg.lines(tensors | shown, across="epoch", up="bits per image", bold=tuple(shown), logarithmic=True),
    ) + _section(
        "Widths while training",
        "Bits of each layer's weights and input, and their mean.",
        svg.lines(widths | {"mean": mean}, across="epoch", up="bits", bold=("mean",)),
    )


def _objective(epochs: list[dict[str, float]]) -> str:
    if len(epochs) < 2:
        return ""
    parts = {
        name: [(entry["epoch"], entry[name]) for entry in epochs if entry.get(name, 0) > 0]
        for name in ("total", *(part for part in LossParts._fields if part != "total"))
    }
    shown = {name: points for name, points in parts.items() if points}
    return _section(
        "Objective while training",
        "Mean of each epoch's steps, logarithmic; parts as they are before they are weighted.",
        svg.lines(shown, across="epoch", up="objective", bold=tuple(shown), logarithmic=True),
    )


def _runs(data: dict[str, Any]) -> str:
    named: dict[str, tuple[float, float]] = {}
    for run in data["runs"]:
        name = run["recipe"] if run["recipe"] not in named else f"{run['recipe']}, seed {run['seed']}, {run['run']}"
        named[name] = (run["bops"] / 1e6, run["reference_accuracy"])
    named = _without_common_words(named)
    this = next(iter(named))
    return svg.points(named, across="bit operations per image, millions", up="accuracy, %", marked=this)


def _without_common_words(named: dict[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
    """Names without the words, up to an underscore, that all of several begin with."""
    while len({name.partition("_")[0] for name in named}) == 1 < len(named):
        rest = {name.partition("_")[2]: place for name, place in named.items()}
        if "" in rest:
            break
        named = rest
    return named


def _table(listing: Listing) -> str:
    kinds = [" class=long" if heading in listing.long else "" for heading in listing.headings]
    head = "".join(f"<th{kind}>{escape(heading)}</th>" for kind, heading in zip(kinds, listing.headings, strict=True))
    body = "".join(
        f"<tr{' class=mark' if row[0] in listing.marked else ''}>"
        f"{''.join(f'<td{kind}>{escape(cell)}</td>' for kind, cell in zip(kinds, row, strict=True))}</tr>"
        for row in listing.rows
    )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
