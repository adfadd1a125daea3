"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from .errors import WriteError

_PARTIAL = ".partial"


def write_bytes(path: Path, content: bytes | memoryview) -> None:
    """Write ``content`` to a temporary file beside ``path``, to the disk itself, then move it there in one step.

    Whoever is killed at any moment, power failures included, leaves the file that was there before or the new one. A
    temporary file that a killed process left is removed by :func:`remove_partial`.

    Raises:
        WriteError: where it cannot be written, with the bytes it takes and those that are free; what was there before
            stays.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}{_PARTIAL}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):  # its folder may be what cannot be written to
            temporary.unlink()
        if isinstance(error, OSError):
            raise WriteError(_in_words(path, len(content), error)) from error
        raise
    _sync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8, whole or not at all."""
    write_bytes(path, text.encode())


def write_json(path: Path, values: Any) -> None:
    """Write ``values`` as JSON, whole or not at all."""
    write_text(path, json.dumps(values, indent=2) + "\n")


def is_partial(path: Path) -> bool:
    """Whether a file is what :func:`write_bytes` leaves in a process that is killed while it writes."""
    return path.name.startswith(".") and path.name.endswith(_PARTIAL)


def remove_partial(folder: Path) -> None:
    """Remove what processes that were killed while they wrote left in ``folder``, if there is one."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if is_partial(path):
            path.unlink(missing_ok=True)


def _in_words(path: Path, size: int, error: OSError) -> str:
    free = ""
    with contextlib.suppress(OSError):
        free = f", {shutil.disk_usage(path.parent).free:,} are free in {path.parent}"
    return (
        f"{path} cannot be written: {error.strerror or error}. It takes {size:,} bytes{free}; what was there before is "
        "unchanged"
    )


def _sync_folder(folder: Path) -> None:
    """Bring the new name to the disk, where the system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
