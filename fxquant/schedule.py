"""Schedules: pure functions ``step -> value``, with no state and no torch.

Each factory returns a function of the step that is constant outside of its interval, so that a schedule may be
read at any step, in any order, after a resume as well as before.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable

from .errors import SpecError

Schedule = Callable[[float], float]


def constant(value: float) -> Schedule:
    """``value`` at every step."""
    return lambda step: value


def linear(start: float, end: float, steps: float, begin: float = 0) -> Schedule:
    """``start`` until ``begin``, then a straight line to ``end`` over ``steps`` steps.

    >>> [linear(0, 1, 4)(step) for step in range(6)]
    [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
    """
    return lambda step: start + (end - start) * _fraction(step - begin, steps)


def cosine(start: float, end: float, steps: float, begin: float = 0) -> Schedule:
    """``start`` until ``begin``, then half a cosine to ``end`` over ``steps`` steps.

    >>> [round(cosine(1, 0, 4)(step), 3) for step in range(6)]
    [1.0, 0.854, 0.5, 0.146, 0.0, 0.0]
    """
    return lambda step: end + (start - end) * 0.5 * (1 + math.cos(math.pi * _fraction(step - begin, steps)))


def logarithmic(kappa: float, steps: float, begin: float = 0) -> Schedule:
    """PEGE's curriculum ``log(1 + κ·t/T) / log(1 + κ)``: 0 at the start, 1 after ``steps`` steps.

    ``kappa > 0`` sets how fast it starts; as it goes to 0 the curve becomes the straight line.

    >>> [round(logarithmic(9, 4)(step), 3) for step in range(6)]
    [0.0, 0.512, 0.74, 0.889, 1.0, 1.0]
    """
    if not 0 < kappa <= sys.float_info.max:
        raise SpecError(f"kappa={kappa!r} was asked for; the logarithmic curriculum needs kappa > 0, and finite")
    return lambda step: math.log1p(kappa * _fraction(step - begin, steps)) / math.log1p(kappa)


def staircase(start: int, end: int, steps: float) -> Schedule:
    """Whole numbers from ``start`` down to ``end`` (not above it), one at a time, each for as many of ``steps`` steps.

    >>> [staircase(4, 2, 4)(step) for step in range(6)]
    [4, 4, 3, 3, 2, 2]
    """
    return lambda step: end + math.ceil((start - end) * (1 - _fraction(step, steps)))


def require_in_time(squeeze: float, finetune: float) -> None:
    """Raises :class:`SpecError` where widths would still come down while what ships is fine-tuned."""
    if not 0 < squeeze <= 1 - finetune + 1e-9:  # shares such as 0.33 and 0.67 do not add up in binary
        raise SpecError(
            f"squeeze={squeeze!r} was asked for with finetune={finetune!r}; widths come down before they are "
            "fine-tuned, so the two shares of the steps are at most 1 together"
        )


def _fraction(step: float, steps: float) -> float:
    """How much of an interval of ``steps`` steps has passed at ``step``, in [0, 1]."""
    if steps <= 0:
        return 0.0 if step < 0 else 1.0
    return min(max(step / steps, 0.0), 1.0)
