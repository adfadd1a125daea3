"""What is asked of an FX graph in many places."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import fx, nn


def called_module(node: Any, modules: Mapping[str, nn.Module]) -> nn.Module | None:
    """The module that a node calls, of ``modules`` by name; None for other nodes, and for arguments that are none."""
    is_call = isinstance(node, fx.Node) and node.op == "call_module"
    return modules.get(node.target) if is_call else None


def unused_name(root: nn.Module, name: str) -> str:
    """``name``, or that with underscores behind it, that no attribute of ``root`` has."""
    while hasattr(root, name):
        name += "_"
    return name
