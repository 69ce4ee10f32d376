"""The activation as every kernel computes it, in one form and one order of rounding.

The multiply-add is explicit, so that forward and a mask recomputed in backward agree to the bit
whatever the compiler would contract.
"""

import triton
import triton.language as tl


@triton.jit
def normalized(x, mean, scale, bias):
    """(x - mean)*scale + bias."""
    return tl.fma(x - mean, scale, bias)


@triton.jit
def relu(x):
    """max(x, 0); NaN stays NaN."""
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def masked(grad, a):
    """The gradient of relu whose result was a: 0 where a <= 0, so that NaN lets it through."""
    return tl.where(a <= 0.0, 0.0, grad)
