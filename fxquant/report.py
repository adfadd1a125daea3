"""Tables a person reads: who got which bits, from which rule; what each operator was lowered to."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence

from rich.table import Table
from torch import fx

from . import cost
from .allocate import Allocation
from .analyze import Analysis
from .cut_check import CutCheck
from .lower import LoweredLayer
from .prepare import prepared_info
from .widths import layer_widths


def layer_rows(model: fx.GraphModule) -> list[dict]:
    """One row per quantizable layer of a prepared model: name, kind, widths, estimator, sizes, rule."""
    info, layers = prepared_info(model), cost.qat_layers(model)
    rows = []
    for name, rule in info.rules.items():
        layer = layers.get(name)
        if layer is None:
            rows.append({"layer": name, "kind": "float", "rule": rule.pattern if rule else "(none matches)"})
            continue
        weight, activation = layer_widths(layer)
        size = info.costs.get(name)
        rows.append(
            {
                "layer": name,
                "kind": type(layer).__name__.removeprefix("QAT"),
                "weight_bits": weight,
                "activation_bits": activation,
                "estimator": layer.weight_fake_quant.name,
                "input_grid": layer.input_fake_quant.grid_scheme,
                "weights": size.weights if size else None,
                "macs": size.macs if size else None,
                "rule": rule.pattern,
            }
        )
    rows += [{"layer": name, "kind": "float", "rule": f"not captured: {why}"} for name, why in info.opaque.items()]
    return rows


def layer_table(model: fx.GraphModule, title: str = "Layers") -> Table:
    """:func:`layer_rows` for a terminal."""
    table = Table(title=title, title_justify="left")
    for heading in ("layer", "kind", "estimator", "input grid", "rule"):
        table.add_column(heading, overflow="fold")
    for heading in ("W bits", "A bits", "weights", "MACs"):
        table.add_column(heading, justify="right")
    for row in layer_rows(model):
        table.add_row(
            row["layer"],
            row["kind"],
            row.get("estimator", "-"),
            row.get("input_grid", "-"),
            row["rule"],
            _bits(row.get("weight_bits")),
            _bits(row.get("activation_bits")),
            f"{row['weights']:,}" if row.get("weights") else "-",
            f"{row['macs']:,}" if row.get("macs") else "-",
        )
    return table


def lowering_table(layers: list[LoweredLayer], backend: str) -> Table:
    """What each operator became, and how far its kernel was from the reference on the check batch."""
    table = Table(title=f"Lowered to {backend}", title_justify="left")
    for heading in ("operator", "kernel", "why"):
        table.add_column(heading, overflow="fold")
    for heading in ("max codes off", "share"):
        table.add_column(heading, justify="right")
    for layer in layers:
        table.add_row(
            layer.name,
            layer.kernel,
            layer.reason,
            str(layer.max_code_difference),
            f"{layer.share_different:.4%}" if layer.share_different else "0",
        )
    return table


def lowering_summary(layers: list[LoweredLayer], backend: str) -> str:
    """One line a backend, and one for each operator that had to stay on the reference."""
    stayed = [layer for layer in layers if layer.kernel == "reference"]
    kernels = Counter(layer.kernel for layer in layers if layer.kernel != "reference")
    named = ", ".join(f"{count} {kernel}" for kernel, count in kernels.most_common())
    lines = [f"{backend}: {len(layers) - len(stayed)} of {len(layers)} operators on integer kernels ({named})"]
    lines += [f"  {layer.name} stays on the reference: {layer.reason}" for layer in stayed]
    return "\n".join(lines)


def capacity_table(analysis: Analysis) -> Table:
    """What each quantized tensor carries; those in the bottleneck and in the minimum cut are marked."""
    table = Table(title="Capacity, in bits per image", title_justify="left")
    for heading in ("tensor", "bits", "elements", "SNR dB", "clipped %", "bits/element", "capacity", "cut"):
        table.add_column(heading, justify="left" if heading in ("tensor", "cut") else "right", overflow="fold")
    marks = {tensor: f"#{rank}" for rank, cut in enumerate(analysis.cuts, 1) for tensor in cut.tensors}
    for name, tensor in analysis.capacities.items():
        ratio = 10 * math.log10(tensor.signal / tensor.noise) if tensor.noise > 0 < tensor.signal else math.inf
        table.add_row(
            name,
            _bits(tensor.bits),
            f"{tensor.elements:,}",
            f"{ratio:.1f}",
            f"{100 * tensor.clipping / tensor.noise:.0f}" if tensor.noise else "0",
            f"{tensor.bits_per_element:.2f}",
            f"{tensor.total:,.0f}",
            marks.get(name, ""),
        )
    return table


def cut_lines(analysis: Analysis) -> list[str]:
    """The cuts in words, from the output to the image."""
    named = [", ".join(cut.tensors) for cut in analysis.cuts]
    lines = [f"cut #{i}: {cut.bits:,.0f} bits, {named[i - 1]}" for i, cut in enumerate(analysis.cuts, 1)]
    if analysis.bottleneck is None:
        lines.append("no cut with a tensor below 8 bits is smaller than what reaches it: the low widths limit nothing")
    else:
        lines.append(f"bottleneck: {', '.join(analysis.bottleneck.tensors)}")
    named = ", ".join(analysis.layer_cut.tensors)
    return [*lines, f"smallest cut of what lies between 8-bit layers: {analysis.layer_cut.bits:,.0f} bits, {named}"]


def cut_check_lines(check: CutCheck) -> list[str]:
    """What raising the cut did, beside raising others."""
    found = check.to_dict()
    mean, deviation = found["others_mean"], found["others_deviation"]
    lines = [
        f"accuracy on {check.images} images as it is {check.before:.2f} %; a bit more in the cut "
        f"({', '.join(check.cut)}) {check.after:.2f} %, in as many others {mean:.2f} ± {deviation:.2f} % "
        f"({len(check.others)} draws, {found['others_below_cut']} below the cut); {check.advantage:+.2f} points"
    ]
    for method, row in check.correlation.items():
        figures = ", ".join(f"{value:+.2f} at {bits} bits" for bits, value in row.items())
        lines.append(f"rank correlation of {method} with the measured divergence: {figures}")
    return lines


def allocation_table(model: fx.GraphModule, allocation: Allocation) -> Table:
    """The widths of an allocation beside those that the model was prepared with."""
    table = Table(title="; ".join(allocation.summary()), title_justify="left")
    for heading in ("layer", "W bits", "A bits", "before", "weights", "inputs", "MACs"):
        table.add_column(heading, justify="left" if heading == "layer" else "right", overflow="fold")
    layers, costs = cost.qat_layers(model), prepared_info(model).costs
    for name, (weight, activation) in allocation.widths.items():
        before = "/".join(_bits(bits) for bits in layer_widths(layers[name]))
        sizes = (f"{size:,}" for size in (costs[name].weights, costs[name].inputs, costs[name].macs))
        table.add_row(name, str(weight), str(activation), before, *sizes)
    return table


def comparison_table(results: list[dict]) -> Table:
    """Accuracies of runs, one row per recipe: mean ± standard deviation over seeds."""
    table = Table(title="Accuracy in per cent, mean ± standard deviation over seeds", title_justify="left")
    groups: dict[str, list[dict]] = {}
    for result in results:
        groups.setdefault(result["recipe"], []).append(result)
    backends = sorted({backend for result in results for backend in result["lowered"]})
    headings = ("recipe", "seeds", "float", "fake-quant", "reference", *backends, "gap to float", "argmax as reference")
    for heading in (*headings, "W bits", "A bits"):
        table.add_column(heading, justify="left" if heading == "recipe" else "right", overflow="fold")
    for recipe, runs in groups.items():
        agreements = [run["lowered"][b]["argmax_agreement"] for run in runs for b in run["lowered"]]
        table.add_row(
            recipe,
            str(len(runs)),
            *(mean_deviation([run[key] for run in runs if key in run]) for key in _ACCURACIES),
            *(mean_deviation([run["lowered"][b]["accuracy"] for run in runs if b in run["lowered"]]) for b in backends),
            mean_deviation(
                [run["reference_accuracy"] - run["float_accuracy"] for run in runs if "reference_accuracy" in run]
            ),
            f"{min(agreements, default=100.0):.2f}",
            mean_deviation([run.get("mean_weight_bits", 32.0) for run in runs]),
            mean_deviation([run.get("mean_activation_bits", 32.0) for run in runs]),
        )
    return table


_ACCURACIES = ("float_accuracy", "fake_quant_accuracy", "reference_accuracy")


def mean_deviation(values: Sequence[float], sign: bool = False, digits: int = 2) -> str:
    """``91.30 ± 0.12``: mean and sample standard deviation; ``-`` of nothing, and one value by itself."""
    if not values:
        return "-"
    mean = statistics.mean(values)
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean:{'+' if sign else ''}.{digits}f}{deviation}"


def _bits(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}" if float(value).is_integer() else f"{value:.2f}"
