"""Small models with what networks are made of, and trained-looking BatchNorm statistics."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


class TinyResidual(nn.Module):
    """conv-bn-relu stem, max pool, a residual block with a strided shortcut, pooled classifier. Input [N, 3, H, W]."""

    def __init__(self, channels: int = 8, classes: int = 5):
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.pool = nn.MaxPool2d(2)
        self.conv1 = nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(2 * channels)
        self.drop = nn.Identity()
        self.conv2 = nn.Conv2d(2 * channels, 2 * channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(2 * channels)
        self.shortcut = nn.Conv2d(channels, 2 * channels, 1, stride=2)
        self.head = nn.Linear(2 * channels, classes)

    def forward(self, x):
        x = self.pool(self.relu(self.bn(self.stem(x))))
        out = self.relu(self.drop(self.bn1(self.conv1(x))))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return self.head(F.adaptive_avg_pool2d(F.relu(out), 1).flatten(1))


class TinyMobile(nn.Module):
    """Depthwise and pointwise convolutions, a two-sided activation (hardswish), a concatenation. Input [N, 3, H, W]."""

    def __init__(self, channels: int = 8, classes: int = 5):
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, stride=2, padding=1)
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.bn = nn.BatchNorm2d(channels)
        self.pointwise = nn.Conv2d(channels, channels, 1)
        self.head = nn.Linear(2 * channels, classes)

    def forward(self, x):
        x = F.hardswish(self.stem(x))
        y = F.relu(self.bn(self.depthwise(x)))
        x = torch.cat([x, self.pointwise(y)], 1)
        return self.head(x.mean((2, 3)))


def smooth_images(count: int) -> torch.Tensor:
    """Random images whose neighbouring pixels are alike, [count, 3, 16, 16]; always the same."""
    torch.manual_seed(0)
    return F.interpolate(torch.randn(count, 3, 4, 4), size=16, mode="bilinear")


def settle(model: nn.Module, images: torch.Tensor) -> nn.Module:
    """Give BatchNorm varied affine parameters and statistics that fit ``images``; returns the model in eval mode."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.affine:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
    model.train()
    with torch.no_grad():
        for _ in range(20):
            model(images)
    return model.eval()
