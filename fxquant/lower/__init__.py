"""Lowering: the reference integer graph to something that ships. One file a target."""

from .native import LoweredLayer, lower

__all__ = ["LoweredLayer", "lower"]
