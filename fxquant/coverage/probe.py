"""What is counted on any graph."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from .. import canonical
from .._torch_ao import FakeQuantizeBase


def fused_norms(prepared: fx.GraphModule) -> tuple[int, int]:
    """(BatchNorms inside of convolutions, those plus the ones that could be: alone in reading what one computes)."""
    modules = dict(prepared.named_modules())
    fused = sum(isinstance(getattr(m, "bn", None), nn.BatchNorm2d) for m in modules.values())
    loose = 0
    for node in prepared.graph.nodes:
        if isinstance(modules.get(node.target), nn.BatchNorm2d) or node.target is F.batch_norm:
            source = node.all_input_nodes[0]
            alone = _one_reader(source)
            while isinstance(modules.get(source.target), FakeQuantizeBase):
                source = source.all_input_nodes[0]
                alone = alone and _one_reader(source)
            layer = modules.get(source.target)
            # Where the layer has a BatchNorm or a ReLU, what follows comes after that.
            later = getattr(layer, "bn", None) or getattr(layer, "relu", False) or "ReLU" in type(layer).__name__
            loose += isinstance(layer, nn.Conv2d) and alone and not later
    return fused, fused + loose


def _one_reader(node: fx.Node) -> bool:
    """Whether one node alone computes with a node's result; asking for its shape or dtype is not computing."""
    return sum(user.target is not getattr for user in node.users) == 1


def without_gradient(model: nn.Module) -> int:
    """Trainable parameters without a finite gradient."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    return sum(p.grad is None or not bool(torch.isfinite(p.grad).all()) for p in trainable)


def total_macs(model: nn.Module, image: Tensor) -> float:
    """Multiply-accumulates of the whole float model on one image, as torch's flop counter sees them."""
    from torch.utils.flop_counter import FlopCounterMode

    opened = copy.deepcopy(model).eval().requires_grad_(False)
    canonical.open_fused_attention(opened)  # the counter does not see inside of a fused one
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        opened(image)
    return counter.get_total_flops() / 2


def least_cosine(a: Tensor, b: Tensor) -> float:
    """The least cosine over images of two batches of logits [N, classes]."""
    return float(torch.cosine_similarity(a, b, dim=-1).min())
