"""timm, importable also where torchvision's compiled extension does not load.

torchvision's wheels on PyPI are linked to CUDA. Next to a CPU build of torch their extension cannot load, and
torchvision 0.28 then fails on import for want of the schemas of two operators (pytorch/vision#9085). Importing
this module first defines those schemas, and nothing else, exactly then; on a healthy installation it does nothing.
"""

from __future__ import annotations

import importlib
import sys

import torch

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
from timm.optim import create_optimizer_v2  # noqa: E402

__all__ = [
    "create_dataset",
    "create_model",
    "create_optimizer_v2",
    "create_transform",
    "list_models",
    "resolve_model_data_config",
]
