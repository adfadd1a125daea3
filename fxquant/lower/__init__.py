"""Lowering: the reference integer graph to something that ships. One file a target."""

from . import packed
from .native import LoweredLayer, lower, require_engine

__all__ = ["LoweredLayer", "lower", "packed", "require_engine"]
