"""Does the cut predict? Layers in the minimum cut raised by a bit, against as many others, without training.

A model is quantized at its rules' whole widths from float weights: ranges fitted, BatchNorm re-estimated, nothing
trained. Then the layers in its cut (:func:`fxquant.analyze.cut_of_layers`) get a bit more, weights and inputs alike,
and in each draw as many layers outside of it. Beside it the rank correlation (Spearman) over tensors of what a
sensitivity predicts with the divergence that is measured (:mod:`fxquant.sensitivity`).
"""

from __future__ import annotations

import dataclasses
import functools
import math
import random
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from . import cost
from .analyze import cut_of_layers
from .capacity import measure_capacity
from .errors import SpecError
from .freeze import settle
from .grid import MAX_BITS
from .layers import QATLayer
from .prepare import PreparedInfo, prepare, prepared_info
from .sensitivity import Candidates, measure_sensitivity
from .spec import RESIDUAL_BITS, Rule, check_count


@dataclass(frozen=True)
class CutCheck:
    """What :func:`check_cut` found; accuracies in per cent.

    Attributes:
        cut: the layers in the cut that could be wider.
        cut_bits: its value, bits per image.
        before, after: accuracy at the rules' widths, and with the cut raised.
        others: (layers, accuracy) of each draw.
        correlation: by sensitivity, its rank correlation with the measured divergence at each width.
        images: that accuracies are of.
    """

    cut: tuple[str, ...]
    cut_bits: float
    before: float
    after: float
    others: list[tuple[tuple[str, ...], float]]
    correlation: dict[str, dict[int, float]]
    images: int

    @property
    def advantage(self) -> float:
        """Accuracy with the cut raised, less the mean over draws, in percentage points."""
        return self.after - statistics.mean(accuracy for _, accuracy in self.others)

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        others = [accuracy for _, accuracy in self.others]
        return dataclasses.asdict(self) | {
            "advantage": self.advantage,
            "others_mean": statistics.mean(others),
            "others_deviation": statistics.stdev(others) if len(others) > 1 else 0.0,
            "others_below_cut": sum(accuracy < self.after for accuracy in others),
        }


