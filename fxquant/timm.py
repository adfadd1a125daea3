"""timm, importable also where torchvision's compiled extension does not load, with fxquant's own models registered.

torchvision's wheels on PyPI are linked to CUDA. Next to a CPU build of torch their extension cannot load, and
torchvision 0.28 then fails on import for want of the schemas of two operators (pytorch/vision#9085). Importing
this module first defines those schemas, and nothing else, exactly then; on a healthy installation it does nothing.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

import torch

from .models import CifarResNet

_OPERATORS = ("nms", "qnms")
_MISSING = "torchvision::nms does not exist"
_library: torch.library.Library | None = None  # a Library is undone when it is collected


def _import_torchvision() -> None:
    global _library
    if "torchvision" in sys.modules:
        return
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if _MISSING not in str(error):
            raise
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        _library = torch.library.Library("torchvision", "FRAGMENT")
        for operator in _OPERATORS:
            _library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        importlib.import_module("torchvision")


_import_torchvision()

from timm import create_model, list_models  # noqa: E402
from timm.data import create_dataset, create_transform, resolve_model_data_config  # noqa: E402
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD  # noqa: E402
from timm.models import build_model_with_cfg, generate_default_cfgs, load_checkpoint, register_model  # noqa: E402
from timm.optim import create_optimizer_v2  # noqa: E402

__all__ = [
    "create_dataset",
    "create_model",
    "create_optimizer_v2",
    "create_transform",
    "list_models",
    "load_checkpoint",
    "resolve_model_data_config",
]

default_cfgs = generate_default_cfgs(  # under this name timm looks for them when a model is registered
    {
        "resnet20.untrained": {
            "num_classes": 10,
            "input_size": (3, 32, 32),
            "crop_pct": 1.0,
            "interpolation": "bilinear",
            "mean": IMAGENET_DEFAULT_MEAN,
            "std": IMAGENET_DEFAULT_STD,
            "first_conv": "conv1",
            "classifier": "linear",
        }
    }
)


@register_model
def resnet20(pretrained: bool = False, **options: Any) -> CifarResNet:
    """ResNet-20 of He et al. (2016) for CIFAR-10, see :mod:`fxquant.models`; there are no pretrained weights."""
    return build_model_with_cfg(CifarResNet, "resnet20", pretrained, **options)
