"""Hostile input: recipes, files, tensors and models made at random, that must work or be refused by name.

A test here states what no input may do: end in an exception that fxquant did not raise on purpose, or in a result that
is silently wrong. ``FXQUANT_FUZZ=2000 pytest tests/fuzz --hypothesis-show-statistics`` tries 2000 new cases a test in
the place of the few, always the same, of the normal suite, and counts them.
"""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

CASES = int(os.environ.get("FXQUANT_FUZZ", "0"))


def cases(few: int) -> settings:
    """How many cases a test tries: ``few``, or as many new ones as FXQUANT_FUZZ says."""
    return settings(
        max_examples=CASES or few,
        derandomize=not CASES,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    )