def check_cut(
    model: nn.Module,
    rules: list[Rule],
    calibration: Iterable,
    accuracy: Callable[[nn.Module], tuple[float, int]],
    *,
    statistics_images: Callable[[], Iterable] | None = None,
    backend: str = "x86",
    residual_bits: int = RESIDUAL_BITS,
    vnni: bool | None = None,
    draws: int = 10,
    seed: int = 0,
    correlate: tuple[str, ...] = ("capacity", "fisher"),
    widths: tuple[int, ...] = (2, 3, 4),
    max_batches: int = 4,
    watch: Callable[[str], None] = lambda line: None,
) -> CutCheck:
    """Carry out the comparison of this module's docstring.

    Args:
        model: float.
        rules: whole widths, some below what the backend computes.
        calibration: batches for ranges, BatchNorm and capacities.
        accuracy: of a quantized model, in per cent, and the number of images.
        statistics_images: gives the batches for BatchNorm, anew for each model, where they are others: images
            augmented as those that the weights were trained on.
        backend, residual_bits, vnni: as in :func:`fxquant.prepare`.
        draws: sets of other layers; fewer where there are not so many.
        correlate: sensitivities whose rank correlation with the measured one is wanted; none of them for none.
        widths: at which.
        watch: told of each step.

    Raises:
        SpecError: widths that are learned, a cut without a layer that could be wider, no other layers to draw from, or
            no draws.
    """
    check_count(draws, "draws")
    learned = [
        rule.pattern for rule in rules if isinstance(rule.weight_bits, tuple) or isinstance(rule.activation_bits, tuple)
    ]
    if learned:
        raise SpecError(f"the rule {learned[0]!r} learns its widths; the comparison without training takes whole ones")
    options = {"backend": backend, "residual_bits": residual_bits, "vnni": vnni}
    prepared = functools.partial(prepare, model, calibration=calibration, **options)
    statistics_images = statistics_images or (lambda: calibration)
    start = prepared(rules)
    info = prepared_info(start)
    resolved = {name: rule for name, rule in info.rules.items() if rule is not None}
    settle(start, calibration=statistics_images())
    cut = cut_of_layers(start, measure_capacity(start, calibration, max_batches))
    narrow = [name for name, layer in cost.qat_layers(start).items() if _below_full(resolved[name], layer, info)]
    chosen = tuple(name for name in cut.layers if name in narrow)
    if not chosen:
        raise SpecError(
            f"the minimum cut, {', '.join(cut.tensors) or 'of nothing'}, holds no layer below full width, so "
            "that no width can be raised to widen it; check a recipe with lower widths"
        )
    rest = [name for name in narrow if name not in chosen]
    if len(rest) < len(chosen):
        raise SpecError(
            f"the cut holds {len(chosen)} layers, and there are but {len(rest)} others to compare them with"
        )
    before, images = accuracy(start)
    watch(f"as it is: {before:.2f} %; cut of {cut.bits:.0f} bits at {', '.join(chosen)}")

    def accuracy_with(names: tuple[str, ...]) -> float:
        wider = [_raised(name, resolved[name]) for name in names]
        other = prepared([*wider, *rules])
        settle(other, calibration=statistics_images())
        found, _ = accuracy(other)
        watch(f"{', '.join(names)} a bit wider: {found:.2f} %")
        return found

    after = accuracy_with(chosen)
    others = [(names, accuracy_with(names)) for names in _draws(rest, len(chosen), draws, seed)]
    candidates = dict.fromkeys(narrow, (widths, widths))
    # Anew: the BatchNorm of ``start`` fits its quantized layers; with their quantizers off it is no float model.
    fresh = prepared(rules)
    correlation = _correlations(fresh, calibration, candidates, correlate, max_batches) if correlate else {}
    return CutCheck(chosen, cut.bits, before, after, others, correlation, images)


def _below_full(rule: Rule, layer: QATLayer, info: PreparedInfo) -> bool:
    widest = info.widest(layer, rule.weight_bits)
    return not rule.keeps_float and any(getattr(rule, what) < bits for what, bits in widest.items())


def _raised(name: str, rule: Rule) -> Rule:
    weight, activation = (min(bits + 1, MAX_BITS) for bits in (rule.weight_bits, rule.activation_bits))
    return dataclasses.replace(rule, pattern=name, weight_bits=weight, activation_bits=activation)


def _draws(names: list[str], size: int, draws: int, seed: int) -> list[tuple[str, ...]]:
    """Different sets of ``size`` names, in the order of ``names``."""
    drawn, found = random.Random(seed), set()
    possible = math.comb(len(names), size)
    while len(found) < min(draws, possible):
        found.add(tuple(sorted(drawn.sample(names, size), key=names.index)))
    return sorted(found, key=lambda set_: [names.index(name) for name in set_])


def _correlations(
    model: fx.GraphModule,
    batches: Iterable,
    candidates: Candidates,
    methods: tuple[str, ...],
    max_batches: int,
) -> dict[str, dict[int, float]]:
    """Spearman's rank correlation of each sensitivity with the measured one, over tensors, at each width;
    less capacity is more sensitivity."""
    from scipy.stats import spearmanr

    measured = measure_sensitivity(model, batches, "loss", candidates, max_batches=max_batches).tensors
    out: dict[str, dict[int, float]] = {}
    for method in methods:
        found = measure_sensitivity(model, batches, method, candidates, max_batches=max_batches).tensors
        sign = -1 if method == "capacity" else 1
        for bits in next(iter(measured.values())):
            pairs = [(row[bits], sign * found[tensor][bits]) for tensor, row in measured.items()]
            out.setdefault(method, {})[bits] = float(spearmanr(pairs).statistic)
    return out
