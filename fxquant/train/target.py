"""The reference graph on a backend."""

from __future__ import annotations

import warnings
from pathlib import Path

from torch import fx

from ..errors import named
from ..integer import integer_layers
from ..lower import lower, onnx
from ..lower.native import saturating_sum
from ..spec import get_backend


def lower_to(
    reference: fx.GraphModule,
    backend: str,
    onnx_file: Path,
    *,
    threads: int | None = None,
    weight_only_linear: bool = False,
    two_bit: str = "bytes",
) -> fx.GraphModule | onnx.OnnxModel | onnx.OpenVinoModel:
    """The reference on a backend: lowered, or in a runtime that reads ``onnx_file``, which is written then.

    Args:
        threads: a runtime's own, its choice when None; torch's kernels follow ``torch.set_num_threads``.
        weight_only_linear, two_bit: of :func:`fxquant.export_onnx`; where no file is written they say nothing.
    """
    if not get_backend(backend).reads_onnx:
        return lower(reference, backend)
    layers = integer_layers(reference).items()
    if wide := [name.removesuffix("_integer") for name, layer in layers if saturating_sum(layer, backend)]:
        warnings.warn(
            f"{named('layer', wide)}: sums of two products saturate at 16 bits in {backend} without VNNI instructions, "
            "so that logits may be wrong on this CPU; prepared on one like it, they would have weights of 7 bits",
            stacklevel=2,
        )
    onnx.export_onnx(reference, onnx_file, weight_only_linear=weight_only_linear, two_bit=two_bit)
    return onnx.RUNTIMES[backend](onnx_file, threads)
