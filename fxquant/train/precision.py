"""What layers are computed in: the type that a recipe's ``autocast`` names, where the device has it."""

from __future__ import annotations

import torch

from ..hardware import has_bfloat16


def computed_in(asked: str, device: torch.device) -> torch.dtype:
    """The type that layers are computed in on ``device``: ``asked`` (a name of torch's), or float32 where the device
    would but emulate bfloat16."""
    dtype = getattr(torch, asked)
    return torch.float32 if dtype == torch.bfloat16 and not has_bfloat16(device) else dtype
