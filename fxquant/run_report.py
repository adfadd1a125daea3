"""What there is to say about finished runs, as numbers: the JSON of ``fxquant report`` holds them, and its page and its
text have the same tables of them; the page's pictures show what lies between.

All of it comes from the files of the runs; nothing is computed anew but shares and sums.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from rich.markup import escape
from rich.table import Table

from . import checkpoint
from .capacity import INPUT, WEIGHT
from .dynamics import read_dynamics
from .errors import CheckpointError

_AS_THEY_ARE = (
    "recipe",
    "model",
    "estimator",
    "seed",
    "images",
    "seconds",
    "weights_bytes",
    "bops",
    "capacity",
    "history",
)
_REPORTED = frozenset({*_AS_THEY_ARE, "parity", "layers"})


def collect(folder: Path, others: list[Path]) -> dict[str, Any]:
    """The numbers of a run, and a line on each of the others, for comparison.

    Raises:
        CheckpointError: a folder without a result, or one of a version that left no capacities; a run in float alone.
    """
    result = _quantized(folder)
    layers = [_layer(row) for row in result["layers"]]
    return {
        "run": str(folder),
        **{key: result[key] for key in _AS_THEY_ARE},
        "accuracy": _accuracies(result),
        "mean_weight_bits": result["mean_weight_bits"],
        "mean_activation_bits": result["mean_activation_bits"],
        "exact": result["parity"]["reference_equals_fake_quant"],
        "layers": layers,
        "dynamics": read_dynamics(folder),
        "rollbacks": [_words(rollback) for rollback in result.get("rollbacks", [])],
        "parity": result["lowered"],
        "runs": [_line(folder, result), *(_line(other, _quantized(other)) for other in others)],
    }


def _quantized(folder: Path) -> dict[str, Any]:
    result = checkpoint.read_result(folder)
    if "reference_accuracy" not in result:
        raise CheckpointError(f"the run of {folder} trained in float alone; there are no integers to report on")
    if missing := sorted(_REPORTED - result.keys()):
        raise CheckpointError(
            f"{folder} was left by a version that wrote no {', '.join(missing)}; run its recipe again"
        )
    return result


def _accuracies(result: dict[str, Any]) -> dict[str, float]:
    """Per cent of held-out images, by form of the model."""
    named = {
        "float": result["float_accuracy"],
        "fake-quant": result["fake_quant_accuracy"],
        "converted": result["reference_accuracy"],
    }
    return named | {f"lowered, {backend}": parity["accuracy"] for backend, parity in result["lowered"].items()}


def _layer(row: dict[str, Any]) -> dict[str, Any]:
    """A layer's row with what it costs."""
    bits = (row.get("weight_bits"), row.get("activation_bits"))
    quantized = None not in bits and row.get("macs") is not None
    return row | {
        "bops": row["macs"] * bits[0] * bits[1] if quantized else None,
        "weight_bytes": row["weights"] * bits[0] / 8 if quantized else None,
    }


def _line(folder: Path, result: dict[str, Any]) -> dict[str, Any]:
    keys = (
        "recipe",
        "seed",
        "bops",
        "float_accuracy",
        "reference_accuracy",
        "mean_weight_bits",
        "mean_activation_bits",
    )
    return {
        "run": str(folder),
        **{key: result[key] for key in keys},
        "epochs": result["epochs"]["quantized"],
        "weights_bytes": result["weights_bytes"]["ideal"],
    }


def _words(rollback: dict[str, Any]) -> str:
    place = f"epoch {rollback['epoch']} of {rollback['stage']} training, step {rollback['step']}"
    return f"{place}: {rollback['cause']}; learning rates times {rollback['lr_factor']:g}"


def cut_of(capacity: dict[str, Any]) -> dict[str, str]:
    """Tensors that are in a cut, and which: those in the minimum cut, and in the smallest one between 8-bit layers."""
    marked = dict.fromkeys(capacity["layer_cut"]["tensors"], "smallest cut between 8-bit layers")
    return marked | dict.fromkeys(capacity["cuts"][0]["tensors"], "minimum cut")


class Listing(NamedTuple):
    """One table of a report.

    ``marked`` are first cells of rows to be made out, ``long`` headings of columns whose cells may run over lines.
    """

    title: str
    headings: tuple[str, ...]
    rows: list[tuple[str, ...]]
    marked: frozenset[str] = frozenset()
    long: frozenset[str] = frozenset()


def listings(data: dict[str, Any]) -> dict[str, Listing]:
    """:func:`collect`'s numbers as tables, for the page and the terminal alike."""
    return {
        "summary": Listing(f"{data['recipe']}, seed {data['seed']}", ("figure", "value"), _summary(data)),
        "layers": _layers(data),
        "capacity": _capacity(data["capacity"]),
        "dynamics": _dynamics(data["dynamics"]),
        "history": _history(data["history"]),
        "parity": _parity(data["parity"]),
        "runs": _runs(data["runs"]),
    }


def tables(data: dict[str, Any]) -> list[Table]:
    """:func:`listings` for a terminal."""
    out = []
    for listing in listings(data).values():
        table = Table(title=listing.title, title_justify="left")
        for heading in listing.headings:
            table.add_column(heading, overflow="fold")
        for row in listing.rows:
            table.add_row(*(escape(cell) for cell in row))
        out.append(table)
    return out


