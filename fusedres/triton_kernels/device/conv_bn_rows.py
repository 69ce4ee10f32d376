"""Which row of the input a row of the output of a strided 1x1 convolution reads."""

import triton
import triton.language as tl


@triton.jit
def input_row(m, H, W, OH, OW, SH: tl.constexpr, SW: tl.constexpr):
    """Row of [N, H, W] under row m of [N, OH, OW]."""
    if SH == 1 and SW == 1:
        return m
    else:
        image = m // (OH * OW)
        return (image * H + m // OW % OH * SH) * W + m % OW * SW
