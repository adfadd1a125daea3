"""One model's row, the CSV file of them, and their summary."""

from __future__ import annotations

import csv
import statistics
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from ..errors import CheckpointError

STAGES = ("create", "prepare", "step", "freeze", "convert", "lower", "run")
TIMED = STAGES[1:-1]
"""Those whose time and memory a row tells."""


@dataclass
class Row:
    """One model's way through the stages.

    Attributes:
        model, input_size, bits: what was asked; the first and the last layer have 8 bits.
        stages: how many of :data:`STAGES` it passed.
        failed: the first stage it did not pass, with the error; empty when it passed all.
        layers: quantized layers; ``opaque`` are submodules kept as one float call.
        conv_bn_fused, conv_bn_total: BatchNorms folded into their convolution, of those that follow one.
        integer_macs: share of all multiply-accumulates (attention's products included) on integer kernels.
        float_difference: largest difference from the model, relative to its largest output, of the captured graph; of
            the prepared graph, not quantizing, for torch.ao, where the two are one step.
        without_gradient: trainable parameters without a finite gradient after one step.
        reference_equal: whether the reference equals the frozen model, bit for bit.
        agreement: per cent of images whose argmax on x86 is the reference's.
        cosine: of the x86 logits with the reference's, the least over images.
        parameters_m: millions of parameters of the float model.
        parameters_lost: how many of them the prepared model does not have: those that no forward in eval mode uses.
        prepare_seconds, prepare_mb, ...: wall time of each of :data:`TIMED`, and its peak of resident memory in MiB,
            beyond what the process had before the model was created; see :class:`~.spending.Spending`.
        seconds, peak_mb: wall time of everything, and the highest of these peaks.
    """

    model: str
    input_size: int
    bits: int
    stages: int = 0
    failed: str = ""
    layers: int = 0
    opaque: int = 0
    conv_bn_fused: int = 0
    conv_bn_total: int = 0
    integer_macs: float = 0.0
    float_difference: float = float("nan")
    without_gradient: int = 0
    reference_equal: bool = False
    agreement: float = 0.0
    cosine: float = float("nan")
    parameters_m: float = 0.0
    parameters_lost: int = 0
    prepare_seconds: float = 0.0
    prepare_mb: float = 0.0
    step_seconds: float = 0.0
    step_mb: float = 0.0
    freeze_seconds: float = 0.0
    freeze_mb: float = 0.0
    convert_seconds: float = 0.0
    convert_mb: float = 0.0
    lower_seconds: float = 0.0
    lower_mb: float = 0.0
    seconds: float = 0.0
    peak_mb: float = 0.0

    @property
    def passed(self) -> bool:
        """Every stage, every gradient, bit-exact."""
        return self.stages == len(STAGES) and self.reference_equal and not self.without_gradient


def begin(path: Path) -> None:
    """An empty table."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerow([f.name for f in fields(Row)])


def append(path: Path, row: Row) -> None:
    """Add a row to a table."""
    with path.open("a", newline="", encoding="utf-8") as file:
        csv.writer(file).writerow(asdict(row).values())


def read(path: Path) -> list[Row]:
    """The rows of a table.

    Raises:
        CheckpointError: for another kind of file.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return [Row(**{f.name: _typed(f.type, line[f.name]) for f in fields(Row)}) for line in csv.DictReader(file)]
    except (KeyError, TypeError, ValueError) as error:  # a line that was cut short has None at its end
        raise CheckpointError(f"{path} is no table of fxquant coverage ({error!r}); name another --output") from None


def _typed(kind: str, text: str):
    return {"int": int, "float": float, "bool": lambda t: t == "True", "str": str}[kind](text)


def summary(rows: list[Row]) -> str:
    """What the rows come to, in a few lines."""
    passed = [row for row in rows if row.passed]
    reached = [row for row in rows if row.stages == len(STAGES)]
    lines = [f"{len(passed)} of {len(rows)} models pass every stage, with all gradients, bit-exact"]
    if reached:
        fused, total = sum(r.conv_bn_fused for r in reached), sum(r.conv_bn_total for r in reached)
        shares = sorted(r.integer_macs for r in reached)
        lines.append(f"Conv+BN fused: {fused} of {total}")
        lines.append(f"share of MACs on integer kernels: median {statistics.median(shares):.2%}, least {shares[0]:.2%}")
        worst = sorted(reached, key=lambda r: r.cosine)[:5]
        for row in sorted(reached, key=lambda r: -r.parameters_m)[:10]:
            spent = [
                f"{s} {getattr(row, f'{s}_seconds'):.1f} s {getattr(row, f'{s}_mb'):.0f} MiB"
                for s in TIMED
                if getattr(row, f"{s}_mb")
            ]
            lines.append(f"{row.model}, {row.parameters_m:.1f} M parameters: {', '.join(spent)}")
        lines.append("least cosine of x86 with the reference: " + ", ".join(f"{r.model} {r.cosine:.4f}" for r in worst))
    lines += [f"{row.model}: {row.failed or 'gradients or bits differ'}" for row in rows if not row.passed]
    return "\n".join(lines)
