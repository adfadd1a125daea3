"""Passes over large tensors, made few: over pieces that stay in a core's cache, or compiled into one.

A training step is bound by memory. What a quantizer computes is written here as functions of tensors of one shape and
of parameters that broadcast against it, which write their results over tensors that they are given; :func:`each` calls
them. They work in place on buffers of their own, in float, without masks (a ``torch.where`` on a mask takes five times
a multiplication). No tensor is read by the host, but for single values that are in its memory already.
"""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ..compiler import own_warnings_silenced, require_compiler

_PIECE = 1 << 17  # elements, for each thread
_SUMMED = 1 << 16  # elements, in float32

_Tensors = tuple[Tensor, ...]
_Parameters = tuple[Tensor | None, ...]

_compiles = False


@contextlib.contextmanager
def compiled_quantizers(enabled: bool = True) -> Iterator[None]:
    """Within it, quantizers in training run as kernels that torch.compile makes of them, one or two for each.

    Outputs are the same bit for bit; gradients are to rounding, since sums are taken in another order. The first step
    compiles, up to a minute; torch keeps what it has compiled for other processes of the machine. Tensors with gaps,
    or whose gradients lie in another order in memory, are computed without.

    Args:
        enabled: whether they do; otherwise, nothing is changed.

    Raises:
        SpecError: where there is no C++ compiler.
    """
    global _compiles
    if not enabled:
        yield
        return
    require_compiler("compiled quantizers were asked for")
    before, _compiles = _compiles, True
    try:
        with own_warnings_silenced():
            yield
    finally:
        _compiles = before


def each(
    function: Callable[..., None], tensors: Sequence[Tensor], parameters: Sequence[Tensor | None], *constants
) -> None:
    """Call ``function(tensors, parameters, *constants)`` on all pieces, or compiled on the whole.

    Args:
        tensors: of one shape.
        parameters: that broadcast against it, None among them.
        constants: plain values; those that change from step to step are better given as parameters.
    """
    if not tensors[0].numel():
        return
    tensors, parameters = _in_order_of_memory(tensors, parameters)
    # torch 2.13 compiles nothing that writes over a tensor with gaps, or in another order than its dimensions'.
    if not _compiles or not all(tensor.is_contiguous() for tensor in tensors):
        for some, their in pieces(tensors, parameters):
            function(some, their, *constants)
        return
    # Detached, since torch's compiler looks at the gradients of what its arguments are views of.
    tensors, parameters = _flat([t.detach() for t in tensors], [p if p is None else p.detach() for p in parameters])
    _compiled(function, len(tensors), *(None if p is None else p.ndim for p in parameters))(
        tensors, parameters, *constants
    )


def _in_order_of_memory(tensors: Sequence[Tensor], parameters: Sequence[Tensor | None]) -> tuple[_Tensors, _Parameters]:
    """The same tensors, permuted to the order of their strides where all share it, so that channels-last ones are
    contiguous; unchanged where strides differ, or per-channel parameters would not stay on the first axis."""
    first = tensors[0]
    if first.is_contiguous() or any(tensor.stride() != first.stride() for tensor in tensors):
        return tuple(tensors), tuple(parameters)
    order = sorted(range(first.ndim), key=lambda axis: -first.stride(axis))
    if not _single(parameters) and (order[0] != 0 or not _by_row(first, parameters)):
        return tuple(tensors), tuple(parameters)
    return tuple(tensor.permute(order) for tensor in tensors), tuple(parameters)


@functools.cache
def _compiled(function: Callable[..., None], *_: int | None) -> Callable[..., None]:
    """The function for arguments of one kind.

    Of a copy of its code, because torch keeps what it compiles with the code: it need not look among those of other
    kinds at every call, nor gives up where they are many.
    """
    own = types.FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
    return torch.compile(own, dynamic=True, fullgraph=True)


