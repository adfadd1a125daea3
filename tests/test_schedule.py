"""Schedules are pure functions of the step, constant outside of their interval."""

from __future__ import annotations

import doctest
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxquant import errors, schedule
from fxquant.errors import SpecError

FACTORIES = {
    "linear": lambda steps, begin: schedule.linear(2.0, -1.0, steps, begin),
    "cosine": lambda steps, begin: schedule.cosine(2.0, -1.0, steps, begin),
    "logarithmic": lambda steps, begin: schedule.logarithmic(9.0, steps, begin),
}
ENDS = {"linear": (2.0, -1.0), "cosine": (2.0, -1.0), "logarithmic": (0.0, 1.0)}


@pytest.mark.parametrize(("module", "examples"), [(schedule, 4), (errors, 1)])
def test_doctests(module, examples):
    assert doctest.testmod(module) == (0, examples)


def test_constant():
    assert [schedule.constant(0.3)(step) for step in (-1, 0, 7)] == [0.3] * 3


@pytest.mark.parametrize("name", FACTORIES)
@given(steps=st.floats(0.5, 1e6), begin=st.floats(0, 1e6), at=st.lists(st.floats(-1, 2), min_size=2, max_size=8))
def test_shape(name, steps, begin, at):
    """Constant before and after, monotone and inside the ends between."""
    value, (start, end) = FACTORIES[name](steps, begin), ENDS[name]
    values = [value(begin + share * steps) for share in sorted(at)]
    assert values == sorted(values, reverse=end < start)
    assert all(min(start, end) <= v <= max(start, end) for v in values)
    assert value(begin) == value(begin - 5) == pytest.approx(start)
    assert value(begin + 1.001 * steps) == value(begin + 9 * steps) == pytest.approx(end)


@pytest.mark.parametrize("name", FACTORIES)
@pytest.mark.parametrize("steps", [0, 0.0])
def test_no_steps_is_a_jump(name, steps):
    """An interval of no length ends where it begins."""
    value, (start, end) = FACTORIES[name](steps, 3), ENDS[name]
    assert (value(2), value(3), value(4)) == pytest.approx((start, end, end))


@given(start=st.integers(1, 8), below=st.integers(0, 7), steps=st.integers(8, 1000))
def test_staircase(start, below, steps):
    """Every whole number between the ends, each for as many steps as another, give or take one; then the end."""
    end = max(start - below, 1)
    values = [schedule.staircase(start, end, steps)(step) for step in range(steps + 2)]
    assert values == sorted(values, reverse=True)
    assert values[steps:] == [end, end]
    counts = [values[:steps].count(bits) for bits in range(start, end, -1)]
    assert sum(counts) == (steps if start > end else 0)
    assert max(counts, default=0) - min(counts, default=0) <= 1


def test_formulas():
    half = schedule.cosine(3.0, 1.0, 10)(2.5)
    assert half == pytest.approx(1 + 2 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert schedule.linear(3.0, 1.0, 10, begin=4)(6.5) == pytest.approx(2.5)
    assert schedule.logarithmic(4.0, 10, begin=4)(6.5) == pytest.approx(math.log(2) / math.log(5))


def test_small_kappa_is_a_straight_line():
    assert schedule.logarithmic(1e-9, 10)(3) == pytest.approx(0.3, rel=1e-6)


@pytest.mark.parametrize("kappa", [0, -1.0, math.nan])
def test_refused_kappa(kappa):
    with pytest.raises(SpecError, match=r"kappa=.* was asked for; the logarithmic curriculum needs kappa > 0"):
        schedule.logarithmic(kappa, 10)
