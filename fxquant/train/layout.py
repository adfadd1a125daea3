"""How images and the weights of convolutions lie in memory while they train."""

from __future__ import annotations

import torch
from torch import nn


def lay_out(model: nn.Module, memory_format: torch.memory_format) -> None:
    """Lay out what of a model has four dimensions, ``torch.channels_last`` or ``torch.contiguous_format``, in place.

    ``Module.to`` refuses tensors of five dimensions there. Values and parameters stay what they are.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.ndim == 4:
            tensor.data = tensor.data.contiguous(memory_format=memory_format)
