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
def rounded(u, like):
    """u as a tensor of the dtype of `like` holds it, where a small value may become zero."""
    return u.to(like.dtype).to(u.dtype)


@triton.jit
def packed(a):
    """Where a lets a gradient through, as bits: a [BM, BK] -> uint8 [BM, BK/8], the first channel
    the lowest bit.
    """
    eight = tl.reshape(tl.where(a <= 0.0, 0, 1), (a.shape[0], a.shape[1] // 8, 8))
    place = tl.arange(0, 8)[None, None, :]
    return tl.sum(eight << place, 2).to(tl.uint8)


@triton.jit
def unpacked(bits):
    """Whether a gradient goes through: uint8 [BM, BN/8] -> bool [BM, BN]."""
    place = tl.arange(0, 8)[None, None, :]
    eight = (bits.to(tl.int32)[:, :, None] >> place) & 1
    return tl.reshape(eight, (bits.shape[0], bits.shape[1] * 8)) != 0


@triton.jit
def masked(grad, a):
    """The gradient of relu whose result was a: 0 where a <= 0, so that NaN lets it through."""
    return tl.where(a <= 0.0, 0.0, grad)
