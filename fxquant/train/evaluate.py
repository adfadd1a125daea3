"""Predictions of a model, and how many of them are right."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..data import Loader


@torch.no_grad()
def predictions(model: nn.Module, batches: Loader) -> tuple[Tensor, Tensor]:
    """The argmax of each image, and its label, [N] each."""
    device = next(model.parameters()).device
    pairs = [(model(images.to(device)).argmax(-1).cpu(), labels) for images, labels in batches]
    return tuple(torch.cat(part) for part in zip(*pairs, strict=True))


def accuracy_of(model: nn.Module, batches: Loader) -> tuple[float, int]:
    """Per cent of images that a model classifies rightly, and the number of images."""
    predicted, labels = predictions(model, batches)
    return accuracy(predicted, labels), len(labels)


def accuracy(predicted: Tensor, labels: Tensor) -> float:
    """Per cent of images whose argmax is their label."""
    return 100 * float((predicted == labels).double().mean())