def _summary(data: dict[str, Any]) -> list[tuple[str, ...]]:
    capacity, float_bytes, packed = data["capacity"], data["weights_bytes"]["float"], data["weights_bytes"]["ideal"]
    return [
        ("model, estimator", f"{data['model']}, {data['estimator']}"),
        ("held-out images", f"{data['images']:,}"),
        ("seconds", f"{data['seconds']:,.0f}"),
        *((f"accuracy, {name}", f"{value:.2f} %") for name, value in data["accuracy"].items()),
        ("mean bits, weights and activations", f"{data['mean_weight_bits']:.3f}, {data['mean_activation_bits']:.3f}"),
        ("bit operations per image", f"{data['bops']:,.0f}"),
        ("bytes, float and packed", f"{float_bytes:,} {packed:,}"),
        ("converted equals trained, bit for bit", "yes" if data["exact"] else "NO"),
        *(("rolled back", rollback) for rollback in data["rollbacks"]),
        *((f"cut #{rank}", _cut(cut)) for rank, cut in enumerate(capacity["cuts"], 1)),
        ("smallest cut between 8-bit layers", _cut(capacity["layer_cut"])),
    ]


def _layers(data: dict[str, Any]) -> Listing:
    words, figures = ("layer", "kind", "estimator", "input_grid"), (
        "weight_bits", "activation_bits", "weights", "weight_bytes", "macs", "bops",
    )  # fmt: skip
    headings = "layer", "kind", "estimator", "input grid", "W bits", "A bits", "weights", "bytes", "MACs", "BOPs"
    rows = [
        (*(row.get(key, "-") for key in words), *(_figure(row.get(key)) for key in figures)) for row in data["layers"]
    ]
    in_cut = frozenset(tensor.rsplit(".", 1)[0] for tensor in cut_of(data["capacity"]))
    return Listing("Layers", headings, rows, in_cut)


def _capacity(capacity: dict[str, Any]) -> Listing:
    marked = cut_of(capacity)
    rows = [
        (
            row["name"],
            f"{row['bits']:.4g}",
            f"{row['elements']:,}",
            f"{row['bits_per_element']:.2f}",
            f"{row['total']:,.0f}",
            marked.get(row["name"], ""),
        )
        for row in capacity["tensors"]
    ]
    headings = "tensor", "bits", "elements", "bits/element", "bits per image", "cut"
    return Listing("Capacity of each tensor", headings, rows, frozenset(marked))


def _dynamics(entries: list[dict[str, Any]]) -> Listing:
    def mean_bits(entry: dict[str, Any], kind: str) -> str:
        bits = [tensor["bits"] for name, tensor in entry["tensors"].items() if name.endswith(kind)]
        return f"{sum(bits) / len(bits):.3f}" if bits else "-"

    rows = [
        (
            str(entry["epoch"]),
            _bits(entry["bits"]),
            _bits(entry["layer_cut"]["bits"]),
            mean_bits(entry, f".{WEIGHT}"),
            mean_bits(entry, f".{INPUT}"),
        )
        for entry in entries
    ]
    headings = "epoch", "minimum cut", "cut between 8-bit layers", "mean W bits", "mean A bits"
    return Listing("Cuts and widths while training", headings, rows)


def _history(epochs: list[dict[str, float]]) -> Listing:
    names = list(dict.fromkeys(name for entry in epochs for name in entry if name != "epoch"))
    rows = [(f"{entry['epoch']}", *(_figure(entry.get(name)) for name in names)) for entry in epochs]
    return Listing("Objective, widths and schedules while training", ("epoch", *names), rows)


def _parity(lowered: dict[str, Any]) -> Listing:
    rows = []
    for backend, found in lowered.items():
        off, same = found["max_code_difference"], f"argmax {found['argmax_agreement']:.2f} %"
        rows.append((backend, "all", same, "-" if off is None else str(off), ""))
        for operator in found.get("operators", []):
            share = f"{operator['share_different']:.4%}"
            off = str(operator["max_code_difference"])
            rows.append((backend, operator["name"], operator["kernel"], off, share))
    return Listing("Parity", ("backend", "operator", "kernel", "max codes off", "share of codes"), rows)


def _runs(runs: list[dict[str, Any]]) -> Listing:
    percents = "reference_accuracy", "float_accuracy", "mean_weight_bits", "mean_activation_bits"
    rows = [
        (
            run["recipe"],
            str(run["seed"]),
            str(run["epochs"]),
            *(f"{run[key]:.2f}" for key in percents),
            f"{run['bops']:,.0f}",
            f"{run['weights_bytes']:,}",
            run["run"],
        )
        for run in runs
    ]
    headings = "recipe", "seed", "epochs", "converted %", "float %", "W bits", "A bits", "BOPs", "bytes", "folder"
    return Listing("Runs", headings, rows, long=frozenset({"folder"}))


def _cut(cut: dict[str, Any]) -> str:
    return f"{_bits(cut['bits'])}: {', '.join(cut['tensors'])}"


def _bits(value: float | None) -> str:
    return "unlimited" if value is None else f"{value:,.0f} bits"


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:,.6g}" if value < 100 else f"{value:,.0f}"
