"""Outputs of quantizers that are computed anew in backward, rather than kept in memory until then.

A layer's backward needs the quantized input and weight. Kept, they are one more tensor a layer than float training
keeps; computed anew from what entered the quantizer, which is kept anyway, they cost a few passes over memory.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

_ATTRIBUTE = "fxquant_recomputed"


class Recomputed:
    """One output, as a function of the quantizer's input.

    The backward of the layer that reads it comes first and computes it; that of the quantizer takes it over.
    """

    def __init__(self, compute: Callable[[Tensor], Tensor]):
        self._compute = compute
        self._value: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """The output for the input ``x`` that it was first computed from, bit for bit."""
        if self._value is None:
            with torch.no_grad():
                self._value = self._compute(x)
        return self._value

    def take(self, x: Tensor) -> Tensor:
        """The same, and forget it: for the last that asks."""
        value = self(x)
        self.forget()
        return value

    def forget(self) -> None:
        self._value = None


def attach(out: Tensor, compute: Callable[[Tensor], Tensor]) -> Recomputed:
    """Let ``out`` be computed anew; for the forward of an autograd function, whose backward keeps what this returns."""
    recomputed = Recomputed(compute)
    setattr(out, _ATTRIBUTE, recomputed)
    return recomputed


@dataclass
class _Kept:
    """In the place of a saved tensor that lies in the memory of an output."""

    recomputed: Recomputed
    x: Tensor
    dtype: torch.dtype
    layout: tuple

    def restore(self) -> Tensor:
        return self.recomputed(self.x.to(self.dtype)).as_strided(*self.layout)


def recomputing(*quantized: tuple[Tensor, Tensor]) -> AbstractContextManager:
    """Context in which autograd keeps none of the outputs.

    Args:
        quantized: pairs of a quantizer's output and its input.
    """
    known = {
        out.untyped_storage().data_ptr(): (getattr(out, _ATTRIBUTE), x, out.dtype)
        for out, x in quantized
        if hasattr(out, _ATTRIBUTE)
    }
    if not known:
        return nullcontext()

    def pack(tensor: Tensor) -> Tensor | _Kept:
        found = known.get(tensor.untyped_storage().data_ptr())
        if found is None or tensor.dtype != found[2]:
            return tensor
        return _Kept(*found, (tensor.size(), tensor.stride(), tensor.storage_offset()))

    def unpack(kept: Tensor | _Kept) -> Tensor:
        return kept.restore() if isinstance(kept, _Kept) else kept

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)
