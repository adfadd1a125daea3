"""What it was measured on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

_CPUINFO = Path("/proc/cpuinfo")
_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "amx_bf16")
_PACKAGES = ("fxquant", "torch", "timm", "onnx", "onnxruntime", "openvino", "nncf")


def machine() -> dict[str, Any]:
    """The processor, which of the instructions that matter it has, and versions of what runs."""
    text = _CPUINFO.read_text(encoding="utf-8") if _CPUINFO.exists() else ""
    return {**processor(text), "cores": os.cpu_count(), "system": platform.platform(), "versions": _versions()}


def processor(cpuinfo: str) -> dict[str, Any]:
    """Model name and instructions in the text of ``/proc/cpuinfo``; what a system without it tells otherwise."""
    fields: dict[str, str] = {}
    for line in cpuinfo.splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    present = fields.get("flags", "").split()
    return {
        "cpu": fields.get("model name") or platform.processor() or platform.machine(),
        "flags": {flag: flag in present for flag in _FLAGS} if present else {},
    }


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found
