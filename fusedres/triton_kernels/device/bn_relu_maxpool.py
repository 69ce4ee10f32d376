"""The stem's BatchNorm, ReLU and max pool in one pass each way; the activation is never stored.

    p    = maxpool(round(relu((y - mean)*scale + bias)))
    g    = gradient of (y - mean)*scale + bias, rounded;  sums = (sum g, sum g*(y - mean)) over it

Each window's gradient goes to its first maximum in row-major order, or to its last NaN. A tap that
falls into the padding reads the nearest pixel instead, which is in the window too: the maximum is
what it was, no load needs a mask, and in backward the tap goes by that pixel's place.

Forward: a program takes BM windows and BC channels. Reads y (each pixel from cache for all but its
first window), writes p: 2.5 bytes per bf16 element of y at stride 2. ReLU and rounding keep order,
so both are applied to the maximum alone.
Backward: the grid is (tiles of C, chunks of cells), a chunk being `tiles` tiles of BM cells. A cell
of the 3x3 window of stride 2 is 2x2 pixels: the 4 windows that hold any of them lie on 5x5 taps,
read and activated once each, 25 for 4 pixels; winners are taken along rows first. Any other window
has cells of one pixel, and finds the winner of each of its windows afresh. Activations are rounded
before they are compared. Nothing is added across programs but the sums, of which a program writes
one partial row. Reads y and grad, writes g: 4.5 bytes per bf16 element of y at stride 2. Saved for
backward: y, mean, scale, bias.
"""

import triton
import triton.language as tl

from fusedres.triton_kernels.device.activation import masked, normalized, relu


