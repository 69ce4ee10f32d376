"""Networks assembled from the blocks."""

from fusedres.models.keras import from_keras
from fusedres.models.layer_names import layer_names
from fusedres.models.resnet import (
    FusedResNet50,
    ResNet,
    resnet18,
    resnet34,
    resnet50,
    resnet101,
    resnet152,
)
from fusedres.models.summary import Summary, summary

__all__ = [
    "FusedResNet50",
    "ResNet",
    "Summary",
    "from_keras",
    "layer_names",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "summary",
]
