"""Random models that look trained, and images to run them on."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def random_images(size: int, count: int = 4, channels: int = 3) -> Tensor:
    """[count, channels, size, size]: smooth coloured shapes with some noise. White noise alone would pool to the same
    features in every image."""
    shapes = F.interpolate(torch.randn(count, channels, 4, 4), size=(size, size), mode="bilinear")
    return shapes + 0.5 * torch.randn(count, channels, 1, 1) + 0.5 * torch.randn(count, channels, size, size)


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
