"""The integer linear program of bit allocation, solved by SciPy's HiGHS.

Each layer takes one of its options, a pair (weight bits, activation bits), which is a binary variable of its own:
whatever depends on both widths, such as bit operations, is linear in them. A flow may be part of the program, each arc
of a quantized tensor limited by the capacity that the tensor has at the chosen width: the largest flow is the minimum
cut, so that maximising the one raises the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from .budget import BudgetBound
from .errors import SpecError
from .mincut import SOURCE, Arc

Pair = tuple[int, int]
Side = tuple[str, int]
"""A layer and which of its pair of widths: 0 the weight's, 1 the input's."""

_GAP = 1e-4  # relative, at which the search stops: far below what a sensitivity is known to
_TRIES = 4
_SCALE, _LEAST = 1e3, 1e-6  # of the objective: within these HiGHS's tolerances of 1e-7 mean nothing


@dataclass(frozen=True)
class Solution:
    """What the program came to.

    Attributes:
        widths: a pair for each layer.
        flow: bits per image that get through, where there was a flow.
        gap: by how much, relative to the objective, another choice may still be better.
    """

    widths: dict[str, Pair]
    flow: float
    gap: float


@dataclass(frozen=True)
class Flow:
    """A flow from the image to ``sinks``.

    Attributes:
        arcs: of the network.
        given: bits per image that let pass the tensors whose width is not up to choice.
        chosen: of the others, who decides and bits per image at each width. A tensor in neither is unlimited.
        sinks: vertices where the flow ends.
        at_least: bits per image that have to get there.
    """

    arcs: Sequence[Arc]
    given: Mapping[str, float]
    chosen: Mapping[str, tuple[Side, Mapping[int, float]]]
    sinks: frozenset[str]
    at_least: float = 0.0

    @property
    def unit(self) -> float:
        """The largest capacity of all: in it, figures are of order 1."""
        return max((*self.given.values(), *(max(row.values()) for _, row in self.chosen.values()), 0.0)) or 1.0


@dataclass
class Program:
    """Choose an option for each layer, within bounds and ties.

    Attributes:
        options: pairs of widths that each layer can take.
        bounds: what the choice has to keep to.
        ties: groups of which all are to have the same width.
        seconds: after which the best choice found so far is taken.
    """

    options: Mapping[str, Sequence[Pair]]
    bounds: Sequence[BudgetBound] = ()
    ties: Sequence[Sequence[Side]] = ()
    seconds: float = 10.0
    _slack: dict[str, float] = field(default_factory=dict, init=False)

    def minimise(self, value: Callable[[str, Pair], float], flow: Flow | None = None) -> Solution:
        """The choice with the smallest sum of ``value(layer, option)``; ``flow`` is a further constraint.

        Raises:
            SpecError: where no choice satisfies everything.
        """
        return self._solve(np.array([value(name, pair) for name, pair in self._columns]), flow)

    def maximise(self, flow: Flow) -> Solution:
        """The choice that lets most through, which is the one with the largest minimum cut.

        Raises:
            SpecError: where no choice satisfies everything.
        """
        return self._solve(None, flow)

    @cached_property
    def _columns(self) -> list[tuple[str, Pair]]:
        return [(name, pair) for name, pairs in self.options.items() for pair in pairs]

    @cached_property
    def _of_layer(self) -> dict[str, list[tuple[int, Pair]]]:
        out: dict[str, list[tuple[int, Pair]]] = {name: [] for name in self.options}
        for column, (name, pair) in enumerate(self._columns):
            out[name].append((column, pair))
        return out

    def _solve(self, values: np.ndarray | None, flow: Flow | None) -> Solution:
        for _ in range(_TRIES):
            solution = self._solve_once(values, flow)
            over = {b.name: b.spent(solution.widths) - b.limit for b in self.bounds if not b.holds(solution.widths)}
            if not over:
                return solution
            # HiGHS keeps to a bound but for a millionth of it: once more, with so much less to spend.
            for name, excess in over.items():
                self._slack[name] = self._slack.get(name, 0.0) + 2 * excess
        raise SpecError(f"budget {', '.join(over)} cannot be kept to the last digit; raise it by a millionth")

    def _solve_once(self, values: np.ndarray | None, flow: Flow | None) -> Solution:
        from scipy.optimize import Bounds, LinearConstraint, milp

        binary = len(self._columns)
        rows = _Rows(binary)
        for columns in self._of_layer.values():
            rows.add({column: 1.0 for column, _ in columns}, 1.0, 1.0)
        self._keep_to_bounds(rows)
        self._keep_ties(rows)
        through = None if flow is None else self._let_flow(rows, flow)
        objective, upper = np.zeros(rows.width), np.full(rows.width, np.inf)
        upper[:binary] = 1
        if values is None:
            objective[through] = -1
        else:
            scaled = _SCALE * values / (np.abs(values).max() or 1.0)
            objective[:binary] = np.where(np.abs(scaled) < _LEAST, 0.0, scaled)
        result = milp(
            objective,
            integrality=np.arange(rows.width) < binary,
            bounds=Bounds(0, upper),
            constraints=LinearConstraint(*rows.matrix()),
            options={"time_limit": self.seconds, "mip_rel_gap": _GAP},
        )
        if result.x is None and result.status == 1:
            raise SpecError(f"no widths were found in seconds={self.seconds}; give the solver more")
        if result.x is None:
            raise SpecError(
                f"no widths keep to the budget and the ties at once ({result.message.strip()}); raise the budget, "
                "allow lower widths, or give up a tie"
            )
        widths = {name: pair for (name, pair), taken in zip(self._columns, result.x, strict=False) if taken > 0.5}
        reached = 0.0 if flow is None else float(result.x[through]) * flow.unit
        return Solution(widths, reached, float(result.mip_gap or 0.0))

    # ---- rows ------------------------------------------------------------------------------------------------

    def _keep_to_bounds(self, rows: _Rows) -> None:
        """Counted above the least that each layer can spend, so that HiGHS's tolerance is a share of what is free."""
        for bound in self.bounds:
            spent = {name: {i: bound.of_layer(name, *pair) for i, pair in own} for name, own in self._of_layer.items()}
            least = {name: min(own.values()) for name, own in spent.items()}
            room = bound.limit - bound.base - sum(least.values()) - self._slack.get(bound.name, 0.0)
            above = {i: value - least[name] for name, own in spent.items() for i, value in own.items()}
            unit = abs(room) or 1.0
            for column in [i for i, value in above.items() if value > room + BudgetBound.TOLERANCE]:
                rows.add({column: 1.0}, 0.0, 0.0)  # beyond it whatever the others take
                del above[column]
            rows.add({i: value / unit for i, value in above.items()}, -np.inf, room / unit)

    def _keep_ties(self, rows: _Rows) -> None:
        for (first, side), *others in self.ties:
            for other, other_side in others:
                pairs = (*self.options[first], *self.options[other])
                for bits in sorted({width for pair in pairs for width in pair}):
                    row = {column: 1.0 for column, pair in self._of_layer[first] if pair[side] == bits}
                    for column, pair in self._of_layer[other]:
                        if pair[other_side] == bits:  # both sides of one layer may be tied: an option then cancels
                            row[column] = row.get(column, 0.0) - 1.0
                    rows.add(row, 0.0, 0.0)

    def _let_flow(self, rows: _Rows, flow: Flow) -> int:
        """Adds the variables and rows of a flow; returns the variable that is its value, in ``flow.unit``."""
        kept: dict[str, dict[int, float]] = {}  # of each vertex: what comes in less what goes on
        value = rows.variable()
        arrived = {value: -1.0}
        for arc in flow.arcs:
            if arc.tail in flow.sinks:
                continue  # what has arrived goes no further
            variable = rows.variable()
            kept.setdefault(arc.tail, {})[variable] = -1.0
            if arc.head in flow.sinks:
                arrived[variable] = 1.0
            else:
                kept.setdefault(arc.head, {})[variable] = 1.0
            if arc.tensor in flow.given:
                rows.add({variable: 1.0}, -np.inf, flow.given[arc.tensor] / flow.unit)
            elif arc.tensor in flow.chosen:
                (layer, side), bits = flow.chosen[arc.tensor]
                row = {column: -bits[pair[side]] / flow.unit for column, pair in self._of_layer[layer]}
                rows.add({variable: 1.0, **row}, -np.inf, 0.0)
        kept.pop(SOURCE, None)
        for row in kept.values():
            rows.add(row, 0.0, 0.0)
        rows.add(arrived, 0.0, 0.0)
        rows.add({value: 1.0}, flow.at_least / flow.unit, np.inf)
        return value


class _Rows:
    """A sparse matrix of constraints, built row by row; it grows a column with each further variable."""

    def __init__(self, width: int):
        self.width = width
        self._rows: list[dict[int, float]] = []
        self._low: list[float] = []
        self._high: list[float] = []

    def variable(self) -> int:
        self.width += 1
        return self.width - 1

    def add(self, row: dict[int, float], low: float, high: float) -> None:
        self._rows.append(row)
        self._low.append(low)
        self._high.append(high)

    def matrix(self):
        from scipy.sparse import csr_array

        entries = [(i, j, value) for i, row in enumerate(self._rows) for j, value in row.items()]
        at, column, values = zip(*entries, strict=True)
        return csr_array((values, (at, column)), shape=(len(self._rows), self.width)), self._low, self._high


def joined_ties(groups: Iterable[Iterable[Side]]) -> list[list[Side]]:
    """Groups that share a member, joined; those of one member left out."""
    joined: list[set[Side]] = []
    for group in groups:
        merged, apart = set(group), []
        for other in joined:
            if other & merged:
                merged |= other
            else:
                apart.append(other)
        joined = [*apart, merged]
    return [sorted(group) for group in joined if len(group) > 1]
