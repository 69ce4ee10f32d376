"""Networks assembled from the blocks."""

from fusedres.models.resnet import (
    FusedResNet50,
    ResNet,
    resnet18,
    resnet34,
    resnet50,
    resnet101,
    resnet152,
)

__all__ = ["FusedResNet50", "ResNet", "resnet18", "resnet34", "resnet50", "resnet101", "resnet152"]
