"""What becomes of any timm model: each taken through every stage in a process of its own, one CSV row a model.

``python -m fxquant.coverage NAME SIZE BITS`` does one model and prints its row as JSON.
"""

from __future__ import annotations

import copy
import csv
import json
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from torch import Tensor, nn

from . import canonical
from .controller import param_groups
from .convert import convert
from .errors import CheckpointError, FxQuantError
from .freeze import freeze
from .layers import QATLayer
from .lower import lower
from .prepare import prepare
from .spec import Rule
from .verify import verify

_BATCH = 4
_SECONDS_PER_MODEL = 900
STAGES = ("create", "prepare", "step", "freeze", "convert", "lower", "run")


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
        float_difference: largest difference of the captured graph from the model, relative to its largest output.
        without_gradient: trainable parameters without a finite gradient after one step.
        reference_equal: whether the reference equals the frozen model, bit for bit.
        agreement: per cent of images whose argmax on x86 is the reference's.
        cosine: of the x86 logits with the reference's, the least over images.
        prepare_seconds, seconds, peak_mb: time of prepare, of all, and peak memory of the process.
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
    prepare_seconds: float = 0.0
    seconds: float = 0.0
    peak_mb: float = 0.0

    @property
    def passed(self) -> bool:
        """Every stage, every gradient, bit-exact."""
        return self.stages == len(STAGES) and self.reference_equal and not self.without_gradient


def cover_model(name: str, input_size: int, bits: int) -> Row:
    """Take one timm model, randomly initialised, through every stage; an error ends up in the row."""
    row = Row(name, input_size, bits)
    started = time.perf_counter()
    try:
        for _ in _stages(row):
            row.stages += 1
    except Exception as error:
        row.failed = f"{STAGES[row.stages]}: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
    row.seconds = round(time.perf_counter() - started, 1)
    row.peak_mb = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 0)
    return row


def _stages(row: Row) -> Iterator[None]:
    """One ``yield`` a stage of :data:`STAGES`."""
    from . import timm

    torch.manual_seed(0)
    images = torch.randn(_BATCH, 3, row.input_size, row.input_size)
    model = _settled(timm.create_model(row.model, pretrained=False), images)
    yield

    rules = [Rule("first|last", 8, 8), Rule("*", row.bits, row.bits)]
    begun = time.perf_counter()
    prepared = prepare(model, rules, calibration=[images])
    row.prepare_seconds = round(time.perf_counter() - begun, 1)
    info = prepared.meta["fxquant"]
    row.layers, row.opaque = len(info.costs), len(info.opaque)
    row.conv_bn_fused, row.conv_bn_total = _fused_norms(prepared)
    row.float_difference = info.capture_difference
    yield

    prepared.train()
    optimizer = torch.optim.SGD(param_groups(prepared, lr=1e-4, quantizer_lr=1e-4))
    prepared(images).square().mean().backward()
    trainable = [p for p in prepared.parameters() if p.requires_grad]
    row.without_gradient = sum(p.grad is None or not bool(torch.isfinite(p.grad).all()) for p in trainable)
    nn.utils.clip_grad_norm_(trainable, 1.0)
    optimizer.step()
    yield

    freeze(prepared)
    yield
    reference = convert(prepared)
    yield
    lowered = lower(reference, "x86")
    on_kernels = {r.name for r in lowered.meta["fxquant_lowered"] if r.kernel != "reference"}
    row.integer_macs = _integer_macs(model, images[:1], reference, on_kernels, info.costs)
    yield
    report = verify(prepared, reference, [images], lowered={"x86": lowered})
    row.reference_equal = report.reference_equals_fake_quant
    row.agreement = report.lowered["x86"].argmax_agreement
    with torch.no_grad():
        row.cosine = float(torch.cosine_similarity(lowered(images), reference(images), dim=-1).min())
    yield


def _settled(model: nn.Module, images: Tensor) -> nn.Module:
    """A random model that looks trained: what starts at zero is drawn, BatchNorm has seen activations."""
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, nn.Parameter) or weight.any():
            continue
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(weight, 0.2, 1.0)
        elif isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_uniform_(weight)
    for name, parameter in model.named_parameters():
        if name.endswith("gain") and not parameter.any():  # of weight-standardised convolutions
            nn.init.constant_(parameter, 0.5)
    model.train()
    with torch.no_grad():
        model(images)
    return model


