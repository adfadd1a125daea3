"""What torch.ao's own ``convert_to_reference_fx`` and ``convert_fx`` turn our layers into.

torch.ao's reference and native layers clamp at 8 bits whatever the width, and know of no quantizer inside of a
layer. These subclasses re-quantize their input to the layer's own width first, in the arithmetic of training, so
that torch's plain convert functions are right below 8 bits as well.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import grid
from ._torch_ao import STATIC_LOWER_FUSED_MODULE_MAP, STATIC_LOWER_MODULE_MAP, nniq, nnq, nnqr
from .layers import ConvReLU2d, LinearReLU


class _ReferenceInput:
    """Mixin: float32 in, quantized to the layer's own width and back, then torch.ao's reference layer."""

    @classmethod
    def from_float(cls, float_layer, weight_qparams):
        layer = super().from_float(float_layer, weight_qparams)
        layer.__class__ = cls  # torch's Linear names its own class here
        layer.input_quantize = float_layer.input_quantize
        return layer

    def forward(self, x: Tensor) -> Tensor:
        entry = self.input_quantize
        if entry is not None:
            x = grid.dequantize(entry(x), entry.scale, entry.zero_point)
        return super().forward(x)


class ReferenceConv2d(_ReferenceInput, nnqr.Conv2d):
    """torch.ao's reference Conv2d behind the layer's own input quantizer."""


class ReferenceLinear(_ReferenceInput, nnqr.Linear):
    """torch.ao's reference Linear behind the layer's own input quantizer."""


class _NativeInput:
    """Mixin: quint8 in, re-quantized to the layer's own width, then torch.ao's integer kernel."""

    @classmethod
    def from_reference(cls, reference, output_scale, output_zero_point):
        layer = super().from_reference(reference, output_scale, output_zero_point)
        inner = reference[0] if isinstance(reference, (ConvReLU2d, LinearReLU)) else reference
        layer.input_quantize = inner.input_quantize
        return layer

    def forward(self, x: Tensor) -> Tensor:
        entry = self.input_quantize
        if entry is not None:
            codes = entry(x.dequantize())
            x = torch._make_per_tensor_quantized_tensor(codes, float(entry.scale), int(entry.zero_point))
        return super().forward(x)


class NativeConv2d(_NativeInput, nnq.Conv2d):
    """torch.ao's quantized Conv2d behind the layer's own input quantizer."""


class NativeConvReLU2d(_NativeInput, nniq.ConvReLU2d):
    """torch.ao's quantized Conv2d + ReLU behind the layer's own input quantizer."""


class NativeLinear(_NativeInput, nnq.Linear):
    """torch.ao's quantized Linear behind the layer's own input quantizer."""


class NativeLinearReLU(_NativeInput, nniq.LinearReLU):
    """torch.ao's quantized Linear + ReLU behind the layer's own input quantizer."""


STATIC_LOWER_MODULE_MAP.update({ReferenceConv2d: NativeConv2d, ReferenceLinear: NativeLinear})
STATIC_LOWER_FUSED_MODULE_MAP.update(
    {
        ConvReLU2d: (ReferenceConv2d, NativeConvReLU2d),
        LinearReLU: (ReferenceLinear, NativeLinearReLU),
    }
)
