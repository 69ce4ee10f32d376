"""Modules over the ops: they hold parameters in plain nn.Conv2d and nn.BatchNorm2d children and
fuse in forward.
"""

from fusedres.nn.blocks import (
    BasicBlock,
    ConvBlock,
    ConvBNReLU,
    IdentityBlock,
    Stage,
)
from fusedres.nn.frames import FromPixels
from fusedres.nn.freeze import freeze
from fusedres.nn.fuse import fuse, unfuse
from fusedres.nn.report import report

__all__ = [
    "BasicBlock",
    "ConvBNReLU",
    "ConvBlock",
    "FromPixels",
    "IdentityBlock",
    "Stage",
    "freeze",
    "fuse",
    "report",
    "unfuse",
]
