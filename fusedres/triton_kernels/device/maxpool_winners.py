"""The stem's pooling backward by winners: which pixel each window took, found once, read twice.

    winners = of each window the place of its first maximum of round(relu((y - mean)*scale + bias))
              in row-major order, or of its last NaN; NOTHING where ReLU stops the gradient
    g       = of each pixel the gradients of the windows it won, added and rounded
    sums    = (sum g, sum g*(y - mean))
    dy      = scale*g + c0 + c1*(y - mean)     as batch_norm_bwd has it

Neither the activation nor g is ever stored. Comparing activations is most of the arithmetic of a
pool's backward and registers: here a window's taps are compared once, not once for each pixel, and
both passes that need g find it by comparing bytes. Winners live within one backward; a tap that
falls into the padding goes by the nearest pixel, as in bn_relu_maxpool.

Winners: a program takes BM windows and BC channels. Reads y (from cache but for its first window),
writes a byte a window: 2.25 bytes per bf16 element of y at stride 2.
Sums, dy: the grid is (tiles of C, chunks of pixels), a chunk being `tiles` tiles of BM pixels.
Reads y, grad and winners; sums write one partial row a program: 2.75 bytes per bf16 element of y at
stride 2; dy writes as much as y: 4.75.
"""

import triton
import triton.language as tl

from fusedres.triton_kernels.device.bn_relu_maxpool import activation, place_of, tap, winner

# a winner is 16*(row within its window) + column; windows are at most 15 wide
NOTHING: tl.constexpr = tl.constexpr(255)


