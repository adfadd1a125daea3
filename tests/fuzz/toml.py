"""Values as TOML, whatever they are: the standard library only reads it."""

from __future__ import annotations

import datetime
import json
import math
from typing import Any


def dumps(values: dict[str, Any]) -> str:
    """A TOML document; tables are written inline."""
    return "".join(f"{_string(k)} = {value(v)}\n" for k, v in values.items())


def _string(text: str) -> str:
    return json.dumps(text, ensure_ascii=True) if text.isascii() and "\x7f" not in text else _escaped(text)


def _escaped(text: str) -> str:
    return '"' + "".join(c if c.isalnum() and c.isascii() else f"\\U{ord(c):08x}" for c in text) + '"'


def value(of: Any) -> str:
    """The TOML of one value."""
    if isinstance(of, bool):
        return str(of).lower()
    if isinstance(of, float) and not math.isfinite(of):
        return str(of)  # nan, inf and -inf are TOML's words as well
    if isinstance(of, str):
        return _string(of)
    if isinstance(of, (list, tuple)):
        return f"[{', '.join(map(value, of))}]"
    if isinstance(of, dict):
        return f"{{{', '.join(f'{_string(k)} = {value(v)}' for k, v in of.items())}}}"
    if isinstance(of, (datetime.date, datetime.time)):
        return of.isoformat()
    return repr(of)
