"""Models of other packages: torchvision's Python models also beside a torch that has none of its
operators (there is no torchvision for CPU builds), timm, which needs them, and transformers.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

import torch
from torch import nn

TORCHVISION = [
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnext50_32x4d",
    "wide_resnet50_2",
]
TIMM = ["resnet26", "resnet50", "resnet50d", "seresnet50"]
HUGGING_FACE = "hugging face resnet50"
MODELS = [*TORCHVISION, *(f"timm {name}" for name in TIMM), HUGGING_FACE]

_OPERATORS = ["roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool", "deform_conv2d"]
_library: list[torch.library.Library] = []


def torchvision() -> ModuleType:
    """torchvision; its operators are declared and nothing more where they cannot be loaded."""
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        if "nms" not in str(error):
            raise
    for name in [n for n in sys.modules if n.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "FRAGMENT")
    _library.append(library)
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    for name in _OPERATORS:
        library.define(f"{name}(Tensor x) -> Tensor")
        library.define(f"_{name}_backward(Tensor x) -> Tensor")
    return importlib.import_module("torchvision")


def make(name: str, num_classes: int = 5) -> nn.Module:
    """A model with new weights."""
    vision: Any = torchvision()
    if name == HUGGING_FACE:
        transformers = importlib.import_module("transformers")
        config = transformers.ResNetConfig(num_labels=num_classes)
        return transformers.ResNetForImageClassification(config)
    if name.startswith("timm "):
        timm = importlib.import_module("timm")
        return timm.create_model(name.removeprefix("timm "), num_classes=num_classes)
    return getattr(vision.models, name)(num_classes=num_classes)
