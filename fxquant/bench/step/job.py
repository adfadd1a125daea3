"""One training step to be measured: the model, its batch, how it is timed, and who takes part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ...errors import SpecError, UnknownNameError
from ...estimators import get_estimator
from ...grid import check_bits

FLOAT = "float"
FUSED, LEARNABLE = "torch.ao fused", "torch.ao learnable"
PEERS = (FUSED, LEARNABLE)
ESTIMATORS = ("lsq", "pege", "gdnsq", "nipq")
"""What is measured when no estimator is named."""

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class StepJob:
    """What a worker has to know.

    Attributes:
        model: timm's name.
        image_size: pixels a side; the model's own when 0.
        batch: images a step.
        bits: width of all layers but the first and the last, which have 8.
        threads: of torch.
        seed: of weights, images, labels and the order of bursts.
        autocast: key of :data:`AUTOCAST`, or empty for float32.
        device: ``cpu``, ``cuda``, ``cuda:1`` ...
        compiled: whether our quantizers run compiled (:func:`fxquant.compiled_quantizers`).
        channels_last: whether images and convolutions lie so in memory.

    Raises:
        SpecError, UnknownNameError: for what cannot be measured.
    """

    model: str
    image_size: int = 0
    batch: int = 32
    bits: int = 4
    threads: int = 1
    seed: int = 0
    autocast: str = ""
    device: str = "cpu"
    compiled: bool = False
    channels_last: bool = False

    def __post_init__(self):
        check_bits(self.bits)
        for name, least in (("image_size", 0), ("batch", 2), ("threads", 1)):
            if getattr(self, name) < least:
                raise SpecError(f"{name}={getattr(self, name)} was asked for; it must be at least {least}")
        if self.autocast and self.autocast not in AUTOCAST:
            raise UnknownNameError("autocast dtype", self.autocast, AUTOCAST)
        if self.device != "cpu" and not (self.device.split(":")[0] == "cuda" and torch.cuda.is_available()):
            raise SpecError(
                f"device={self.device!r} was asked for; steps are timed on cpu or cuda, and this torch "
                f"{'has' if torch.cuda.is_available() else 'has no'} CUDA device"
            )


@dataclass(frozen=True)
class StepSettings:
    """How often it is measured.

    Args:
        rounds: bursts of each contender.
        burst: milliseconds that a burst is to take, from which its number of steps follows (one at least).

    Raises:
        SpecError: for what cannot be measured.
    """

    rounds: int = 10
    burst: float = 500.0

    def __post_init__(self):
        for name in ("rounds", "burst"):
            if getattr(self, name) < 1:
                raise SpecError(f"{name}={getattr(self, name)} was asked for; it must be at least 1")


def contenders(estimators: Sequence[str] = ESTIMATORS, *, peers: bool = True) -> list[str]:
    """Names of all rows: float, torch.ao's two with ``peers``, then estimators.

    Raises:
        UnknownNameError: for an estimator that does not exist.
    """
    for name in estimators:
        get_estimator(name)
    return [FLOAT, *(PEERS if peers else ()), *dict.fromkeys(estimators)]