def pieces(tensors: Sequence[Tensor], parameters: Sequence[Tensor | None]) -> Iterator[tuple[_Tensors, _Parameters]]:
    """Slices of tensors of one shape, and of parameters that broadcast against it, that fit into a core's cache.

    What several passes are made over stays there between them, and what they need besides is small. On a device, and
    where parameters differ along other axes than the first, the whole is the only piece.
    """
    first, size = tensors[0], _PIECE * torch.get_num_threads()
    if first.device.type != "cpu" or first.numel() <= size:
        yield tuple(tensors), tuple(parameters)
    elif _single(parameters) and all(tensor.is_contiguous() for tensor in tensors):
        for slices in zip(*(tensor.view(-1).split(size) for tensor in tensors), strict=True):
            yield slices, tuple(None if p is None else p.reshape(()) for p in parameters)
    elif _single(parameters) or _by_row(first, parameters):
        rows = max(size * len(first) // first.numel(), 1)
        for begin in range(0, len(first), rows):
            part = slice(begin, begin + rows)
            narrowed = (p if p is None or p.numel() == 1 else p[part] for p in parameters)
            yield tuple(tensor[part] for tensor in tensors), tuple(narrowed)
    else:
        yield tuple(tensors), tuple(parameters)


def _flat(tensors: Sequence[Tensor], parameters: Sequence[Tensor | None]) -> tuple[_Tensors, _Parameters]:
    """Contiguous tensors in one dimension or two where that can be, so that one kernel serves tensors of any rank."""
    first = tensors[0]
    if _single(parameters):
        flat = (tensor.view(-1) for tensor in tensors)
        return tuple(flat), tuple(None if p is None else p.reshape(()) for p in parameters)
    if _by_row(first, parameters):
        flat = (tensor.view(len(first), -1) for tensor in tensors)
        return tuple(flat), tuple(
            None if p is None else p.reshape(()) if p.numel() == 1 else p.view(-1, 1) for p in parameters
        )
    return tuple(tensors), tuple(parameters)


def _single(parameters: Sequence[Tensor | None]) -> bool:
    return all(parameter is None or parameter.numel() == 1 for parameter in parameters)


def _by_row(first: Tensor, parameters: Sequence[Tensor | None]) -> bool:
    return all(p is None or p.numel() == 1 or p.shape[:1] == first.shape[:1] == (p.numel(),) for p in parameters)


def is_at_hand(value: Tensor) -> bool:
    """Whether the host can read a value without waiting for a device: a single one, in its own memory."""
    return not torch.compiler.is_compiling() and value.numel() == 1 and value.device.type == "cpu"


# ---- sums ------------------------------------------------------------------------------------------------


def sums_like(parameter: Tensor) -> Tensor:
    """Zeros, to which pieces may add what their elements come to; in float64 where they are many, for one on a CPU.

    Not compiled, which takes the whole: torch 2.13 then leaves a float64 input unchanged that float32 is added to.
    """
    return torch.zeros_like(parameter, dtype=torch.float64 if is_at_hand(parameter) and not _compiles else None)


def add_sum_(sums: Tensor, values: Tensor) -> None:
    """Add to each of ``sums`` the values that share it."""
    sums.add_(values.sum_to_size(sums.shape))


def add_product_(sums: Tensor, a: Tensor, b: Tensor) -> None:
    """Add to each of ``sums`` the products ``a·b`` that share it."""
    if is_at_hand(sums):
        sums.add_(dot(a, b))
    else:
        add_sum_(sums, a * b)


def dot(a: Tensor, b: Tensor) -> Tensor:
    """``sum(a·b)``, a float64 scalar, on a CPU: pieces in float32, without a product in memory, their sum in float64.

    So may be subtracted what nearly cancels: a piece is short enough for an error of a few parts in a million.
    """
    pairs = zip(a.reshape(-1).split(_SUMMED), b.reshape(-1).split(_SUMMED), strict=True)
    return torch.stack([torch.dot(*pair) for pair in pairs]).sum(dtype=torch.float64)
