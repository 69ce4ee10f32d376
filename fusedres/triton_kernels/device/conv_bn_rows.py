"""Rows: which one of the input a row of the output of a strided 1x1 convolution reads, and in what
order a kernel goes over them.
"""

import triton
import triton.language as tl


@triton.jit
def walked(i, n, down):
    """The i-th of n chunks: from the first one on, or if `down` from the last one.

    Forward kernels go in turns, dgrad up and wgrad down, so that each starts on what the one before
    left in L2.
    """
    return tl.where(down != 0, n - 1 - i, i)


@triton.jit
def input_row(m, H, W, OH, OW, SH: tl.constexpr, SW: tl.constexpr):
    """Row of [N, H, W] under row m of [N, OH, OW]."""
    if SH == 1 and SW == 1:
        return m
    else:
        image = m // (OH * OW)
        return (image * H + m // OW % OH * SH) * W + m % OW * SW
