"""allocate(): whole widths for every layer, within a budget, that cost the model least."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx

from . import cost
from .budget import BudgetBound, budget_bounds
from .capacity import INPUT, WEIGHT
from .errors import SpecError, UnknownNameError
from .estimators import check_interval
from .integer_program import Flow, Program, Side, Solution, joined_ties
from .layers import QATLayer
from .mincut import SINK, graph_arcs, minimum_cut
from .prepare import PreparedInfo, prepared_info
from .sensitivity import Sensitivity, measure_sensitivity
from .spec import Budget, Rule, exactly, resolve_rules

_LEAST_CAPACITY = 1e-3  # bits per image, under a logarithm


@dataclass(frozen=True)
class Allocation:
    """Whole widths for every layer, within a budget; :attr:`rules` is what :func:`fxquant.prepare` takes.

    Attributes:
        sensitivity: what was weighed up: ``capacity``, ``fisher`` or ``loss``.
        widths: (weight bits, activation bits) of each quantized layer.
        rules: one rule a layer, those that stay float included.
        spent: of each bound of the budget, what the widths take and the limit.
        predicted: sum of the sensitivities, in nats per image; for ``capacity`` the minimum cut that widths can move,
            in bits per image, or that of the network where they move none.
        gap: relative distance from the optimum that the solver leaves open.
        seconds: that the solver took.
    """

    sensitivity: str
    widths: dict[str, tuple[int, int]]
    rules: list[Rule]
    spent: dict[str, tuple[float, float]]
    predicted: float
    gap: float
    seconds: float

    def to_toml(self, estimator: str | None = None, options: Mapping[str, Any] | None = None) -> str:
        """The rules as a table that a recipe can extend, to be read and edited; with it, none are chosen anew.

        Args:
            estimator: of the recipe; rules that have another name their own.
            options: of the recipe, which rules of that estimator have unless they say otherwise.
        """
        lines = [f"# {'; '.join(self.summary())}", "allocation = false # the widths are chosen", "rules = ["]
        for rule in self.rules:
            keys = {"pattern": rule.pattern}
            if rule.keeps_float:
                keys["bits"] = "float"
            else:
                keys |= {"weight_bits": rule.weight_bits, "activation_bits": rule.activation_bits}
                keys |= {} if rule.estimator == estimator else {"estimator": rule.estimator}
                inherited = dict(options or {}) if rule.estimator == estimator else {}
                plain = Rule(rule.pattern, rule.weight_bits, rule.activation_bits, rule.estimator, options=inherited)
                for key in ("per_channel", "init", "options"):
                    if getattr(rule, key) != getattr(plain, key):
                        keys[key] = getattr(rule, key)
            lines.append(f"    {_toml(keys)},")
        return "\n".join([*lines, "]", ""])

    def summary(self) -> list[str]:
        """What was weighed up and what is spent, a phrase each."""
        unit = "bits per image" if self.sensitivity == "capacity" else "nats"
        spent = [f"{name} {used:.6g} of {limit:.6g}" for name, (used, limit) in self.spent.items()]
        return [f"sensitivity {self.sensitivity}, {self.predicted:.4g} {unit}", *spent]


def _toml(value: object) -> str:
    """A plain value as TOML, tables inline."""
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{key} = {_toml(item)}" for key, item in value.items()) + " }" if value else "{}"
    return json.dumps(value)


def allocate(
    model: fx.GraphModule,
    budget: Budget,
    sensitivity: str | Sensitivity = "fisher",
    *,
    batches: Iterable | None = None,
    weight_bits: tuple[int, int] = (2, 8),
    activation_bits: tuple[int, int] = (2, 8),
    fixed: str | None = "first|last",
    tied: Iterable[Iterable[str]] = (),
    tie_readers: bool = True,
    max_batches: int = 4,
    seconds: float = 10.0,
) -> Allocation:
    """Whole widths for every layer that cost the model least, within ``budget``.

    With ``fisher`` and ``loss`` the sum of the sensitivities (:mod:`fxquant.sensitivity`) is smallest. With
    ``capacity`` the minimum cut is largest; cuts that no width in reach moves, such as a classifier's last tensors, are
    passed over from the output backwards. Of the choices with that cut the one is taken with the largest sum over
    tensors of log capacity (proportional fairness, Kelly 1997): no tensor gains a share unless others lose less.

    Args:
        model: from :func:`fxquant.prepare`, not frozen; it stays as it is. Prepare again with the rules that result.
        budget: what the widths keep to.
        sensitivity: ``capacity``, ``fisher``, ``loss``, or what :func:`measure_sensitivity` gave.
        batches: images to measure on; the calibration data of ``prepare`` when not given.
        weight_bits, activation_bits: lowest and highest candidate. A rule with an interval narrows it, and so does the
            backend where its kernels compute wide operands wrongly.
        fixed: pattern of layers that keep the widths of their rules, as in a rule; None or empty for no layer.
        tied: groups of tensors (``<layer>.weight``, ``<layer>.input``) that get the same width.
        tie_readers: whether layers that read the same tensor get the same input width; each keeps a range of its own.
        max_batches: how many batches to measure on.
        seconds: for the solver, after which the best widths found so far are taken.

    Raises:
        SpecError: no budget, a budget out of reach, ties that cannot be kept, an unknown tensor.
        UnknownNameError, RuleError: an unknown sensitivity, a pattern without a layer.
    """
    info = prepared_info(model)
    if not budget:
        raise SpecError("allocate was given a Budget without a bound; give one, such as Budget(mean_weight_bits=4)")
    options, bounds = _options(model, weight_bits, activation_bits, fixed), budget_bounds(model, budget)
    _require(bounds, options)
    sides, free = _sides(options), _free(options)
    ties = _ties(model, sides, free, tied, tie_readers)
    if isinstance(sensitivity, str):
        data = info.calibration if batches is None else batches
        if data is None:
            raise SpecError(f"sensitivity {sensitivity!r} is measured on images; give allocate batches=...")
        measured = options if sensitivity == "capacity" else {name: options[name] for name in options if name in free}
        candidates = {
            name: tuple(sorted({pair[side] for pair in pairs}) for side in (0, 1)) for name, pairs in measured.items()
        }
        sensitivity = measure_sensitivity(model, data, sensitivity, candidates, max_batches=max_batches)
    _require_measured(sensitivity, options, sides, free)
    began = time.perf_counter()
    program = Program(options, bounds, ties, seconds)
    if sensitivity.method == "capacity":
        solution, predicted = _largest_cut(program, model, sensitivity, sides)
    else:
        losses = {tensor: _rising(row) for tensor, row in sensitivity.tensors.items()}

        def loss(name: str, pair: tuple[int, int]) -> float:
            tensors = (f"{name}.{WEIGHT}", f"{name}.{INPUT}")
            return sum(losses.get(tensor, {}).get(bits, 0.0) for tensor, bits in zip(tensors, pair, strict=True))

        solution = program.minimise(loss)
        predicted = sum(loss(*choice) for choice in solution.widths.items())
    rules = [
        Rule(exactly(name), None, None)
        if name not in solution.widths
        else dataclasses.replace(
            rule, pattern=exactly(name), weight_bits=solution.widths[name][0], activation_bits=solution.widths[name][1]
        )
        for name, rule in info.rules.items()
    ]
    spent = {bound.name: (bound.spent(solution.widths), bound.limit) for bound in bounds}
    elapsed = time.perf_counter() - began
    return Allocation(sensitivity.method, solution.widths, rules, spent, predicted, solution.gap, elapsed)


def _require_measured(
    found: Sensitivity, options: dict[str, list[tuple[int, int]]], sides: dict[str, Side], free: set[str]
) -> None:
    """Raises :class:`SpecError` where a width in question was not measured; it would count as costing nothing."""
    for tensor, (name, side) in sides.items():
        asked = {pair[side] for pair in options[name]} if name in free or found.method == "capacity" else set()
        if missing := sorted(asked - found.tensors.get(tensor, {}).keys()):
            raise SpecError(
                f"the sensitivity {found.method!r} says nothing of {tensor!r} at {', '.join(map(str, missing))} bits; "
                "measure it at all candidate widths, or narrow weight_bits and activation_bits"
            )


def require_allocatable(
    model: fx.GraphModule,
    budget: Budget,
    *,
    weight_bits: tuple[int, int] = (2, 8),
    activation_bits: tuple[int, int] = (2, 8),
    fixed: str | None = "first|last",
    tied: Iterable[Iterable[str]] = (),
    tie_readers: bool = True,
    seconds: float = 10.0,
) -> None:
    """Raises where :func:`allocate` would, whatever the sensitivities: before anything is measured or trained."""
    bounds, options = budget_bounds(model, budget), _options(model, weight_bits, activation_bits, fixed)
    _require(bounds, options)
    ties = _ties(model, _sides(options), _free(options), tied, tie_readers)
    Program(options, bounds, ties, seconds).minimise(lambda name, pair: 0.0)


def _require(bounds: list[BudgetBound], options: dict[str, list[tuple[int, int]]]) -> None:
    for bound in bounds:
        bound.require({name: min(pairs) for name, pairs in options.items()})


def _options(
    model: fx.GraphModule, weight_bits: tuple[int, int], activation_bits: tuple[int, int], fixed: str | None
) -> dict[str, list[tuple[int, int]]]:
    """The pairs of widths that each layer can take."""
    info, layers = prepared_info(model), cost.qat_layers(model)
    if not layers:
        raise SpecError("widths were to be allocated, but every layer stays float by its rule; give a rule bits")
    kept = resolve_rules([Rule(fixed, None, None)], list(info.rules)) if fixed else {}
    out = {}
    for name, layer in layers.items():
        rule = info.rules[name]
        asked = (rule.weight_bits, rule.activation_bits)
        whole = all(isinstance(bits, int) for bits in asked)
        if kept.get(name) is not None and whole:
            out[name] = [asked]
            continue
        ranges = []
        for candidates, own, what in zip(
            (weight_bits, activation_bits), asked, ("weight_bits", "activation_bits"), strict=True
        ):
            low, high = check_interval(candidates, what)
            low, high = (max(low, own[0]), min(high, own[1])) if isinstance(own, tuple) else (low, high)
            ranges.append(range(low, high + 1))
        out[name] = [pair for pair in itertools.product(*ranges) if _runs(layer, info, *pair)]
        if not out[name]:
            raise SpecError(
                f"layer {name!r}: no width is left of weight_bits={weight_bits}, activation_bits={activation_bits}, "
                f"the rule's {asked} and what {info.backend} computes rightly; widen them"
            )
    return out


def _runs(layer: QATLayer, info: PreparedInfo, weight_bits: int, activation_bits: int) -> bool:
    limits = info.widest(layer, weight_bits)
    return weight_bits <= limits["weight_bits"] and activation_bits <= limits["activation_bits"]


def _sides(options: dict[str, list[tuple[int, int]]]) -> dict[str, Side]:
    """Each tensor as its layer's name and place in a pair of widths."""
    return {f"{name}.{kind}": (name, side) for name in options for side, kind in enumerate((WEIGHT, INPUT))}


