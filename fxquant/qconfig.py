"""What torch.ao's own ``prepare_qat_fx`` takes: QConfig, QConfigMapping and BackendConfig.

"Activation" means the tensor that enters a layer, as in the papers. torch.ao attaches a QConfig's activation to
outputs instead, so here it is the 8-bit quantizer of what flows between layers, and it carries the constructor of
the layer's own input quantizer along (``layer_input``): the one place where the two views are translated.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import grid, layers_torch_ao
from ._torch_ao import (
    BackendConfig,
    BackendPatternConfig,
    DTypeConfig,
    ObservationType,
    QConfig,
    QConfigMapping,
    get_native_backend_config,
    nni,
)
from .computed import ComputedConv2d, ComputedLinear
from .estimators import LSQ, Bits, Estimator, get_estimator
from .layers import ConvReLU2d, FusedConv2d, FusedLinear, LinearReLU, QATConv2d, QATLinear
from .spec import RESIDUAL_BITS, Rule, get_backend


class EdgeFakeQuantize(LSQ):
    """The quantizer of a tensor between layers: a residual sum, a concatenation, a pooled map (learned step)."""

    name = "edge"


class OperandFakeQuantize(EdgeFakeQuantize):
    """The quantizer of an operand of a product of activations.

    Its zero-point is 0 where there are no negative values (softmax) and in the middle of the grid elsewhere, never
    learned: engines multiply no two tensors of free zero-points.
    """

    name = "operand"
    learns_zero_point = False

    def __init__(self, bits: int = RESIDUAL_BITS, **options):
        super().__init__(bits, **options)
        self.zero_fraction.requires_grad_(False)

    def set_range(self, low: Tensor, high: Tensor) -> None:
        if self.grid_scheme == "affine":
            levels = self.quant_max - self.quant_min
            below, above = (levels + 1) // 2, levels // 2  # steps on either side of 0
            step = torch.maximum(-low / below, high / max(above, 1))
            width = self._safe_width(-below * step, above * step)
            low, high = -width * below / levels, width * above / levels
        super().set_range(low, high)


def get_qat_qconfig(
    estimator: str = "lsq",
    weight_bits: Bits = 8,
    activation_bits: Bits = 8,
    *,
    per_channel: bool = True,
    init: str = "mse",
    residual_bits: int = RESIDUAL_BITS,
    options: Mapping[str, Any] | None = None,
) -> QConfig:
    """A QConfig for one kind of layer: its weight and its input at the asked widths, its output edge at 8 bits.

    Works with every setter of ``QConfigMapping``; on an operator without weights (an addition, say) only the
    8-bit edge applies.

    Args:
        estimator: ``pege``, ``gdnsq``, ``nipq``, ``ste``, ``lsq`` or ``ewgs``.
        weight_bits: 1-8, or (lowest, highest) to learn it (nipq, gdnsq).
        activation_bits: the same for the layer's input.
        per_channel: one weight scale per output channel, or one for the tensor.
        init: range initialisation: ``mse``, ``minmax`` or ``percentile``.
        residual_bits: width of the edge that carries the layer's output.
        options: the estimator's own options.

    Raises:
        UnknownNameError, SpecError: for a name, width or option that does not exist.
    """
    options = dict(options or {})
    Rule("*", weight_bits, activation_bits, estimator, per_channel, init, options)  # validates them all
    grid.check_bits(residual_bits, "residual_bits")
    make = get_estimator(estimator)
    layer_input = make.with_args(bits=activation_bits, scheme="auto", init=init, **options)
    weight = make.with_args(bits=weight_bits, scheme="symmetric", init=init, per_channel=per_channel, **options)
    return QConfig(activation=_edge(residual_bits, init, layer_input), weight=weight)


def _edge(bits: int, init: str, layer_input: Callable[[], Estimator] | None = None):
    return EdgeFakeQuantize.with_args(bits=bits, scheme="auto", init=init, layer_input=layer_input)


def edge_qconfig(bits: int = RESIDUAL_BITS, init: str = "mse") -> QConfig:
    """A QConfig for operators without weights: an edge quantizer, and no layer input."""
    return QConfig(activation=_edge(bits, init), weight=LSQ.with_args(bits=8, scheme="symmetric"))


def get_qat_qconfig_mapping(
    estimator: str = "lsq", weight_bits: Bits = 8, activation_bits: Bits = 8, **options
) -> QConfigMapping:
    """A QConfigMapping that gives every Conv2d and Linear the same :func:`get_qat_qconfig`.

    Other widths or estimators per layer are set with torch.ao's own setters::

        mapping = fxquant.get_qat_qconfig_mapping("nipq", weight_bits=4, activation_bits=4)
        mapping.set_module_name("conv1", fxquant.get_qat_qconfig("lsq", 8, 8))

    ``set_object_type(nn.Linear, ...)`` must name ``nn.ReLU`` with the same QConfig where the two are fused: torch.ao
    refuses to fuse what is configured differently.
    """
    return QConfigMapping().set_global(get_qat_qconfig(estimator, weight_bits, activation_bits, **options))


QUANTIZABLE = (nn.Conv2d, nn.Linear, ComputedConv2d, ComputedLinear)
"""Layers that get quantizers of their own."""

# What torch runs on integers besides layers. Everything else stays float between a dequantize and a quantize.
_RELU = (nn.ReLU, F.relu)
EDGE_OPERATORS = frozenset({operator.add, torch.add, operator.mul, torch.mul, torch.cat})
"""Operators whose inputs and output are carried on the 8-bit grid."""


def get_backend_config(backend: str = "x86", *, captured: bool = False) -> BackendConfig:
    """The BackendConfig that tells torch.ao which operators ``backend`` quantizes, and with which of our layers.

    Conv2d and Linear (with BatchNorm and ReLU fused) become :class:`fxquant.layers.QATConv2d` and
    :class:`~fxquant.layers.QATLinear`; additions, multiplications, concatenations, poolings and shape operators are
    torch.ao's own. Anything else stays float.

    Args:
        backend: a name of :data:`fxquant.spec.BACKENDS`; torch.ao's own convert and kernels know ``x86``, ``onednn``,
            ``fbgemm`` and ``qnnpack``.
        captured: add what :func:`fxquant.prepare` alone can use, because torch.ao's own convert has no such layers:
            ReLU6 inside of the layer before it, and layers with a computed weight.

    Raises:
        UnknownNameError: for a backend that does not exist.
    """
    get_backend(backend)
    native = get_native_backend_config()._pattern_complex_format_to_config
    config = BackendConfig(f"fxquant_{backend}")
    for pattern, pattern_config in native.items():
        if _is_edge_pattern(pattern):
            config.set_backend_pattern_config(_static_only(pattern_config))
    families = (
        (nn.Conv2d, layers_torch_ao.ReferenceConv2d, QATConv2d, ConvReLU2d, nni.ConvReLU2d),
        (nn.Linear, layers_torch_ao.ReferenceLinear, QATLinear, LinearReLU, nni.LinearReLU),
    )
    for layer, reference, qat, own_fused, fused in families:
        config.set_backend_pattern_config(
            _pattern(layer).set_root_module(layer).set_reference_quantized_module(reference).set_qat_module(qat)
        )
        config.set_backend_pattern_config(_pattern(qat).set_root_module(layer))
        config.set_backend_pattern_config(_pattern(own_fused).set_root_module(layer))
        config.set_backend_pattern_config(
            _pattern(fused).set_root_module(layer).set_reference_quantized_module(reference).set_qat_module(qat)
        )
        for relu in _RELU:
            config.set_backend_pattern_config(native[(relu, layer)])
    for fused in (nni.ConvBn2d, nni.ConvBnReLU2d):
        config.set_backend_pattern_config(_pattern(fused).set_root_module(nn.Conv2d).set_qat_module(QATConv2d))
    for pattern in ((nn.BatchNorm2d, nn.Conv2d), *((relu, (nn.BatchNorm2d, nn.Conv2d)) for relu in _RELU)):
        config.set_backend_pattern_config(native[pattern])
    if captured:
        computed = ((ComputedConv2d, QATConv2d), (ComputedLinear, QATLinear))
        for layer, qat in computed:
            config.set_backend_pattern_config(_pattern(layer).set_root_module(layer).set_qat_module(qat))
        fusions = [(layer, relu) for layer, _ in computed for relu in _RELU]
        for conv in (nn.Conv2d, ComputedConv2d):
            # With BatchNorm also where torch.ao has a fuser: that one refuses norms without gamma and beta.
            fusions += [(conv, nn.BatchNorm2d), *((conv, nn.BatchNorm2d, relu) for relu in (*_RELU, nn.ReLU6))]
            fusions += [(conv, nn.ReLU6)]
        for pattern in fusions:
            fused = FusedConv2d if pattern[0] is not ComputedLinear else FusedLinear
            config.set_backend_pattern_config(
                BackendPatternConfig(pattern).set_fuser_method(_fuser(fused)).set_fused_module(fused)
            )
        for fused, layer, qat in ((FusedConv2d, nn.Conv2d, QATConv2d), (FusedLinear, nn.Linear, QATLinear)):
            config.set_backend_pattern_config(_pattern(fused).set_root_module(layer).set_qat_module(qat))
    return config


def _fuser(fused: type[nn.Module]) -> Callable[..., nn.Module]:
    return lambda is_qat, *modules: fused(*modules)


_INTEGER_ACTIVATIONS = DTypeConfig(
    input_dtype=torch.quint8, output_dtype=torch.quint8, weight_dtype=torch.qint8, bias_dtype=torch.float
)


def _pattern(layer: type[nn.Module]) -> BackendPatternConfig:
    return (
        BackendPatternConfig(layer)
        .set_observation_type(ObservationType.OUTPUT_USE_DIFFERENT_OBSERVER_AS_INPUT)
        .set_dtype_configs([_INTEGER_ACTIVATIONS])
    )


_SHARED = frozenset(
    {
        nn.ReLU, F.relu, nn.MaxPool2d, F.max_pool2d, torch.max_pool2d, nn.AvgPool2d, F.avg_pool2d,
        nn.AdaptiveAvgPool2d, F.adaptive_avg_pool2d, "mean", torch.mean, torch.flatten, "reshape", "permute",
        "transpose", torch.transpose, "squeeze", torch.squeeze, "unsqueeze", torch.unsqueeze, nn.Dropout, F.dropout,
        nn.Identity,
    }
)  # fmt: skip


MOVES_VALUES = frozenset(
    {
        nn.MaxPool2d, F.max_pool2d, torch.max_pool2d, nn.Identity, nn.Dropout, F.dropout, nn.Flatten, torch.flatten,
        "flatten", "reshape", torch.reshape, "view", "permute", torch.permute, "transpose", torch.transpose,
        "contiguous", "squeeze", torch.squeeze, "unsqueeze", torch.unsqueeze,
    }
)  # fmt: skip
"""Operators whose results are values of their one operand, so that they commute with rounding."""


def _is_edge_pattern(pattern) -> bool:
    if isinstance(pattern, tuple):
        return len(pattern) == 2 and pattern[0] in (*_RELU, torch.relu) and pattern[1] in EDGE_OPERATORS
    return pattern in EDGE_OPERATORS or pattern in _SHARED


def _static_only(config: BackendPatternConfig) -> BackendPatternConfig:
    """torch.ao's pattern, for 8-bit static activations alone; arithmetic with a number stays float."""
    observed = dict(config._num_tensor_args_to_observation_type)
    if observed:  # torch.ao would put x and x * 0.2 on one grid
        observed[1] = ObservationType.INPUT_OUTPUT_NOT_OBSERVED
        config._set_num_tensor_args_to_observation_type(observed)
    return config.set_dtype_configs([DTypeConfig(input_dtype=torch.quint8, output_dtype=torch.quint8)])