@triton.jit(do_not_specialize=["M", "H", "W", "OH", "OW"])
def maxpool_winners_kernel(
    y_ptr,  # [N*H*W, C]
    mean_ptr,  # [C] ACC, as are the next two
    scale_ptr,
    bias_ptr,
    winners_ptr,  # [M, C] bytes, M = N*OH*OW
    M,
    C,
    H,
    W,
    OH,
    OW,
    SIZE: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    UNROLL: tl.constexpr,  # the loop over taps
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
    top = oh * STRIDE - PADDING
    left = ow * STRIDE - PADDING
    mean = tl.load(mean_ptr + cols, mask=inside, other=0.0)[None, :]
    scale = tl.load(scale_ptr + cols, mask=inside, other=0.0)[None, :]
    bias = tl.load(bias_ptr + cols, mask=inside, other=0.0)[None, :]
    images = y_ptr + (image * (H * W) * C)[:, None] + cols[None, :]
    best = tl.full((BM, BC), float("-inf"), ACC)
    at = tl.full((BM, BC), NOTHING, tl.int32)
    if UNROLL:
        for k in tl.static_range(SIZE * SIZE):
            best, at = _next(
                best, at, images, top, left, k // SIZE, k % SIZE,
                H, W, C, mean, scale, bias, inside, ACC, EVEN,
            )  # fmt: skip
    else:
        for k in range(0, SIZE * SIZE):
            best, at = _next(
                best, at, images, top, left, k // SIZE, k % SIZE,
                H, W, C, mean, scale, bias, inside, ACC, EVEN,
            )  # fmt: skip
    at = tl.where(best <= 0.0, NOTHING, at)  # as relu's gradient has it: NaN lets it through
    mask = (local < count)[:, None]
    if not EVEN:
        mask = mask & inside[None, :]
    out = winners_ptr + row0 * C + local[:, None] * C + cols[None, :]
    tl.store(out, at.to(tl.uint8), mask=mask)


@triton.jit
def _next(
    best, at, images, top, left, kh, kw, H, W, C, mean, scale, bias, inside,
    ACC: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """The winner so far against tap (kh, kw) of windows at (top, left)."""
    row = tl.minimum(tl.maximum(top + kh, 0), H - 1)
    col = tl.minimum(tl.maximum(left + kw, 0), W - 1)
    a = activation(tap(images, row * W + col, C, inside, EVEN), mean, scale, bias, ACC)
    return winner(best, at, a, ((row - top) * 16 + (col - left))[:, None])


@triton.jit
def pooled_gradient(
    grad_ptr, winners_ptr, image, h, w, valid, cols, inside, OH, OW, C,
    SIZE: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, ACC: tl.constexpr,
    BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """g of BM pixels (image, h, w), not rounded yet; 0 where not valid."""
    grads = grad_ptr + (image * (OH * OW) * C)[:, None] + cols[None, :]
    places = winners_ptr + (image * (OH * OW) * C)[:, None] + cols[None, :]
    g = tl.zeros((BM, BC), ACC)
    # of the windows that hold a pixel, in each direction, the last, and how many there may be
    last_h = (h + PADDING) // STRIDE
    last_w = (w + PADDING) // STRIDE
    kh = h + PADDING - last_h * STRIDE
    kw = w + PADDING - last_w * STRIDE
    before: tl.constexpr = (SIZE - 1) // STRIDE + 1
    if before <= 2:
        for k in tl.static_range(before * before):
            g += _from_window(
                grads, places, last_h - k // before, last_w - k % before,
                kh + k // before * STRIDE, kw + k % before * STRIDE,
                OH, OW, C, SIZE, valid, inside, ACC,
            )  # fmt: skip
    else:
        for k in range(0, before * before):
            g += _from_window(
                grads, places, last_h - k // before, last_w - k % before,
                kh + k // before * STRIDE, kw + k % before * STRIDE,
                OH, OW, C, SIZE, valid, inside, ACC,
            )  # fmt: skip
    return g


@triton.jit
def _from_window(
    grads, places, oh, ow, kh, kw, OH, OW, C, SIZE: tl.constexpr, valid, inside, ACC: tl.constexpr
):
    """The gradient of windows (oh, ow) where tap (kh, kw) won it, else 0."""
    exists = valid & (oh >= 0) & (oh < OH) & (ow >= 0) & (ow < OW) & (kh < SIZE) & (kw < SIZE)
    at = ((oh * OW + ow).to(tl.int64) * C)[:, None]
    mask = exists[:, None] & inside[None, :]
    won = tl.load(places + at, mask=mask, other=NOTHING).to(tl.int32)
    grad = tl.load(grads + at, mask=mask, other=0.0).to(ACC)
    return tl.where(won == (kh * 16 + kw)[:, None], grad, 0.0)


@triton.jit
def coefficients(
    scale_ptr, rstd_ptr, sums_ptr, cols, inside, M, C, TRAINING: tl.constexpr, ACC: tl.constexpr
):
    """scale, c0 and c1 of dy = scale*g + c0 + c1*(y - mean)."""
    scale = tl.load(scale_ptr + cols, mask=inside, other=0.0)
    c0 = tl.zeros_like(scale)
    c1 = c0
    if TRAINING:
        rstd = tl.load(rstd_ptr + cols, mask=inside, other=0.0)
        part = -scale / tl.cast(M, ACC)
        c0 = part * tl.load(sums_ptr + cols, mask=inside, other=0.0)
        c1 = part * rstd * rstd * tl.load(sums_ptr + C + cols, mask=inside, other=0.0)
    return scale, c0, c1


@triton.jit(do_not_specialize=["M", "H", "W", "OH", "OW", "tiles"])
def maxpool_winners_bwd_kernel(
    grad_ptr,  # [N*OH*OW, C]
    winners_ptr,  # [N*OH*OW, C] bytes
    y_ptr,  # [M, C], M = N*H*W
    mean_ptr,  # [C] ACC, as are the next two
    scale_ptr,
    rstd_ptr,
    sums_ptr,  # [2, C] ACC, read for dy
    dy_ptr,  # [M, C]
    dweight_ptr,  # [C] of any dtype or None, as is the next: written beside dy
    dbias_ptr,
    part_ptr,  # [chunks, 2, C] ACC
    M,
    C,
    H,
    W,
    OH,
    OW,
    tiles,
    DY: tl.constexpr,  # else sums
    TRAINING: tl.constexpr,
    SIZE: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    ACC: tl.constexpr,
    EVEN: tl.constexpr,  # BC divides C
    BM: tl.constexpr,
    BC: tl.constexpr,
):
    chunk = tl.program_id(1)
    cols = tl.program_id(0) * BC + tl.arange(0, BC)
    inside = cols < C
    local = tl.arange(0, BM)
    mean = tl.load(mean_ptr + cols, mask=inside, other=0.0)
    if DY:
        scale, c0, c1 = coefficients(
            scale_ptr, rstd_ptr, sums_ptr, cols, inside, M, C, TRAINING, ACC
        )
    s0 = tl.zeros((BM, BC), ACC)
    s1 = tl.zeros((BM, BC), ACC)
    first = chunk * tiles
    for tile in range(first, tl.minimum(first + tiles, tl.cdiv(M, BM))):
        row0 = tl.cast(tile, tl.int64) * BM
        count = tl.minimum(M - row0, BM).to(tl.int32)
        valid = local < count
        image, h, w = place_of(row0, tl.minimum(local, count - 1), H, W)
        g = pooled_gradient(
            grad_ptr, winners_ptr, image, h, w, valid, cols, inside, OH, OW, C,
            SIZE, STRIDE, PADDING, ACC, BM, BC,
        )  # fmt: skip
        g = g.to(y_ptr.dtype.element_ty).to(ACC)
        mask = valid[:, None]
        if not EVEN:
            mask = mask & inside[None, :]
        at = row0 * C + local[:, None] * C + cols[None, :]
        if DY:
            dy = g * scale[None, :]
            if TRAINING:
                y = tl.load(y_ptr + at, mask=mask, other=0.0).to(ACC)
                dy += c0[None, :] + c1[None, :] * (y - mean[None, :])
            tl.store(dy_ptr + at, dy.to(dy_ptr.dtype.element_ty), mask=mask)
        else:
            y = tl.load(y_ptr + at, mask=mask, other=0.0).to(ACC)
            s0 += g
            s1 += g * (y - mean[None, :])  # g is 0 in rows past M
    if DY:
        if chunk == 0:
            if dweight_ptr is not None:
                rstd = tl.load(rstd_ptr + cols, mask=inside, other=0.0)
                dweight = tl.load(sums_ptr + C + cols, mask=inside, other=0.0) * rstd
                tl.store(dweight_ptr + cols, dweight.to(dweight_ptr.dtype.element_ty), mask=inside)
            if dbias_ptr is not None:
                dbias = tl.load(sums_ptr + cols, mask=inside, other=0.0)
                tl.store(dbias_ptr + cols, dbias.to(dbias_ptr.dtype.element_ty), mask=inside)
    else:
        part = part_ptr + chunk * 2 * C + cols
        tl.store(part, tl.sum(s0, 0), mask=inside)
        tl.store(part + C, tl.sum(s1, 0), mask=inside)
