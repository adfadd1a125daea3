"""Lowering: the reference integer graph to something that ships. One file a target."""

from . import onnx, packed
from .native import LoweredLayer, lower, require_engine

__all__ = ["LoweredLayer", "lower", "onnx", "packed", "require_engine"]
