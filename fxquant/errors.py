"""Every error fxquant raises on purpose: what was asked, what was seen, what to do.

All derive from :class:`FxQuantError`, so that ``except fxquant.FxQuantError`` catches exactly the mistakes a
user can mend; anything else that escapes is a defect of fxquant.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class FxQuantError(Exception):
    """Base of all errors that fxquant raises on purpose."""


class SpecError(FxQuantError, ValueError):
    """A width, scheme, budget or option that cannot be honoured."""


class UnknownNameError(FxQuantError, ValueError):
    """A name (estimator, backend, recipe key, data set, ...) that does not exist; names the nearest ones."""

    def __init__(self, kind: str, asked: str, known: Iterable[str]):
        known = sorted(known)
        super().__init__(f"unknown {kind} {asked!r}: {did_you_mean(asked, known)}")


class RuleError(FxQuantError, ValueError):
    """A rule that matches no layer of the model."""


class TraceError(FxQuantError, RuntimeError):
    """A model whose Python cannot be captured as a graph, with file and line; or that would fuse into another one."""


class NonFiniteError(FxQuantError, ValueError):
    """NaN or infinity where a range has to be measured; names the layer."""


class ConstantTensorError(FxQuantError, ValueError):
    """A tensor that is the same everywhere, so that it has no range to quantize; names the layer."""


class EmptyDataError(FxQuantError, ValueError):
    """A loader or data set that yields nothing."""


class CheckpointError(FxQuantError, RuntimeError):
    """A checkpoint that is corrupt, foreign, or of another recipe."""


class OutputFolderError(FxQuantError, RuntimeError):
    """An output folder that already holds something, or cannot be written."""


class WriteError(OutputFolderError):
    """A file that cannot be written: a full disk, a folder without permission. The one before it is unchanged."""


class DataWorkerError(FxQuantError, RuntimeError):
    """A process that read images was killed or died."""


class DivergenceError(FxQuantError, RuntimeError):
    """A training whose loss became NaN or infinite, or exploded; names the layer that went first."""


class NotFrozenError(FxQuantError, RuntimeError):
    """A prepared model that is asked for its integers before :func:`fxquant.freeze`."""


class ParityError(FxQuantError, RuntimeError):
    """A converted or lowered model that does not compute what was trained."""


def did_you_mean(asked: str, known: list[str], most: int = 5) -> str:
    """A sentence that offers the names nearest to ``asked``, or the whole list when none is near.

    >>> did_you_mean("nipk", ["gdnsq", "nipq", "pege"])
    "did you mean 'nipq'? (known: gdnsq, nipq, pege)"
    """
    near = difflib.get_close_matches(asked, known, n=most, cutoff=0.45)
    listing = ", ".join(known[:40]) + (", ..." if len(known) > 40 else "")
    if near:
        return f"did you mean {' or '.join(repr(name) for name in near)}? (known: {listing})"
    return f"known: {listing}"


def named(what: str, names: Sequence[str], shown: int = 3) -> str:
    """Names in a message: ``layers 'a', 'b', 'c' and 4 more``."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return f"{what}{'s' * (len(names) > 1)} {', '.join(map(repr, names[:shown]))}{more}"


def in_short(error: BaseException, limit: int = 300) -> str:
    """An error of another library on one line, for a message of ours: its type, then what it says, cut at ``limit``."""
    said = " ".join(str(error).split())[:limit]
    return f"{type(error).__name__}: {said}" if said else type(error).__name__
