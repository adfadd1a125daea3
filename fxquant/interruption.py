"""How ``fxquant run`` ends when it is told to, or cannot go on: what is left, and how to go on with it."""

from __future__ import annotations

import contextlib
import shlex
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

from . import checkpoint
from .errors import CheckpointError


class Terminated(KeyboardInterrupt):
    """The process was asked to end (SIGTERM)."""


STATUS = {KeyboardInterrupt: 128 + signal.SIGINT, Terminated: 128 + signal.SIGTERM}
"""Exit status of each, as a shell gives it."""


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Inside, SIGTERM ends the process as Ctrl-C does: files stay whole, and there is time for a word."""

    def stop(number, frame):
        raise Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def what_is_left(folder: Path) -> str:
    """What there is to go on from in the folder of a run that this process broke off."""
    try:
        return checkpoint.left_in(folder)
    except CheckpointError as error:
        return str(error)


def how_to_go_on(folder: Path, *changes: str) -> str:
    """What is left in the folder of a run that this process broke off, and the command that goes on with it.

    Args:
        changes: ``KEY=VALUE`` of the recipe, without which it would come to the same end.
    """
    arguments = [argument for argument in sys.argv[1:] if argument != "--resume"]
    arguments += [word for change in changes for word in ("--set", change)]
    return f"{what_is_left(folder)}. Go on with: {shlex.join(['fxquant', *arguments, '--resume'])}"
