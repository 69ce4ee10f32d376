"""Rows: which pixels of the input a row of the output reads (of a strided 1x1 convolution one, of
others a window of them), and in what order a kernel goes over them.
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


@triton.jit
def reciprocal(d):
    """What `quotient` divides by d with: 2^31 / d, rounded up."""
    d = d.to(tl.uint32)
    return (tl.full((), 0x7FFFFFFF, tl.uint32) + d) // d


@triton.jit
def quotient(t, d, inverse, WIDE: tl.constexpr):
    """t // d where t*d < 2^31, in two instructions instead of some twenty; WIDE: of any t and d."""
    if WIDE:
        return t // d
    else:
        return tl.umulhi(2 * t.to(tl.uint32), inverse).to(tl.int32)


@triton.jit
def window(
    local,  # [BM]
    oh0,
    ow0,
    OH,
    OW,
    by_oh,  # reciprocals of OH and OW
    by_ow,
    SH: tl.constexpr,
    SW: tl.constexpr,
    PT: tl.constexpr,
    PL: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Of the output's rows `local` after pixel (oh0, ow0) of an image: how many images on they are,
    and where in the input the first tap of their window lies, in the padding perhaps.
    """
    t = ow0 + local
    down = quotient(t, OW, by_ow, WIDE)
    h = oh0 + down
    image = quotient(h, OH, by_oh, WIDE)
    return image, (h - image * OH) * SH - PT, (t - down * OW) * SW - PL


@triton.jit
def within(top, left, H, W):
    """Whether (top, left) is a pixel of an H by W map."""
    return (top.to(tl.uint32) < H.to(tl.uint32)) & (left.to(tl.uint32) < W.to(tl.uint32))


@triton.jit
def zeroed(u, keep):
    """u where the bits of keep are ones, +0 where they are zeros, whatever u is."""
    if u.dtype.primitive_bitwidth == 64:
        return (u.to(tl.int64, bitcast=True) & keep.to(tl.int64)).to(u.dtype, bitcast=True)
    else:
        return (u.to(tl.int32, bitcast=True) & keep).to(u.dtype, bitcast=True)
