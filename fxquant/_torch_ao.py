"""The one seam to torch.ao: every name of it that fxquant leans on is imported here, and nowhere else.

torch.ao's FX mode is announced for removal (pytorch/ao#2259). When it goes, this file says what has to be
replaced. A name that has moved fails here, at import, with the version of torch that was found.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

import torch

try:
    import torch.ao.nn.intrinsic as nni
    import torch.ao.nn.intrinsic.quantized as nniq
    import torch.ao.nn.quantized as nnq
    import torch.ao.nn.quantized.reference as nnqr
    from torch.ao.quantization import (
        FakeQuantizeBase,
        FusedMovingAvgObsFakeQuantize,
        MovingAverageMinMaxObserver,
        MovingAveragePerChannelMinMaxObserver,
        QConfig,
        QConfigMapping,
        disable_fake_quant,
        disable_observer,
        get_default_qat_qconfig_mapping,
    )
    from torch.ao.quantization._learnable_fake_quantize import _LearnableFakeQuantize as LearnableFakeQuantize
    from torch.ao.quantization.backend_config import (
        BackendConfig,
        BackendPatternConfig,
        DTypeConfig,
        ObservationType,
        get_native_backend_config,
    )
    from torch.ao.quantization.fx import _lower_to_native_backend
    from torch.ao.quantization.fx.fuse import fuse
    from torch.ao.quantization.fx.prepare import prepare as insert_quantizers
    from torch.ao.quantization.qconfig import qconfig_equals
    from torch.ao.quantization.quantize_fx import convert_fx, convert_to_reference_fx, prepare_qat_fx

    # Which quantized module replaces which reference module in convert_fx (private; layers_torch_ao.py
    # adds the two that re-quantize their own input).
    STATIC_LOWER_MODULE_MAP = _lower_to_native_backend.STATIC_LOWER_MODULE_MAP
    STATIC_LOWER_FUSED_MODULE_MAP = _lower_to_native_backend.STATIC_LOWER_FUSED_MODULE_MAP
except (ImportError, AttributeError) as error:  # pragma: no cover - only with an untested torch
    raise ImportError(
        f"fxquant needs torch.ao's FX quantization as shipped in torch 2.13 to 2.15; torch {torch.__version__} "
        f"lacks a name of it ({error}). Install torch>=2.13,<2.16"
    ) from error

__all__ = [
    "STATIC_LOWER_FUSED_MODULE_MAP",
    "STATIC_LOWER_MODULE_MAP",
    "BackendConfig",
    "BackendPatternConfig",
    "DTypeConfig",
    "FakeQuantizeBase",
    "FusedMovingAvgObsFakeQuantize",
    "LearnableFakeQuantize",
    "MovingAverageMinMaxObserver",
    "MovingAveragePerChannelMinMaxObserver",
    "ObservationType",
    "QConfig",
    "QConfigMapping",
    "convert_fx",
    "convert_to_reference_fx",
    "deprecations_silenced",
    "disable_fake_quant",
    "disable_observer",
    "get_default_qat_qconfig_mapping",
    "get_native_backend_config",
    "nni",
    "nniq",
    "nnq",
    "nnqr",
    "prepare_captured",
    "prepare_qat_fx",
    "qconfig_equals",
    "register_decomposed",
]


def prepare_captured(
    model: torch.fx.GraphModule, mapping: QConfigMapping, example_inputs: tuple, backend_config: BackendConfig
) -> torch.fx.GraphModule:
    """``prepare_qat_fx`` for a graph that is captured already: the same steps, without tracing it once more.

    Tracing again would enter the modules that were kept opaque, and fails on what only real values can capture.
    """
    fused = fuse(model, True, backend_config=backend_config)
    scopes = {node.name: ("", type(None)) for node in fused.graph.nodes}
    return insert_quantizers(fused, mapping, True, scopes, example_inputs, backend_config=backend_config)


def register_decomposed() -> None:
    """Make ``torch.ops.quantized_decomposed`` known, by which exported programs say quantize and dequantize."""
    import torch.ao.quantization.fx._decomposed  # noqa: F401 - the import registers them


@contextlib.contextmanager
def deprecations_silenced() -> Iterator[None]:
    """Within it, torch.ao's notices of its own removal are not repeated at every call."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"torch\.ao\.quantization is deprecated")
        warnings.filterwarnings("ignore", message=r"torch\.quantize_per_tensor")
        yield
