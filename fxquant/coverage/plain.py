"""The way through torch.ao as it comes: symbolic tracing, its default layers, observers and conversion.

A row's columns mean the same as on the way through fxquant, as far as torch.ao has what they tell: ``reference`` is
``convert_to_reference_fx``, the x86 model ``convert_fx``'s. Below 8 bits the observers' ranges are narrowed, in all
layers alike (torch.ao does not fuse what is configured apart), which its converted modules do not know of.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from .. import _torch_ao as ao
from . import probe
from .spending import Spending


def stages(spending: Spending, model: nn.Module, images: Tensor) -> Iterator[None]:
    """One ``yield`` a stage of :data:`~fxquant.coverage.row.STAGES` after the first."""
    row = spending.row
    warnings.simplefilter("ignore")
    before = model.eval()(images)
    model.train()
    with spending.on("prepare"):
        prepared = ao.prepare_qat_fx(copy.deepcopy(model), _mapping(row.bits), (images,))
    quantized = [m for m in prepared.modules() if hasattr(m, "weight_fake_quant")]
    row.layers = len(quantized)
    row.conv_bn_fused, row.conv_bn_total = probe.fused_norms(prepared)
    untouched = copy.deepcopy(prepared).eval().apply(ao.disable_fake_quant)
    with torch.no_grad():
        row.float_difference = float((untouched(images) - before).abs().max() / before.abs().max())
    yield

    prepared.train()
    optimizer = torch.optim.SGD(prepared.parameters(), lr=1e-4)
    with spending.on("step"):
        prepared(images).square().mean().backward()
        nn.utils.clip_grad_norm_(prepared.parameters(), 1.0)
        optimizer.step()
    row.without_gradient = probe.without_gradient(prepared)
    prepared(images)  # the step after: this is where zero gammas become NaN
    yield

    prepared.eval().apply(ao.disable_observer)
    with torch.no_grad():
        simulated = prepared(images)
    yield
    with spending.on("convert"):
        reference = ao.convert_to_reference_fx(copy.deepcopy(prepared))
    yield
    with spending.on("lower"):
        lowered = ao.convert_fx(prepared)
    yield
    macs: list[int] = []
    layers = [m for m in lowered.modules() if isinstance(m, (ao.nnq.Conv2d, ao.nnq.Linear))]
    handles = [layer.register_forward_hook(_noting(macs)) for layer in layers]
    with torch.no_grad():
        lowered(images[:1])
        for handle in handles:
            handle.remove()
        want, got = reference(images), lowered(images)
    row.integer_macs = round(min(sum(macs) / max(probe.total_macs(model, images[:1]), 1), 1.0), 4)
    row.reference_equal = torch.equal(want, simulated)
    row.agreement = 100 * float((want.argmax(-1) == got.argmax(-1)).double().mean())
    row.cosine = probe.least_cosine(got, want)
    yield


def _mapping(bits: int):
    """torch.ao's default for x86; below 8 bits with narrowed observers."""
    mapping = ao.get_default_qat_qconfig_mapping("x86")
    if bits < 8:
        activation = ao.FusedMovingAvgObsFakeQuantize.with_args(
            observer=ao.MovingAverageMinMaxObserver, quant_min=0, quant_max=2**bits - 1
        )
        top = 2 ** (bits - 1) - 1
        weight = ao.FusedMovingAvgObsFakeQuantize.with_args(
            observer=ao.MovingAveragePerChannelMinMaxObserver,
            quant_min=-top,
            quant_max=top,
            dtype=torch.qint8,
            qscheme=torch.per_channel_symmetric,
        )
        mapping.set_global(ao.QConfig(activation, weight))
    return mapping


def _noting(macs: list[int]):
    def hook(layer, args, out):
        macs.append(out.numel() * layer.weight()[0].numel())

    return hook
