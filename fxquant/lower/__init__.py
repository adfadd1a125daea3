"""Lowering: the reference integer graph to something that ships. One file a target."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import fx

from ..errors import SpecError
from ..estimators import estimators_of
from ..prepare import prepared_info
from ..spec import get_backend
from . import native, onnx, packed
from .native import LoweredLayer

if TYPE_CHECKING:
    from .inductor import InductorModel

__all__ = ["LoweredLayer", "lower", "onnx", "operators", "packed", "require_backend"]


def lower(
    reference: fx.GraphModule, backend: str | None = None, *, calibration: Iterable | None = None
) -> fx.GraphModule | InductorModel:
    """Put a reference integer graph on integer kernels, each checked against the reference as it is built.

    Args:
        reference: from :func:`fxquant.convert`; not modified.
        backend: ``x86``, ``onednn``, ``fbgemm``, ``qnnpack`` or ``inductor``; the one named at prepare by default.
        calibration: batches, of which the first is the check, and gives the shape that kernels are laid out for; the
            data given to prepare by default. Other shapes are computed rightly, too, but for ``inductor``, which takes
            another number of images and no other size.

    Returns:
        What maps float images to logits: a graph module, or for ``inductor`` a compiled program. Its
        ``meta["fxquant_lowered"]`` lists one :class:`LoweredLayer` per operator.

    Raises:
        UnknownNameError: unknown backend.
        SpecError: a model that is not converted, an engine or compiler that is missing, a backend that reads a file, or
            no batch to check against.
    """
    asked = get_backend(backend or prepared_info(reference).backend)
    if asked.reads_onnx:
        raise SpecError(
            f"backend {asked.name!r} reads a file: write it with fxquant.export_onnx(reference, path), and run it with "
            "fxquant.OnnxModel(path) or fxquant.OpenVinoModel(path)"
        )
    if estimators_of(reference):
        raise SpecError(
            f"lower was given a {type(reference).__name__} that is not converted; give it what fxquant.convert returns"
        )
    require_backend(asked.name)
    batch = native.check_batch(reference, calibration)
    if asked.compiles:
        from .inductor import InductorModel

        return InductorModel(reference, batch)
    return native.lower(reference, asked.name, batch)


def require_backend(name: str) -> None:
    """Raise where a backend cannot run here.

    Raises:
        SpecError: where this build of torch lacks an engine, or there is no compiler.
        FxQuantError: where packages are missing, with the command that installs them.
    """
    spec = get_backend(name)
    if spec.reads_onnx:
        onnx.require_packages("onnx", "onnxscript", name)
    elif spec.compiles:
        from .inductor import require_inductor

        require_inductor()
    else:
        native.require_engine(name)


def operators(lowered) -> list[LoweredLayer]:
    """What became of each operator; empty for a runtime that does not say."""
    return getattr(lowered, "meta", {}).get("fxquant_lowered", [])
