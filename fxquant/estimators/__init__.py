"""The estimators, one method a file. To add one: write its file, list its class here."""

from __future__ import annotations

from torch import nn

from ..errors import UnknownNameError
from .base import Bits, Estimator, LearnedStep, check_interval, check_width
from .ewgs import EWGS
from .gdnsq import GDNSQ
from .lsq import LSQ
from .nipq import NIPQ
from .pege import PEGE
from .ste import STE

ESTIMATORS: dict[str, type[Estimator]] = {cls.name: cls for cls in (EWGS, GDNSQ, LSQ, NIPQ, PEGE, STE)}

__all__ = [
    "ESTIMATORS",
    "EWGS",
    "GDNSQ",
    "LSQ",
    "NIPQ",
    "PEGE",
    "STE",
    "Bits",
    "Estimator",
    "LearnedStep",
    "check_interval",
    "check_width",
    "estimators_of",
    "get_estimator",
]


def get_estimator(name: str) -> type[Estimator]:
    """The estimator class of that name.

    Raises:
        UnknownNameError: with the nearest names.
    """
    try:
        return ESTIMATORS[name]
    except KeyError:
        raise UnknownNameError("estimator", name, ESTIMATORS) from None


def estimators_of(model: nn.Module) -> list[Estimator]:
    """The quantizers of a model, of weights and of activations, in the order of its modules."""
    return [module for module in model.modules() if isinstance(module, Estimator)]
