"""The fused ops on plain tensors, with the arguments torch.nn.functional's users expect."""

from __future__ import annotations

from torch import Tensor

from fusedres.ops.add_relu import add_relu
from fusedres.ops.batch_norm import batch_norm_act
from fusedres.ops.conv_bn import conv_bn

__all__ = ["add_relu", "bn_add_relu", "conv_bn_relu"]


def conv_bn_relu(
    x: Tensor,
    weight: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | tuple[int, int, int, int] = 0,
    training: bool = True,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    relu: bool = True,
) -> Tensor:
    """relu(batch_norm(conv2d(x, weight)) [+ residual]).

    Args:
        x: [N, C, H, W] in fp32, fp16, bf16 or fp64; autocast's dtype is used where autocast is on.
        weight: [K, C, R, S].
        bn_weight, bn_bias: [K], or None for ones and zeros.
        running_mean, running_var: [K], moved in place by `momentum` if training; read if not.
        stride: int or (height, width).
        padding: int, (height, width), or (top, bottom, left, right).
        training: normalise by this batch's mean and biased variance.
        momentum: a number, or a 0-d tensor on x's device.
        eps: added to the variance.
        residual: [N, K, OH, OW], added before the ReLU.
        relu: whether to end in ReLU.

    Returns:
        [N, K, OH, OW] in the compute dtype, in x's memory format (channels_last on a GPU).

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device, named.
        RuntimeError: the backend or plan asked for by name cannot serve these tensors.
    """
    return conv_bn(
        x,
        weight,
        bn_weight,
        bn_bias,
        running_mean,
        running_var,
        stride=stride,
        padding=padding,
        training=training,
        momentum=momentum,
        eps=eps,
        residual=residual,
        relu=relu,
    ).value()


def bn_add_relu(
    y: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    *,
    residual: Tensor | None,
    training: bool = True,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """relu(batch_norm(y) + residual).

    Args:
        y: [N, C, H, W] in fp32, fp16, bf16 or fp64; autocast's dtype is used where autocast is on.
        bn_weight, bn_bias: [C], or None for ones and zeros.
        running_mean, running_var: [C], moved in place by `momentum` if training; read if not.
        residual: [N, C, H, W], or None.
        training: normalise by this batch's mean and biased variance.
        momentum: a number, or a 0-d tensor on y's device.
        eps: added to the variance.

    Returns:
        [N, C, H, W] in the compute dtype, in y's memory format (channels_last on a GPU).

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device, named.
        RuntimeError: the backend asked for by name cannot serve these tensors.
    """
    return batch_norm_act(
        y,
        bn_weight,
        bn_bias,
        running_mean,
        running_var,
        training=training,
        momentum=momentum,
        eps=eps,
        residual=residual,
    )
