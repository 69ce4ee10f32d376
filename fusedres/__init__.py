"""fusedres: ResNet training with convolution, BatchNorm, ReLU and the residual add fused."""

import logging

from fusedres._version import __version__
from fusedres.backends import use_backend, use_plan
from fusedres.deferred import Deferred
from fusedres.functional import add_relu, bn_add_relu, conv_bn_relu
from fusedres.info import info
from fusedres.models import FusedResNet50, resnet18, resnet34, resnet50, resnet101, resnet152
from fusedres.nn import ConvBlock, ConvBNReLU, IdentityBlock, freeze, fuse, report, unfuse

logging.getLogger("fusedres").addHandler(logging.NullHandler())

__all__ = [
    "ConvBNReLU",
    "ConvBlock",
    "Deferred",
    "FusedResNet50",
    "IdentityBlock",
    "__version__",
    "add_relu",
    "bn_add_relu",
    "conv_bn_relu",
    "freeze",
    "fuse",
    "info",
    "report",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "unfuse",
    "use_backend",
    "use_plan",
]
