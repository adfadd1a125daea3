"""Where a training went wrong whose loss is no number any more."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


@torch.no_grad()
def diverged(model: nn.Module, stage: str, epoch: int, images: Tensor) -> str:
    """The message for a loss that is no number: the first module whose output is not finite."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            where = f"{name!r} holds NaN or infinity"
            break
    else:
        where = f"activations overflow, first in {_first_overflow(model, images)!r}"
    return (
        f"the loss is NaN or infinite in epoch {epoch + 1} of {stage} training: {where}. Lower train.lr or "
        "train.quantizer_lr; the last checkpoint is of the epoch before"
    )


def _first_overflow(model: nn.Module, images: Tensor) -> str:
    found: list[str] = []

    def watch(name: str) -> Callable:
        def hook(module, args, out):
            if isinstance(out, Tensor) and not found and not torch.isfinite(out).all():
                found.append(name)

        return hook

    handles = [m.register_forward_hook(watch(n)) for n, m in model.named_modules() if not list(m.children())]
    try:
        model(images)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else "the loss itself"