def _free(options: dict[str, list[tuple[int, int]]]) -> set[str]:
    return {name for name, pairs in options.items() if len(pairs) > 1}


def _ties(
    model: fx.GraphModule, sides: dict[str, Side], free: set[str], tied: Iterable[Iterable[str]], tie_readers: bool
) -> list[list[Side]]:
    """Groups of equal width, but for those in which nothing can be chosen."""
    groups = [[_side(sides, tensor) for tensor in group] for group in tied]
    groups += _readers_of_one_tensor(model) if tie_readers else []
    return [group for group in joined_ties(groups) if any(name in free for name, _ in group)]


def _side(sides: dict[str, Side], tensor: str) -> Side:
    if tensor not in sides:
        raise UnknownNameError("tensor to tie", tensor, sides)
    return sides[tensor]


def _readers_of_one_tensor(model: fx.GraphModule) -> list[list[Side]]:
    """Groups of layers' inputs that are one tensor."""
    layers = cost.qat_layers(model)
    readers: dict[fx.Node, list[Side]] = {}
    for node in model.graph.nodes:
        if node.op == "call_module" and node.target in layers:
            readers.setdefault(node.args[0], []).append((node.target, 1))
    return list(readers.values())


def _rising(row: Mapping[int, float]) -> dict[int, float]:
    """A sensitivity that never falls as bits are taken away: where it was measured to, that is noise."""
    out, most = {}, 0.0
    for bits in sorted(row, reverse=True):
        most = max(most, row[bits])
        out[bits] = most
    return out


