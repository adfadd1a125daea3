"""The layers that train: Conv2d and Linear with their own input and weight quantizers, BatchNorm inside.

torch.ao's ``prepare_qat_fx`` swaps them in (see :func:`fxquant.get_backend_config`). A layer owns the quantizer of
its input because a QConfig has one activation field and torch.ao attaches it to outputs: "low-bit layer inputs,
8-bit residual sums" cannot be said there.

In training a layer computes ``bn(conv(fq(x), fq(w)))``, plus what rounding the folded bias to the integer grid of the
sums adds: the unfolded weight is quantized, as in the papers, and no output is ever divided by gamma. A symmetric
per-channel grid commutes with folding BatchNorm, so a frozen layer keeps the trained codes and only its scales are
folded.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from ._torch_ao import nni, qconfig_equals
from .computed import adopt_formula, effective_weight
from .errors import NonFiniteError, NotFrozenError, SpecError
from .estimators import Estimator
from .estimators.recompute import recomputing
from .integer import IntegerConv2d, IntegerLinear, Quantize, Rescale

# An int32 bias beyond this many steps would push sums out of float32's integers; only channels whose folded
# scale has all but vanished (gamma near 0) get there, and those are given a coarser scale instead.
_MAX_BIAS = 2**22


class ConvReLU2d(nni.ConvReLU2d):
    """What a frozen layer with ReLU hands to torch.ao's own convert."""


class LinearReLU(nni.LinearReLU):
    """What a frozen layer with ReLU hands to torch.ao's own convert."""


class FusedConv2d(nni._FusedModule):
    """A convolution, BatchNorm2d (or not) and ReLU or ReLU6: what torch.ao has no fused class for."""


class FusedLinear(nni._FusedModule):
    """A linear layer and ReLU: what torch.ao has no fused class for."""


class IntegerForm(NamedTuple):
    """A frozen layer in the operators of the reference graph, to be applied in this order."""

    quantize: Quantize
    layer: IntegerConv2d | IntegerLinear
    rescale: Rescale


