"""Predictions of a model, and how many of them are right."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..data import Loader
from ..distributed import gathered


@torch.no_grad()
def predictions(model: nn.Module, batches: Loader) -> tuple[Tensor, Tensor]:
    """The argmax of each image, and its label, [N] each.

    In :func:`fxquant.distributed.whole_batch` each process runs its share of the images, and all get what all found.
    """
    device = next(model.parameters()).device
    none = torch.zeros(0, dtype=torch.int64, device=device)
    pairs = [(none, none)]
    for images, labels in batches:
        if len(images):  # there may be fewer than processes
            pairs.append((model(images.to(device)).argmax(-1), labels.to(device)))
    return tuple(torch.cat(gathered(torch.cat(part))).cpu() for part in zip(*pairs, strict=True))


def accuracy_of(model: nn.Module, batches: Loader) -> tuple[float, int]:
    """Per cent of images that a model classifies rightly, and the number of images."""
    predicted, labels = predictions(model, batches)
    return accuracy(predicted, labels), len(labels)


def accuracy(predicted: Tensor, labels: Tensor) -> float:
    """Per cent of images whose argmax is their label."""
    return 100 * float((predicted == labels).double().mean())