def _fused_norms(prepared: torch.fx.GraphModule) -> tuple[int, int]:
    """(BatchNorms inside of layers, those plus the ones that follow a convolution and are not)."""
    modules = dict(prepared.named_modules())
    fused = sum(getattr(m, "bn", None) is not None for m in modules.values() if isinstance(m, QATLayer))
    loose = 0
    for node in prepared.graph.nodes:
        if node.op == "call_module" and isinstance(modules[node.target], nn.BatchNorm2d):
            source = node.args[0]
            layer = modules[source.target] if source.op == "call_module" else None
            loose += isinstance(layer, nn.Conv2d) and not getattr(layer, "relu", False)  # else it follows a ReLU
    return fused, fused + loose


def _integer_macs(model: nn.Module, image: Tensor, reference, on_kernels: set[str], costs: dict) -> float:
    """MACs of layers on kernels over those of the whole float model, as torch's flop counter sees it."""
    from torch.utils.flop_counter import FlopCounterMode

    opened = copy.deepcopy(model).eval().requires_grad_(False)
    canonical.open_fused_attention(opened)  # the counter does not see inside of a fused one
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        opened(image)
    total = counter.get_total_flops() / 2
    integer = 0
    for node in reference.graph.nodes:
        if not str(node.target).endswith("_rescale"):
            continue
        results = {node.name, *(user.name for user in node.users)}
        name = next((n for n in costs if n.replace(".", "_") == str(node.target).removesuffix("_rescale")), None)
        if name is not None and results & on_kernels:
            integer += costs[name].macs
    return round(min(integer / max(total, 1), 1.0), 4)


def read_models(path: Path) -> list[tuple[str, int]]:
    """Lines of ``name input_size``; ``#`` begins a comment.

    Raises:
        FxQuantError: for a line that is something else.
    """
    models = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        words = line.split("#")[0].split()
        if not words:
            continue
        if len(words) != 2 or not words[1].isdigit():
            raise FxQuantError(f"{path}:{number}: {line!r} is not 'model input_size', such as 'resnet18 224'")
        models.append((words[0], int(words[1])))
    return models


def cover(
    models: list[tuple[str, int]], bits: int, output: Path, *, resume: bool, watch: Callable[[Row], None]
) -> list[Row]:
    """Cover all models, each in its own process, so that a crash costs one row. Appends to ``output`` as it goes.

    Args:
        models: (name, input size).
        bits: width of all layers but the first and the last.
        output: CSV file, one row a model.
        resume: keep the rows that are there and do the rest.
        watch: called with each row.
    """
    done = {(row.model, row.bits): row for row in _read_rows(output)} if resume and output.exists() else {}
    if not done:
        output.parent.mkdir(parents=True, exist_ok=True)
        with output.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerow([f.name for f in fields(Row)])
    rows = []
    for name, size in models:
        row = done.get((name, bits))
        if row is None:
            row = _in_a_process(name, size, bits)
            with output.open("a", newline="", encoding="utf-8") as file:
                csv.writer(file).writerow(asdict(row).values())
        watch(row)
        rows.append(row)
    return rows


def _in_a_process(name: str, size: int, bits: int) -> Row:
    command = [sys.executable, "-m", "fxquant.coverage", name, str(size), str(bits)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS_PER_MODEL, check=False)
        return Row(**json.loads(done.stdout.splitlines()[-1]))
    except subprocess.TimeoutExpired:
        return Row(name, size, bits, failed=f"took more than {_SECONDS_PER_MODEL} s")
    except (IndexError, ValueError, TypeError):
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return Row(name, size, bits, failed=f"its process ended with status {done.returncode}: {last[:200]}")


def _read_rows(path: Path) -> list[Row]:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return [Row(**{f.name: _typed(f.type, line[f.name]) for f in fields(Row)}) for line in csv.DictReader(file)]
    except (KeyError, ValueError) as error:
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
        lines.append("least cosine of x86 with the reference: " + ", ".join(f"{r.model} {r.cosine:.4f}" for r in worst))
    lines += [f"{row.model}: {row.failed or 'gradients or bits differ'}" for row in rows if not row.passed]
    return "\n".join(lines)


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=UserWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    print(json.dumps(asdict(cover_model(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))))
