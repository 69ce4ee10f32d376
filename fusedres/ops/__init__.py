"""The contract of each op: checks, schema, fake, autograd Function, public function, kernel
look-up.

The tensors that an op hands to a kernel are checked, on one device, dense and in one memory format.
"""

from fusedres.ops.add_relu import add_relu
from fusedres.ops.batch_norm import batch_norm
from fusedres.ops.bn_act import bn_act
from fusedres.ops.bn_relu_maxpool import bn_relu_maxpool
from fusedres.ops.conv_act import conv_act
from fusedres.ops.conv_bn import conv_bn
from fusedres.ops.conv_bn_relu_maxpool import conv_bn_relu_maxpool

__all__ = [
    "add_relu",
    "batch_norm",
    "bn_act",
    "bn_relu_maxpool",
    "conv_act",
    "conv_bn",
    "conv_bn_relu_maxpool",
]
