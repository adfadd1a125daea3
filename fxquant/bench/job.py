"""One model at one input size, and where the files lie that its contenders share."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Job:
    """What a worker has to know.

    Attributes:
        model: timm's name.
        options: further arguments of ``timm.create_model``.
        input_shape: (channels, height, width).
        folder: where shared files are.
        seed: of random weights and images.
        threads: of every runtime.
        wall: whether bursts are timed in wall time; CPU time of the process, all its threads, otherwise.
    """

    model: str
    input_shape: tuple[int, int, int]
    folder: str
    options: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    threads: int = 1
    wall: bool = False

    def file(self, name: str) -> Path:
        """A shared file."""
        return Path(self.folder) / name

    def images(self) -> Tensor:
        """[4, C, H, W] float32: what ranges are set from, kernels are checked on, and latency is measured on."""
        return safetensors.torch.load_file(self.file(IMAGES))["images"]

    def batch(self, size: int) -> Tensor:
        """[size, C, H, W] float32: :meth:`images` over and over."""
        images = self.images()
        return images.repeat(-(-size // len(images)), 1, 1, 1)[:size].contiguous()

    def blank_model(self) -> nn.Module:
        """The float architecture, randomly initialised."""
        from .. import timm

        return timm.create_model(self.model, pretrained=False, **self.options)

    def float_model(self) -> nn.Module:
        """The float model that all contenders compute, in eval mode."""
        model = self.blank_model()
        model.load_state_dict(safetensors.torch.load_file(self.file(FLOAT)))
        return model.eval()


IMAGES = "images.safetensors"
FLOAT = "float.safetensors"
FLOAT_ONNX = "float.onnx"