class QATLayer(nn.Module):
    """What :class:`QATConv2d` and :class:`QATLinear` share: quantizers, folding, the integer form."""

    input_fake_quant: Estimator | None
    weight_fake_quant: Estimator
    weight: nn.Parameter
    bias: nn.Parameter | None
    bn: nn.BatchNorm2d | None
    relu: bool
    ceiling: float | None
    _channel_axis: int
    input_is_quantized = False  # by the edge it reads, whose quantizer is its own: prepare() says so

    def _adopt(self, module: nn.Module) -> None:
        """Take over parameters, BatchNorm and activation; the weight's range is set from the weight."""
        layer, rest = (module[0], list(module)[1:]) if isinstance(module, nni._FusedModule) else (module, [])
        self.weight, self.bias = layer.weight, layer.bias
        adopt_formula(self, layer)
        self.bn = next((m for m in rest if isinstance(m, nn.BatchNorm2d)), None)
        if self.bn is not None:
            self.bn._modules.clear()  # capture keeps its activation below it, which the graph calls apart
        self.relu = any(isinstance(m, (nn.ReLU, nn.ReLU6)) for m in rest)
        self.ceiling = 6.0 if any(isinstance(m, nn.ReLU6) for m in rest) else None
        # By this factor of a few parts in a million freeze() moves each output channel's scale away from ties.
        self.register_buffer("scale_shift", torch.ones(self.weight.shape[0], device=self.weight.device))
        self._set_quantizers(module.qconfig)
        self.train(module.training)

    @property
    def qconfig(self):
        return self.__dict__.get("_qconfig")

    @qconfig.setter
    def qconfig(self, qconfig) -> None:
        """torch.ao resolves regular expressions after it has swapped the layer in, and sets the result here."""
        self._qconfig = qconfig
        if qconfig is not None and not qconfig_equals(self._built_from, qconfig):
            self._set_quantizers(qconfig)

    @qconfig.deleter
    def qconfig(self) -> None:
        self._qconfig = None

    def _set_quantizers(self, qconfig) -> None:
        self._qconfig = self._built_from = qconfig
        weight_options = {"factory_kwargs": {"device": self.weight.device}}
        probe = qconfig.weight()
        if not isinstance(probe, Estimator):
            raise SpecError(
                f"the QConfig's weight is a {type(probe).__name__}; layers of fxquant's backend config need one of "
                "fxquant's estimators: use fxquant.get_qat_qconfig(...)"
            )
        if probe.per_channel:
            weight_options |= {"channels": self.weight.shape[0], "axis": 0}
        self.weight_fake_quant = qconfig.weight(**weight_options)
        edge = qconfig.activation()
        make_input = getattr(edge, "layer_input", None)
        self.input_fake_quant = make_input().to(self.weight.device) if make_input is not None else None
        for quantizer in (self.weight_fake_quant, self.input_fake_quant):
            if isinstance(quantizer, Estimator):
                quantizer.output_is_kept = True  # this layer alone reads it
        self.weight_fake_quant.initialize_from(effective_weight(self))
        self._integer: IntegerForm | None = None

    # ---- training ----------------------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        if self.frozen:
            form = self.integer_form()
            return form.rescale(form.layer(form.quantize(x)))
        given, real, bias = x, effective_weight(self), self.bias
        if self.input_fake_quant is not None and not self.input_is_quantized:
            x = self.input_fake_quant(x)
        weight = self.weight_fake_quant(real)
        if self.bn is None and self._rounds_its_bias():
            bias = bias + self.bias_rounding().to(bias.dtype)
        with recomputing((x, given), (weight, real)):
            out = self._compute(x, weight, bias)
        if self.bn is not None:
            out = self._normalise(out)
        return _activate_(out, self.relu, self.ceiling)

    def _normalise(self, out: Tensor) -> Tensor:
        """BatchNorm, whose beta takes what rounding the folded bias adds, by the statistics before this batch.

        Added to the output, it would be one more pass over memory, which takes longer than BatchNorm where channels are
        last.
        """
        if not self._rounds_its_bias():
            return self.bn(out)
        rounding = self.bias_rounding().to(self.bn.running_var.dtype)
        beta = rounding if self.bn.bias is None else self.bn.bias + rounding
        return functional_call(self.bn, {"bias": beta}, (out,))

    def _compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        raise NotImplementedError

    @property
    def frozen(self) -> bool:
        """Whether both quantizers are frozen, so that the layer computes on integers."""
        return self.input_fake_quant is not None and self.input_fake_quant._frozen and self.weight_fake_quant._frozen

    def freeze(self) -> None:
        """Fix widths, scales and zero-points for good; from here on the layer computes on integers.

        Raises:
            NonFiniteError: where a weight, a bias or a statistic is NaN or infinite: no integer means that.
        """
        where = self.weight_fake_quant.where.rpartition(".")[0] or "a layer"
        for name, tensor in (*self.named_parameters(), *self.named_buffers()):
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise NonFiniteError(
                    f"{where}: its {name!r} holds NaN or infinity, which no integer means; the training has diverged, "
                    "lower the learning rate"
                )
        if self.input_fake_quant is not None:
            self.input_fake_quant.freeze()
        self.weight_fake_quant.freeze()
        self._integer = None

    # ---- integers ----------------------------------------------------------------------------------------

    @torch.no_grad()
    def folded_scale(self) -> tuple[Tensor, Tensor, Tensor]:
        """Weight scale, real bias and sign, each [O] float64, with BatchNorm folded in.

        Folding multiplies a channel by ``f = gamma / sqrt(var + eps)``: its scale takes |f|, its codes the sign,
        its bias becomes ``beta + (b - mean)·f``. Where f is 0 the sign is 0, and so are the codes.
        """
        scale = self.weight_fake_quant.step().to(torch.float64).expand(self.weight.shape[0])
        sign = torch.ones_like(scale)
        bias = torch.zeros_like(scale) if self.bias is None else self.bias.to(torch.float64)
        if self.bn is not None:
            bn = self.bn
            factor = torch.rsqrt(bn.running_var.to(torch.float64) + bn.eps)
            if bn.weight is not None:
                factor = factor * bn.weight.to(torch.float64)
            shift = 0.0 if bn.bias is None else bn.bias.to(torch.float64)
            bias = shift + (bias - bn.running_mean.to(torch.float64)) * factor
            scale, sign = scale * factor.abs(), factor.sign()
        return scale, bias, sign

    @torch.no_grad()
    def folded(self) -> tuple[Tensor, Tensor, Tensor]:
        """Weight codes (float carrier), weight scale [O] and real bias [O], BatchNorm folded in."""
        scale, bias, sign = self.folded_scale()
        codes = self.weight_fake_quant.codes(effective_weight(self))
        return codes * sign.to(codes.dtype).reshape(-1, *[1] * (codes.ndim - 1)), scale, bias

    @torch.no_grad()
    def bias_rounding(self) -> Tensor:
        """What rounding the folded bias to whole steps of ``s_x·s_w`` adds to each output channel, [O] float32.

        At low widths that step is no trifle, so training and evaluation see it as deployment will; no gradient flows
        through it (straight-through). Channels that :meth:`integer_parameters` coarsens are left out.
        """
        scale, bias, _ = self.folded_scale()
        step = scale * self.input_fake_quant.step().to(torch.float64)
        whole = (step > 0) & (bias.abs() <= step * _MAX_BIAS)
        added = torch.round(bias / torch.where(whole, step, 1.0)) * step - bias
        return torch.where(whole, added, 0.0).to(torch.float32)

    def _rounds_its_bias(self) -> bool:
        """Whether there is a bias, and a grid of sums to round it to: both quantizers on, with their ranges set."""
        entry, weight = self.input_fake_quant, self.weight_fake_quant
        if entry is None or (self.bn is None and self.bias is None):
            return False
        return entry._initialized and entry._fake_quantize and not entry._calibrating and weight._fake_quantize

    @torch.no_grad()
    def integer_parameters(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Weight codes int8, weight scale float32 [O], bias codes int32 [O], scale of the sums float32 [O].

        The bias is ``round(b / (s_x·s_w))``. A channel whose folded scale is so small that its bias would need
        more than 22 bits gets the coarser scale at which the bias has 22, and its codes are rounded to that.
        """
        if not self.frozen:
            raise NotFrozenError(
                "the integers of a layer were asked for while its quantizers still train; call fxquant.freeze first"
            )
        codes, scale, bias = self._coarsened()
        scale = (scale * self.scale_shift).to(torch.float32)
        sum_scale = scale * self.input_fake_quant.step()
        bias_codes = torch.round(bias / sum_scale.to(torch.float64))
        return codes.to(torch.int8), scale, bias_codes.to(torch.int32), sum_scale

    def _coarsened(self) -> tuple[Tensor, Tensor, Tensor]:
        """:meth:`folded`, the scales of channels that have all but vanished raised to what their bias fits."""
        input_scale = self.input_fake_quant.step().to(torch.float64)
        codes, scale, bias = self.folded()
        coarsest = (bias.abs() / (input_scale * _MAX_BIAS)).clamp(min=torch.finfo(torch.float32).tiny * 256)
        coarsest = torch.maximum(coarsest, coarsest.new_tensor(torch.finfo(torch.float32).tiny) / input_scale)
        coarse = scale < coarsest
        view = (-1, *[1] * (codes.ndim - 1))
        codes = torch.where(coarse.reshape(view), torch.round(codes * (scale / coarsest).reshape(view)), codes)
        return codes, torch.where(coarse, coarsest, scale), bias

    def integer_form(self) -> IntegerForm:
        """The layer as operators of the reference graph; computed once, shared with :func:`fxquant.convert`."""
        if self._integer is None:
            codes, _, bias, sum_scale = self.integer_parameters()
            entry = self.input_fake_quant
            scale, zero = entry.calculate_qparams()
            bounds = entry.quant_min, entry.quant_max
            self._integer = IntegerForm(
                Quantize(scale, zero, *bounds),
                self._integer_layer(codes, bias, zero, bounds),
                Rescale(sum_scale, self._channel_axis, self.relu, self.ceiling),
            )
        return self._integer

    def _integer_layer(self, codes, bias, zero_point, bounds) -> nn.Module:
        raise NotImplementedError

    # ---- what torch.ao's own convert asks for ------------------------------------------------------------

    @torch.no_grad()
    def to_float(self) -> nn.Module:
        """The folded float layer whose weights lie on the trained grid, as torch.ao's convert expects it.

        The weight quantizer takes over the folded scale in place, because convert holds on to it.
        """
        self.freeze()
        if self.input_fake_quant is None:
            codes, scale, bias = self.folded()
            scale = scale.to(torch.float32).clamp(min=torch.finfo(torch.float32).tiny * 256)
        else:
            codes, scale, bias_codes, sum_scale = self.integer_parameters()
            bias = bias_codes.to(torch.float64) * sum_scale
        out = self._float_layer()
        view = (-1, *[1] * (codes.ndim - 1))
        out.weight = nn.Parameter(codes.to(torch.float32) * scale.reshape(view))
        out.bias = nn.Parameter(bias.to(torch.float32))
        out.input_quantize = None if self.input_fake_quant is None else self.integer_form().quantize
        out.qconfig = self.qconfig
        self.weight_fake_quant.fold(scale)
        if not self.relu:
            return out
        fused = (ConvReLU2d if isinstance(out, nn.Conv2d) else LinearReLU)(out, nn.ReLU())
        fused.qconfig = self.qconfig
        return fused

    def _float_layer(self) -> nn.Module:
        raise NotImplementedError

    def _apply(self, fn, recurse=True):
        self._integer = None
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._integer = None


class QATConv2d(QATLayer, nn.Conv2d):
    """Conv2d [N, C, H, W] with input and weight quantizers, optional BatchNorm2d and ReLU or ReLU6."""

    _channel_axis = 1

    @classmethod
    def from_float(cls, module: nn.Module, use_precomputed_fake_quant: bool = False) -> QATConv2d:
        """From an ``nn.Conv2d`` or what torch.ao's fusion or ours made of it, with a ``qconfig``."""
        conv = module[0] if isinstance(module, nni._FusedModule) else module
        check_padding(conv, "Conv2d")
        layer = cls(**_conv_arguments(conv), device="meta")
        layer._adopt(module)
        return layer

    def _compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self._conv_forward(x, weight, bias)

    def _integer_layer(self, *operands) -> IntegerConv2d:
        geometry = {name: getattr(self, name) for name in ("stride", "padding", "dilation", "groups")}
        return IntegerConv2d(*operands, **geometry)

    def _float_layer(self) -> nn.Conv2d:
        return nn.Conv2d(**{**_conv_arguments(self), "bias": True}, device="meta")


class QATLinear(QATLayer, nn.Linear):
    """Linear [..., C] with input and weight quantizers, optional ReLU."""

    _channel_axis = -1

    @classmethod
    def from_float(cls, module: nn.Module, use_precomputed_fake_quant: bool = False) -> QATLinear:
        """From an ``nn.Linear``, torch.ao's LinearReLU or our FusedLinear, with a ``qconfig``."""
        linear = module[0] if isinstance(module, nni._FusedModule) else module
        layer = cls(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        layer._adopt(module)
        return layer

    def _compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)

    def _integer_layer(self, *operands) -> IntegerLinear:
        return IntegerLinear(*operands)

    def _float_layer(self) -> nn.Linear:
        return nn.Linear(self.in_features, self.out_features, bias=True, device="meta")


def _activate_(x: Tensor, relu: bool, ceiling: float | None) -> Tensor:
    """:func:`fxquant.integer.activate` in place: no layer or norm needs its own output for backward."""
    if not relu:
        return x
    return F.relu_(x) if ceiling is None else F.hardtanh_(x, 0.0, ceiling)


def check_padding(layer: nn.Module, what: str) -> None:
    """Raises :class:`SpecError` for a convolution that pads in a way integer kernels do not; ``what`` names it."""
    if isinstance(layer, nn.Conv2d) and (layer.padding_mode != "zeros" or isinstance(layer.padding, str)):
        raise SpecError(
            f"{what} has padding={layer.padding!r}, padding_mode={layer.padding_mode!r}; integer kernels pad with "
            "zeros, by a number. Keep the layer float with Rule(name, weight_bits=None, activation_bits=None)"
        )


def _conv_arguments(conv: nn.Conv2d) -> dict:
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
    return {name: getattr(conv, name) for name in names} | {"bias": conv.bias is not None}
