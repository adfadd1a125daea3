"""What there is to say about finished runs, as numbers: the page, the text and the JSON of ``fxquant report`` show the
same.

All of it comes from the files of the runs; nothing is computed anew but shares and sums.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table

from . import checkpoint
from .dynamics import read_dynamics
from .errors import CheckpointError

_REPORTED = frozenset(
    {"model", "estimator", "seed", "images", "seconds", "weights_bytes", "bops", "parity", "layers", "capacity"}
)


def collect(folder: Path, others: list[Path]) -> dict[str, Any]:
    """The numbers of a run, and a line on each of the others, for comparison.

    Raises:
        CheckpointError: a folder without a result, or one of a version that left no capacities; a run in float alone.
    """
    result = _quantized(folder)
    layers = [_layer(row) for row in result["layers"]]
    return {
        "run": str(folder),
        **{key: result[key] for key in ("recipe", "model", "estimator", "seed", "images", "seconds")},
        "accuracy": _accuracies(result),
        "mean_weight_bits": result["mean_weight_bits"],
        "mean_activation_bits": result["mean_activation_bits"],
        "bops": result["bops"],
        "weights_bytes": result["weights_bytes"],
        "exact": result["parity"]["reference_equals_fake_quant"],
        "layers": layers,
        "capacity": result["capacity"],
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
    return {"run": str(folder), **{key: result[key] for key in keys}, "weights_bytes": result["weights_bytes"]["ideal"]}


def _words(rollback: dict[str, Any]) -> str:
    place = f"epoch {rollback['epoch']} of {rollback['stage']} training, step {rollback['step']}"
    return f"{place}: {rollback['cause']}; learning rates times {rollback['lr_factor']:g}"


def cut_of(capacity: dict[str, Any]) -> dict[str, str]:
    """Tensors that are in a cut, and which: those in the minimum cut, and in the smallest one between 8-bit layers."""
    marked = dict.fromkeys(capacity["layer_cut"]["tensors"], "smallest cut between 8-bit layers")
    return marked | dict.fromkeys(capacity["cuts"][0]["tensors"], "minimum cut")


def tables(data: dict[str, Any]) -> list[Table]:
    """:func:`collect`'s numbers for a terminal."""
    summary = _table(f"{data['recipe']}, seed {data['seed']}", ("figure", "value"))
    for name, value in data["accuracy"].items():
        summary.add_row(f"accuracy, {name}", f"{value:.2f} %")
    summary.add_row(
        "mean bits, weights and activations", f"{data['mean_weight_bits']:.3f}, {data['mean_activation_bits']:.3f}"
    )
    summary.add_row("bit operations per image", f"{data['bops']:,.0f}")
    summary.add_row("bytes, float and packed", "{float:,} {ideal:,}".format(**data["weights_bytes"]))
    summary.add_row("converted equals trained, bit for bit", "yes" if data["exact"] else "NO")
    for rollback in data["rollbacks"]:
        summary.add_row("rolled back", rollback)
    for rank, cut in enumerate(data["capacity"]["cuts"], 1):
        summary.add_row(f"cut #{rank}", f"{_bits(cut['bits'])}: {', '.join(cut['tensors'])}")
    cut = data["capacity"]["layer_cut"]
    summary.add_row("smallest cut between 8-bit layers", f"{_bits(cut['bits'])}: {', '.join(cut['tensors'])}")

    layers = _table("Layers", ("layer", "kind", "W bits", "A bits", "weights", "bytes", "MACs", "BOPs"))
    for row in data["layers"]:
        figures = (
            row.get(key) for key in ("weight_bits", "activation_bits", "weights", "weight_bytes", "macs", "bops")
        )
        layers.add_row(
            row["layer"], row["kind"], *("-" if f is None else f"{f:,.6g}" if f < 100 else f"{f:,.0f}" for f in figures)
        )

    marked = cut_of(data["capacity"])
    capacity = _table("Capacity", ("tensor", "bits", "elements", "bits/element", "bits", "cut"))
    for row in data["capacity"]["tensors"]:
        figures = (
            f"{row['bits']:.4g}",
            f"{row['elements']:,}",
            f"{row['bits_per_element']:.2f}",
            f"{row['total']:,.0f}",
        )
        capacity.add_row(row["name"], *figures, marked.get(row["name"], ""))

    dynamics = _table("Cuts while training", ("epoch", "network", "between 8-bit layers"))
    for entry in data["dynamics"]:
        dynamics.add_row(str(entry["epoch"]), _bits(entry["bits"]), _bits(entry["layer_cut"]["bits"]))

    parity = _table("Parity", ("backend", "operator", "kernel", "max codes off", "share"))
    for backend, found in data["parity"].items():
        off = found["max_code_difference"]
        parity.add_row(
            backend, "all", f"argmax {found['argmax_agreement']:.2f} %", "-" if off is None else str(off), ""
        )
        for operator in found.get("operators", []):
            share = f"{operator['share_different']:.4%}"
            parity.add_row(backend, operator["name"], operator["kernel"], str(operator["max_code_difference"]), share)

    runs = _table("Runs", ("recipe", "seed", "converted %", "float %", "W bits", "A bits", "BOPs", "bytes"))
    for run in data["runs"]:
        figures = [
            f"{run[k]:.2f}"
            for k in ("reference_accuracy", "float_accuracy", "mean_weight_bits", "mean_activation_bits")
        ]
        runs.add_row(run["recipe"], str(run["seed"]), *figures, f"{run['bops']:,.0f}", f"{run['weights_bytes']:,}")
    return [summary, layers, capacity, dynamics, parity, runs]


def _bits(value: float | None) -> str:
    return "unlimited" if value is None else f"{value:,.0f} bits"


def _table(title: str, headings: tuple[str, ...]) -> Table:
    table = Table(title=title, title_justify="left")
    for heading in headings:
        table.add_column(heading, overflow="fold")
    return table
