"""Exponential moving average of a model's weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class WeightAverage:
    """Average ``d·average + (1 - d)·now`` of all floating parameters and of BatchNorm's statistics.

    After n updates ``d = min(decay, (1 + n) / (10 + n))``, so that a young average forgets where it began.

    Args:
        model: whose weights are averaged; it is not changed.
        decay: in [0, 1); 0 is the model itself.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.model, self.decay = model, decay
        self.restart()

    def restart(self) -> None:
        """Begin anew from the weights of this moment: those before mean something else (another width)."""
        self.updates = 0
        self.values = {name: tensor.detach().clone() for name, tensor in averaged(self.model).items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights of this moment."""
        keep = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        now = averaged(self.model)
        torch._foreach_lerp_(list(self.values.values()), [now[name] for name in self.values], 1 - keep)

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates, "values": self.values}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.updates = state["updates"]
        for name, tensor in self.values.items():
            tensor.copy_(state["values"][name])


def averaged(model: nn.Module) -> dict[str, Tensor]:
    """What of a model is averaged, by its name in ``state_dict()``."""
    found = {name: p.detach() for name, p in model.named_parameters() if p.is_floating_point()}
    for prefix, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            found[f"{prefix}.running_mean"] = module.running_mean
            found[f"{prefix}.running_var"] = module.running_var
    return found
