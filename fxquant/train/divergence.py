"""Where in a model a training went wrong."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor, nn

from .average import averaged


def all_finite(model: nn.Module) -> bool:
    """Whether parameters and BatchNorm's statistics are numbers; one wait for the device."""
    return bool(torch.stack([torch.isfinite(tensor).all() for tensor in averaged(model).values()]).all())


NOWHERE = "every activation is finite, the loss itself is not"
"""What is said of a model and images in which nothing is NaN or infinite."""


@torch.no_grad()
def first_not_finite(model: nn.Module, images: Tensor) -> str:
    """Which module was the first to be NaN or infinite, in words.

    Where parameters are, they became so in the backward pass of the step before, which runs from the loss to the
    images: of these layers the one nearest to the loss went first. Otherwise activations overflow, and the first module
    in the order of the forward pass went first.

    Args:
        model: in training; its statistics and ranges take the batch in.
        images: a batch, on any device.
    """
    called, overflows = _watched(model, images)
    spoilt = [name for name, p in model.named_parameters() if not torch.isfinite(p).all()]
    if spoilt:
        name = max(reversed(spoilt), key=lambda name: called.get(name.rpartition(".")[0], -1))
        return f"{name!r} holds NaN or infinity, by the gradient of the step before"
    if overflows is not None:
        return f"activations overflow, first in {overflows!r}"
    return NOWHERE


def _watched(model: nn.Module, images: Tensor) -> tuple[dict[str, int], str | None]:
    """The modules in the order in which they were called, and the first one whose output is not finite."""
    called: dict[str, int] = {}
    overflows: list[str] = []

    def watch(name: str, module: nn.Module) -> list:
        def before(module, args):
            called.setdefault(name, len(called))

        def after(module, args, out):
            if isinstance(out, Tensor) and out.is_floating_point() and not overflows and not out.isfinite().all():
                overflows.append(name)

        return [module.register_forward_pre_hook(before), module.register_forward_hook(after)]

    handles = [handle for name, module in model.named_modules() if name for handle in watch(name, module)]
    try:
        with contextlib.suppress(Exception):  # of a quantizer that makes a range or a whole width of what is no number
            model(images.to(next(model.parameters()).device))
    finally:
        for handle in handles:
            handle.remove()
    return called, overflows[0] if overflows else None


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the weights of every layer, for :func:`furthest`."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.ndim > 1}


def furthest(model: nn.Module, before: dict[str, Tensor]) -> str:
    """Which layer's weights have moved most since ``before``, as a share of their norm, in words."""
    now = dict(model.named_parameters())
    moved = {name: float((now[name].detach() - w).norm() / w.norm()) for name, w in before.items() if w.any()}
    name = max(moved, key=moved.get)
    return f"furthest from where the epoch began are the weights {name!r}, by {moved[name]:.3g} times their norm"