@triton.jit(do_not_specialize=["M", "H", "W", "OH", "OW"])
def bn_relu_maxpool_fwd_kernel(
    y_ptr,  # [N*H*W, C]
    mean_ptr,  # [C] ACC, as are the next two
    scale_ptr,
    bias_ptr,
    p_ptr,  # [M, C], M = N*OH*OW
    M,
    C,
    H,
    W,
    OH,
    OW,
    size,
    stride,
    padding,
    SIZE: tl.constexpr,  # size where the loop over taps unrolls, else 0
    ACC: tl.constexpr,
    EVEN: tl.constexpr,  # BC divides C
    BM: tl.constexpr,
    BC: tl.constexpr,
):
    across = tl.cdiv(C, BC)
    cols = tl.program_id(0) % across * BC + tl.arange(0, BC)
    inside = cols < C
    row0 = (tl.program_id(0) // across).to(tl.int64) * BM
    count = tl.minimum(M - row0, BM).to(tl.int32)
    local = tl.arange(0, BM)
    image, oh, ow = place_of(row0, tl.minimum(local, count - 1), OH, OW)
    top = oh * stride - padding
    left = ow * stride - padding
    mean = tl.load(mean_ptr + cols, mask=inside, other=0.0)[None, :]
    scale = tl.load(scale_ptr + cols, mask=inside, other=0.0)[None, :]
    bias = tl.load(bias_ptr + cols, mask=inside, other=0.0)[None, :]
    images = y_ptr + (image * (H * W) * C)[:, None] + cols[None, :]
    best = tl.full((BM, BC), float("-inf"), ACC)
    if SIZE > 0:
        for kh in tl.static_range(SIZE):
            row = tl.minimum(tl.maximum(top + kh, 0), H - 1)
            for kw in tl.static_range(SIZE):
                col = tl.minimum(tl.maximum(left + kw, 0), W - 1)
                y = tap(images, row * W + col, C, inside, EVEN).to(ACC)
                u = normalized(y, mean, scale, bias)
                best = tl.maximum(best, u, propagate_nan=tl.PropagateNan.ALL)
    else:
        for kh in range(0, size):
            row = tl.minimum(tl.maximum(top + kh, 0), H - 1)
            for kw in range(0, size):
                col = tl.minimum(tl.maximum(left + kw, 0), W - 1)
                y = tap(images, row * W + col, C, inside, EVEN).to(ACC)
                u = normalized(y, mean, scale, bias)
                best = tl.maximum(best, u, propagate_nan=tl.PropagateNan.ALL)
    p = relu(best).to(p_ptr.dtype.element_ty)
    mask = (local < count)[:, None]
    if not EVEN:
        mask = mask & inside[None, :]
    tl.store(p_ptr + row0 * C + local[:, None] * C + cols[None, :], p, mask=mask)


@triton.jit(do_not_specialize=["M", "H", "W", "OH", "OW", "CH", "CW", "tiles"])
def bn_relu_maxpool_bwd_kernel(
    grad_ptr,  # [N*OH*OW, C]
    y_ptr,  # [N*H*W, C]
    mean_ptr,  # [C] ACC, as are the next two
    scale_ptr,
    bias_ptr,
    g_ptr,  # [N*H*W, C]
    part_ptr,  # [chunks, 2, C] ACC
    M,  # cells: N*CH*CW
    C,
    H,
    W,
    OH,
    OW,
    CH,
    CW,
    tiles,
    size,
    stride,
    padding,
    CELL: tl.constexpr,  # 2 for the 3x3 window of stride 2, else 1
    SIZE: tl.constexpr,  # size where the loop over taps unrolls, else 0
    ACC: tl.constexpr,
    EVEN: tl.constexpr,  # BC divides C
    BM: tl.constexpr,
    BC: tl.constexpr,
):
    chunk = tl.program_id(1)
    cols = tl.program_id(0) * BC + tl.arange(0, BC)
    inside = cols < C
    local = tl.arange(0, BM)
    mean = tl.load(mean_ptr + cols, mask=inside, other=0.0)[None, :]
    scale = tl.load(scale_ptr + cols, mask=inside, other=0.0)[None, :]
    bias = tl.load(bias_ptr + cols, mask=inside, other=0.0)[None, :]
    s0 = tl.zeros((BM, BC), ACC)
    s1 = tl.zeros((BM, BC), ACC)
    first = chunk * tiles
    for tile in range(first, tl.minimum(first + tiles, tl.cdiv(M, BM))):
        row0 = tl.cast(tile, tl.int64) * BM
        count = tl.minimum(M - row0, BM).to(tl.int32)
        valid = local < count
        image, ch, cw = place_of(row0, tl.minimum(local, count - 1), CH, CW)
        images = y_ptr + (image * (H * W) * C)[:, None] + cols[None, :]
        grads = grad_ptr + (image * (OH * OW) * C)[:, None] + cols[None, :]
        g_at = g_ptr + (image * (H * W) * C)[:, None] + cols[None, :]
        if CELL == 2:
            # the cell's first pixel; windows (ch - 1, ch) x (cw - 1, cw) start 2 or 0 before it
            top = ch * 2 - padding
            left = cw * 2 - padding
            a00, k00, a01, k01 = row_winners(
                images, top, left, -2, H, W, C, mean, scale, bias, inside, ACC, EVEN
            )
            b0, j0, b1, j1 = row_winners(
                images, top, left, -1, H, W, C, mean, scale, bias, inside, ACC, EVEN
            )
            a00, k00 = winner(a00, k00, b0, j0)
            a01, k01 = winner(a01, k01, b1, j1)
            a10, k10, a11, k11 = row_winners(
                images, top, left, 0, H, W, C, mean, scale, bias, inside, ACC, EVEN
            )
            a00, k00 = winner(a00, k00, a10, k10)
            a01, k01 = winner(a01, k01, a11, k11)
            b0, j0, b1, j1 = row_winners(
                images, top, left, 1, H, W, C, mean, scale, bias, inside, ACC, EVEN
            )
            a10, k10 = winner(a10, k10, b0, j0)
            a11, k11 = winner(a11, k11, b1, j1)
            b0, j0, b1, j1 = row_winners(
                images, top, left, 2, H, W, C, mean, scale, bias, inside, ACC, EVEN
            )
            a10, k10 = winner(a10, k10, b0, j0)
            a11, k11 = winner(a11, k11, b1, j1)
            g00 = window_grad(grads, a00, ch - 1, cw - 1, OH, OW, C, valid, inside, ACC)
            g01 = window_grad(grads, a01, ch - 1, cw, OH, OW, C, valid, inside, ACC)
            g10 = window_grad(grads, a10, ch, cw - 1, OH, OW, C, valid, inside, ACC)
            g11 = window_grad(grads, a11, ch, cw, OH, OW, C, valid, inside, ACC)
            for pixel in tl.static_range(4):
                here = (pixel // 2) * 8 + pixel % 2 + 18  # as in row_winners
                g = tl.where(k11 == here, g11, 0.0)
                if pixel % 2 == 0:  # only even pixels are in the windows before
                    g += tl.where(k10 == here, g10, 0.0)
                if pixel // 2 == 0:
                    g += tl.where(k01 == here, g01, 0.0)
                if pixel == 0:
                    g += tl.where(k00 == here, g00, 0.0)
                row = top + pixel // 2
                col = left + pixel % 2
                exists = valid & (row >= 0) & (row < H) & (col >= 0) & (col < W)
                g, term = settle(images, g_at, g, row * W + col, exists, C, mean, inside, ACC, EVEN)
                s0 += g
                s1 += term
        else:
            # windows that hold pixel (ch, cw) are at most (size - 1)//stride before these; the
            # winner of one that does not is another pixel
            last_h = (ch + padding) // stride
            last_w = (cw + padding) // stride
            g = tl.zeros((BM, BC), ACC)
            before = (size - 1) // stride + 1
            for window in range(0, before * before):
                oh = last_h - window // before
                ow = last_w - window % before
                top = oh * stride - padding
                left = ow * stride - padding
                best = tl.full((BM, BC), float("-inf"), ACC)
                at = tl.full((BM, BC), -1, tl.int32)
                if SIZE > 0:
                    for k in tl.static_range(SIZE * SIZE):
                        best, at = next_tap(
                            best, at, images, top, left, k // SIZE, k % SIZE,
                            H, W, C, mean, scale, bias, inside, ACC, EVEN,
                        )  # fmt: skip
                else:
                    for kh in range(0, size):
                        for kw in range(0, size):
                            best, at = next_tap(
                                best, at, images, top, left, kh, kw,
                                H, W, C, mean, scale, bias, inside, ACC, EVEN,
                            )  # fmt: skip
                grad = window_grad(grads, best, oh, ow, OH, OW, C, valid, inside, ACC)
                g += tl.where(at == (ch * W + cw)[:, None], grad, 0.0)
            g, term = settle(images, g_at, g, ch * W + cw, valid, C, mean, inside, ACC, EVEN)
            s0 += g
            s1 += term
    part = part_ptr + chunk * 2 * C + cols
    tl.store(part, tl.sum(s0, 0), mask=inside)
    tl.store(part + C, tl.sum(s1, 0), mask=inside)


@triton.jit
def place_of(row0, local, height, width):
    """Image (64-bit), row and column of row0 + local in [N, height, width], row0 64-bit."""
    image = row0 // (height * width)
    at = (row0 - image * (height * width)).to(tl.int32) + local
    row = at // width
    return image + row // height, row % height, at % width


@triton.jit
def place_within(row0, local, height, width, WIDE: tl.constexpr):
    """place_of in the type of row0. WIDE: no local exceeds width, and compares do for divisions."""
    image = row0 // (height * width)
    first = (row0 - image * (height * width)).to(tl.int32)
    if WIDE:
        col = first % width + local
        over = col >= width
        row = first // width + over.to(tl.int32)
        below = row >= height
        col = tl.where(over, col - width, col)
        return image + below.to(tl.int32), tl.where(below, row - height, row), col
    else:
        row = (first + local) // width
        return image + row // height, row % height, (first + local) % width


@triton.jit
def tap(images, pixel, C, inside, EVEN: tl.constexpr):
    """y at a pixel of each row's image; `images` points at their first pixels."""
    at = images + (pixel.to(tl.int64) * C)[:, None]
    if EVEN:
        return tl.load(at)
    return tl.load(at, mask=inside[None, :], other=0.0)


@triton.jit
def activation(y, mean, scale, bias, ACC: tl.constexpr):
    """relu(normalized(y)) as the forward rounds it."""
    return relu(normalized(y.to(ACC), mean, scale, bias)).to(y.dtype).to(ACC)


@triton.jit
def winner(a, at, later, later_at):
    """Of two runs of taps, one after the other: the maximum and its place; a later NaN wins."""
    wins = (later > a) | (later != later)
    return tl.where(wins, later, a), tl.where(wins, later_at, at)


@triton.jit
def row_winners(
    images, top, left, r: tl.constexpr, H, W, C, mean, scale, bias, inside,
    ACC: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Winners of taps -2 to 0 and 0 to 2 of row r beside a cell at (top, left).

    The place of tap (r, c) is 8*(r + 2) + c + 2; where it is padding, that of the pixel it reads.
    """
    row = tl.minimum(tl.maximum(top + r, 0), H - 1)
    code = (row - top) * 8 + 18
    c0 = tl.minimum(tl.maximum(left - 2, 0), W - 1)
    c1 = tl.minimum(tl.maximum(left - 1, 0), W - 1)
    c2 = tl.minimum(tl.maximum(left, 0), W - 1)
    c3 = tl.minimum(tl.maximum(left + 1, 0), W - 1)
    c4 = tl.minimum(tl.maximum(left + 2, 0), W - 1)
    a0 = activation(tap(images, row * W + c0, C, inside, EVEN), mean, scale, bias, ACC)
    a1 = activation(tap(images, row * W + c1, C, inside, EVEN), mean, scale, bias, ACC)
    a2 = activation(tap(images, row * W + c2, C, inside, EVEN), mean, scale, bias, ACC)
    a3 = activation(tap(images, row * W + c3, C, inside, EVEN), mean, scale, bias, ACC)
    a4 = activation(tap(images, row * W + c4, C, inside, EVEN), mean, scale, bias, ACC)
    k2 = (code + c2 - left)[:, None]
    b, j = winner(a0, (code + c0 - left)[:, None], a1, (code + c1 - left)[:, None])
    b, j = winner(b, j, a2, k2)
    e, i = winner(a2, k2, a3, (code + c3 - left)[:, None])
    e, i = winner(e, i, a4, (code + c4 - left)[:, None])
    return b, j, e, i


@triton.jit
def next_tap(
    best, at, images, top, left, kh, kw, H, W, C, mean, scale, bias, inside,
    ACC: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """The winner so far against tap (kh, kw) of a window at (top, left); `at` is its pixel."""
    row = tl.minimum(tl.maximum(top + kh, 0), H - 1)
    col = tl.minimum(tl.maximum(left + kw, 0), W - 1)
    a = activation(tap(images, row * W + col, C, inside, EVEN), mean, scale, bias, ACC)
    return winner(best, at, a, (row * W + col)[:, None])


@triton.jit
def window_grad(grads, a, oh, ow, OH, OW, C, valid, inside, ACC: tl.constexpr):
    """The gradient of windows (oh, ow) whose maximum is a, through ReLU; 0 where there is none."""
    exists = valid & (oh >= 0) & (oh < OH) & (ow >= 0) & (ow < OW)
    at = grads + ((oh * OW + ow).to(tl.int64) * C)[:, None]
    grad = tl.load(at, mask=exists[:, None] & inside[None, :], other=0.0)
    return masked(grad.to(ACC), a)


@triton.jit
def settle(images, g_at, g, pixel, exists, C, mean, inside, ACC: tl.constexpr, EVEN: tl.constexpr):
    """Rounds and stores g; returns it as rounded, and what it adds to the second sum."""
    mask = exists[:, None]
    if not EVEN:
        mask = mask & inside[None, :]
    at = (pixel.to(tl.int64) * C)[:, None]
    rounded = g.to(g_at.dtype.element_ty)
    tl.store(g_at + at, rounded, mask=mask)
    y = tl.load(images + at, mask=mask, other=0.0).to(ACC)
    g = rounded.to(ACC)  # 0 where nothing exists, as no window's winner is there
    return g, g * (y - mean)
