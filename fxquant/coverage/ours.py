"""The way through fxquant."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..controller import param_groups
from ..convert import convert
from ..cost import quantizer_parameters
from ..freeze import freeze
from ..lower import lower, operators
from ..prepare import prepare
from ..spec import Rule
from ..verify import verify
from . import probe
from .spending import Spending


def stages(spending: Spending, model: nn.Module, images: Tensor) -> Iterator[None]:
    """One ``yield`` a stage of :data:`~fxquant.coverage.row.STAGES` after the first."""
    row = spending.row
    rules = [Rule("first|last", 8, 8), Rule("*", row.bits, row.bits)]
    with spending.on("prepare"):
        prepared = prepare(model, rules, calibration=[images])
    info = prepared.meta["fxquant"]
    row.layers, row.opaque = len(info.costs), len(info.opaque)
    row.conv_bn_fused, row.conv_bn_total = probe.fused_norms(prepared)
    row.float_difference = info.capture_difference
    quantizers = {id(p) for p in quantizer_parameters(prepared)}
    kept = sum(p.numel() for p in prepared.parameters() if id(p) not in quantizers)
    row.parameters_lost = sum(p.numel() for p in model.parameters()) - kept
    yield

    prepared.train()
    optimizer = torch.optim.SGD(param_groups(prepared, lr=1e-4, quantizer_lr=1e-4))
    with spending.on("step"):
        prepared(images).square().mean().backward()
        nn.utils.clip_grad_norm_([p for p in prepared.parameters() if p.requires_grad], 1.0)
        optimizer.step()
    row.without_gradient = probe.without_gradient(prepared)
    yield

    with spending.on("freeze"):
        freeze(prepared)
    yield
    with spending.on("convert"):
        reference = convert(prepared)
    yield
    with spending.on("lower"):
        lowered = lower(reference, "x86")
    on_kernels = {r.layer for r in operators(lowered) if r.layer and r.kernel != "reference"}
    integer = _integer_macs(reference, on_kernels, info.costs)
    row.integer_macs = round(min(integer / max(probe.total_macs(model, images[:1]), 1), 1.0), 4)
    yield
    report = verify(prepared, reference, [images], lowered={"x86": lowered})
    row.reference_equal = report.reference_equals_fake_quant
    row.agreement = report.lowered["x86"].argmax_agreement
    with torch.no_grad():
        row.cosine = probe.least_cosine(lowered(images), reference(images))
    yield


def _integer_macs(reference, on_kernels: set[str], costs: dict) -> int:
    """MACs of the layers that ``lower`` put on kernels."""
    integer = 0
    for node in reference.graph.nodes:
        if not str(node.target).endswith("_rescale"):
            continue
        name = next((n for n in costs if n.replace(".", "_") == str(node.target).removesuffix("_rescale")), None)
        if name is not None and node.name in on_kernels:
            integer += costs[name].macs
    return integer