def _largest_cut(
    program: Program, model: fx.GraphModule, found: Sensitivity, sides: dict[str, Side]
) -> tuple[Solution, float]:
    arcs = graph_arcs(model, (*found.tensors, *found.edges))
    chosen = {tensor: (sides[tensor], row) for tensor, row in found.tensors.items()}
    lowest = {tensor: row[min(row)] for tensor, row in found.tensors.items()} | found.edges
    movable = {tensor for tensor, row in found.tensors.items() if len(row) > 1}
    sinks: frozenset[str] = frozenset({SINK})
    flow = None
    while True:
        cut = minimum_cut(arcs, lowest, sinks)
        if math.isinf(cut.bits) or not cut.tensors:
            break
        if movable.intersection(cut.tensors):
            flow = Flow(arcs, found.edges, chosen, sinks)
            break
        sinks = cut.entered
    reached = program.maximise(flow).flow if flow else math.inf

    def unfairness(name: str, pair: tuple[int, int]) -> float:
        rows = (found.tensors[f"{name}.{WEIGHT}"], found.tensors[f"{name}.{INPUT}"])
        return -sum(math.log(max(row[bits], _LEAST_CAPACITY)) for row, bits in zip(rows, pair, strict=True))

    fair = dataclasses.replace(flow, at_least=reached * (1 - 1e-4)) if flow else None
    solution = program.minimise(unfairness, fair)
    capacities = {tensor: row[solution.widths[name][side]] for tensor, ((name, side), row) in chosen.items()}
    return solution, minimum_cut(arcs, capacities | found.edges, sinks if flow else {SINK}).bits
