"""Random models that look trained, images to run them on, and what is counted on any graph."""

from __future__ import annotations

import copy
import resource

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from .. import canonical
from .._torch_ao import FakeQuantizeBase

_BATCH = 4


def random_images(size: int) -> Tensor:
    """[4, 3, size, size]: smooth coloured shapes with some noise. White noise alone would pool to the same features in
    every image."""
    shapes = F.interpolate(torch.randn(_BATCH, 3, 4, 4), size=(size, size), mode="bilinear")
    return shapes + 0.5 * torch.randn(_BATCH, 3, 1, 1) + 0.5 * torch.randn(_BATCH, 3, size, size)


def settled(model: nn.Module, images: Tensor) -> nn.Module:
    """A random model that looks trained: what starts at zero is drawn, BatchNorm has the images' statistics."""
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, nn.Parameter) or weight.any():
            continue
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(weight, 0.2, 1.0)
        elif isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_uniform_(weight)
    for name, parameter in model.named_parameters():
        if name.endswith("gain") and not parameter.any():  # of weight-standardised convolutions
            nn.init.constant_(parameter, 0.5)
    norms = {m: m.momentum for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    for norm in norms:
        norm.momentum = 1.0
    model.train()
    with torch.no_grad():
        model(images)
    for norm, momentum in norms.items():
        norm.momentum = momentum
    return model


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


def peak_mb() -> float:
    """Peak memory of this process so far, in MiB."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 0)


def least_cosine(a: Tensor, b: Tensor) -> float:
    """The least cosine over images of two batches of logits [N, classes]."""
    return float(torch.cosine_similarity(a, b, dim=-1).min())
