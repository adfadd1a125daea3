"""The integer program against brute force over all choices, with bounds, ties and flows; and its speed."""

from __future__ import annotations

import dataclasses
import itertools
import random
import time

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fxquant.budget import BudgetBound
from fxquant.errors import SpecError
from fxquant.integer_program import Flow, Program, joined_ties
from fxquant.mincut import SINK, SOURCE, Arc, minimum_cut

LAYERS = ("a", "b", "c")
PAIRS = list(itertools.product((2, 3, 5), (2, 4)))


def every_choice(options):
    names = list(options)
    return (dict(zip(names, pairs, strict=True)) for pairs in itertools.product(*options.values()))


def bops(macs: dict[str, int], limit: float) -> BudgetBound:
    return BudgetBound("bops", limit, lambda name, w, a: macs[name] * w * a)


def size(weights: dict[str, int], limit: float) -> BudgetBound:
    return BudgetBound("weight_bytes", limit, lambda name, w, a: -(-weights[name] * w // 8), base=17)


SIZES = st.fixed_dictionaries(dict.fromkeys(LAYERS, st.integers(1, 1000)))
TIES = st.sampled_from(
    [[], [[("a", 1), ("b", 1)], [("b", 0), ("c", 0)]], [[("a", 0), ("a", 1)]], [[("a", 0), ("b", 1), ("b", 0)]]]
)
LOSSES = st.fixed_dictionaries(dict.fromkeys(itertools.product(LAYERS, PAIRS), st.floats(0, 10, allow_subnormal=False)))


@given(SIZES, SIZES, LOSSES, st.floats(0.05, 1.1), st.floats(0.2, 1.1), TIES)
def test_the_best_of_all_choices_within_bounds_and_ties(macs, weights, losses, share, byte_share, ties):
    options = dict.fromkeys(LAYERS, PAIRS)
    bounds = [bops(macs, share * 20 * sum(macs.values())), size(weights, 17 + byte_share * sum(weights.values()))]
    allowed = [
        choice
        for choice in every_choice(options)
        if all(bound.holds(choice) for bound in bounds)
        and all(len({choice[layer][side] for layer, side in group}) == 1 for group in ties)
    ]
    program = Program(options, bounds, ties)
    if not allowed:
        with pytest.raises(SpecError, match="no widths keep to the budget and the ties at once"):
            program.minimise(lambda name, pair: losses[name, pair])
        return
    best = min(sum(losses[item] for item in choice.items()) for choice in allowed)
    found = program.minimise(lambda name, pair: losses[name, pair]).widths
    assert found in allowed
    assert sum(losses[item] for item in found.items()) <= best * (1 + 2e-4) + 1e-6


ARCS = [
    Arc(SOURCE, "x"), Arc("x", "a"), Arc("a", "1", "a.input"), Arc("1", "b", "b.input"), Arc("1", "c", "edge"),
    Arc("b", "+"), Arc("c", "+"), Arc("+", "2", "c.input"), Arc("2", SINK, "last"),
]  # fmt: skip


@given(
    st.fixed_dictionaries(dict.fromkeys(LAYERS, st.tuples(st.floats(0.1, 9), st.floats(0.1, 9)))),
    st.floats(0, 9), st.floats(1, 20), SIZES, st.floats(0.2, 1.0),
)  # fmt: skip
def test_the_largest_flow_is_the_largest_minimum_cut(steps, edge, last, macs, share):
    options = {name: [(8, 2), (8, 4)] for name in LAYERS}
    rows = {f"{name}.input": {2: low, 4: low + more} for name, (low, more) in steps.items()}
    bounds = [bops(macs, share * 32 * sum(macs.values()))]
    allowed = [choice for choice in every_choice(options) if bounds[0].holds(choice)]
    assume(allowed)

    def cut(choice):
        chosen = {tensor: row[choice[tensor[0]][1]] for tensor, row in rows.items()}
        return minimum_cut(ARCS, chosen | {"edge": edge, "last": last}).bits

    chosen = {tensor: ((tensor[0], 1), row) for tensor, row in rows.items()}
    flow = Flow(ARCS, {"edge": edge, "last": last}, chosen, frozenset({SINK}))
    found = Program(options, bounds).maximise(flow)
    best = max(map(cut, allowed))
    assert found.flow == pytest.approx(best, rel=1e-3)
    assert cut(found.widths) == pytest.approx(best, rel=1e-3)
    # The flow as a condition: of all choices that reach it, the one of least value.
    condition = dataclasses.replace(flow, at_least=best * (1 - 1e-3))
    cheapest = Program(options, bounds).minimise(lambda name, pair: pair[1], condition).widths
    least = min(sum(a for _, a in choice.values()) for choice in allowed if cut(choice) >= best * (1 - 1e-3))
    assert sum(a for _, a in cheapest.values()) == least


def test_a_flow_that_cannot_be_reached():
    options = {name: [(8, 2)] for name in LAYERS}
    flow = Flow(ARCS, {"last": 1.0}, {}, frozenset({SINK}), at_least=2.0)
    with pytest.raises(SpecError, match="raise the budget, allow lower widths, or give up a tie"):
        Program(options).minimise(lambda name, pair: 0.0, flow)


def test_joined_ties():
    a, b, c, d = (("abcd"[i], 1) for i in range(4))
    assert joined_ties([[a, b], [c], [c, d], [b, c]]) == [[a, b, c, d]]
    assert joined_ties([[a], [b, b]]) == []


def test_a_hundred_layers_take_less_than_ten_seconds():
    """Sizes and losses as networks have them: a few doublings of channels, losses that fall fourfold a bit."""
    drawn = random.Random(0)
    names = [f"layer{i}" for i in range(100)]
    macs = {name: drawn.choice((1, 2, 4)) * 10**6 for name in names}
    weights = {name: 4 ** drawn.randint(3, 8) for name in names}
    scale = {name: (drawn.lognormvariate(0, 1.5), drawn.lognormvariate(0, 1.5)) for name in names}
    bounds = [bops(macs, 9.5 * sum(macs.values())), size(weights, 17 + 3.1 * sum(weights.values()) / 8)]
    pairs = list(itertools.product(range(1, 9), repeat=2))
    options = dict.fromkeys(names, pairs)
    began = time.process_time()
    found = Program(options, bounds).minimise(
        lambda name, pair: sum(s * 4.0**-bits for s, bits in zip(scale[name], pair, strict=True))
    )
    assert time.process_time() - began < 10
    assert found.gap < 1e-2
    for bound in bounds:
        assert 0.98 * bound.limit <= bound.spent(found.widths) <= bound.limit


@given(
    st.lists(st.integers(1, 10**7), min_size=30, max_size=60),
    st.sampled_from([0.0, 1e-9, 1e-8, 1e-7, 1e-6, 1e-5]),
    st.integers(0, 2**16),
)
@settings(max_examples=40)
def test_a_budget_a_hair_above_the_lowest_widths_is_kept(sizes, share, seed):
    macs = {f"layer{i}": size for i, size in enumerate(sizes)}
    drawn = random.Random(seed)
    losses = {name: drawn.lognormvariate(0, 1.5) for name in macs}
    pairs = tuple(itertools.product(range(4, 9), repeat=2))
    options = dict.fromkeys(macs, pairs)
    bound = bops(macs, 16 * sum(sizes) * (1 + share))
    found = Program(options, [bound]).minimise(lambda name, pair: losses[name] * (4.0 ** -pair[0] + 4.0 ** -pair[1]))
    assert bound.holds(found.widths)
