"""The stem's pooling with its winners, which pixel each window took, and its backward by them:
found once, on the way forward, and read twice.

    p       = maxpool(round(relu((y - mean)*scale + bias)))
    winners = of each window the place of its first maximum of round(relu((y - mean)*scale + bias))
              in row-major order, or of its last NaN; NOTHING where ReLU stops the gradient
    g       = of each pixel the gradients of the windows it won, added and rounded
    sums    = (sum g, sum g*(y - mean))
    dy      = scale*g + c0 + c1*(y - mean)     as batch_norm_bwd has it

Neither the activation nor g is ever stored. Comparing activations is most of the arithmetic of a
pool's backward and registers: here a window's taps are compared once, not once for each pixel, and
both passes that need g find it by comparing bytes. A tap that falls into the padding goes by the
nearest pixel, as in bn_relu_maxpool.

In all kernels the grid is (tiles of C, chunks of rows), a chunk being `tiles` tiles of BM rows, so
that what a program prepares serves many of them. Forward: rows are windows. Reads y (from cache but
for a pixel's first window), writes p and a byte a window: 2.75 bytes per bf16 element of y at
stride 2, a quarter of a byte more than bn_relu_maxpool's forward. Saved for backward: y, winners.
Sums, dy: of the 3x3 window of stride 2 rows are cells of 2x2 pixels, whose 4 windows are read once;
of any other window they are pixels. Reads y, grad and winners; sums write one partial row a
program: 2.75 bytes per bf16 element of y at stride 2; dy writes as much as y: 4.75.
"""

import triton
import triton.language as tl

from fusedres.triton_kernels.device.activation import normalized, relu
from fusedres.triton_kernels.device.bn_relu_maxpool import place_within, tap, winner

# a winner is 16*(row within its window) + column; windows are at most 15 wide
NOTHING: tl.constexpr = tl.constexpr(255)


@triton.jit(do_not_specialize=["M", "H", "W", "OH", "OW", "tiles"])
def maxpool_winners_kernel(
    y_ptr,  # [N*H*W, C]
    mean_ptr,  # [C] ACC, as are the next two
    scale_ptr,
    bias_ptr,
    p_ptr,  # [M, C], M = N*OH*OW: the pooled map
    winners_ptr,  # [M, C] bytes
    M,
    C,
    H,
    W,
    OH,
    OW,
    tiles,
    SIZE: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    UNROLL: tl.constexpr,  # the loop over taps
    WIDE: tl.constexpr,  # BM is at most OW
    ACC: tl.constexpr,
    EVEN: tl.constexpr,  # BC divides C
    BM: tl.constexpr,
    BC: tl.constexpr,
):
    cols = tl.program_id(0) * BC + tl.arange(0, BC)
    inside = cols < C
    local = tl.arange(0, BM)
    mean = tl.load(mean_ptr + cols, mask=inside, other=0.0)[None, :]
    scale = tl.load(scale_ptr + cols, mask=inside, other=0.0)[None, :]
    bias = tl.load(bias_ptr + cols, mask=inside, other=0.0)[None, :]
    first = tl.program_id(1) * tiles
    for tile in range(first, tl.minimum(first + tiles, tl.cdiv(M, BM))):
        row0 = tl.cast(tile, M.dtype) * BM  # divisions of 64 bits cost as much as a tap
        count = tl.minimum(M - row0, BM).to(tl.int32)
        image, oh, ow = place_within(row0, tl.minimum(local, count - 1), OH, OW, WIDE)
        top = oh * STRIDE - PADDING
        left = ow * STRIDE - PADDING
        images = y_ptr + (image.to(tl.int64) * (H * W) * C)[:, None] + cols[None, :]
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
        out = row0.to(tl.int64) * C + local[:, None] * C + cols[None, :]
        tl.store(p_ptr + out, relu(best).to(p_ptr.dtype.element_ty), mask=mask)
        tl.store(winners_ptr + out, at.to(tl.uint8), mask=mask)


@triton.jit
def _next(
    best, at, images, top, left, kh, kw, H, W, C, mean, scale, bias, inside,
    ACC: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """The winner so far against tap (kh, kw) of windows at (top, left).

    Without ReLU: where it would make taps equal, nothing wins.
    """
    row = tl.minimum(tl.maximum(top + kh, 0), H - 1)
    col = tl.minimum(tl.maximum(left + kw, 0), W - 1)
    y = tap(images, row * W + col, C, inside, EVEN)
    a = normalized(y.to(ACC), mean, scale, bias).to(y.dtype).to(ACC)
    return winner(best, at, a, ((row - top) * 16 + (col - left))[:, None])


@triton.jit
def cell_gradients(
    grad_ptr, winners_ptr, image, ch, cw, valid, cols, inside, OH, OW, C, ACC: tl.constexpr
):
    """g of the 2x2 pixels of cells (ch, cw) under the 3x3 window of stride 2, not rounded yet.

    Windows (ch - 1, ch) x (cw - 1, cw) hold any of them; the last starts at the first pixel.
    """
    grads = grad_ptr + (image.to(tl.int64) * (OH * OW) * C)[:, None] + cols[None, :]
    places = winners_ptr + (image.to(tl.int64) * (OH * OW) * C)[:, None] + cols[None, :]
    won, grad = _window(grads, places, ch, cw, OH, OW, C, valid, inside, ACC)
    g00 = tl.where(won == 0, grad, 0.0)
    g01 = tl.where(won == 1, grad, 0.0)
    g10 = tl.where(won == 16, grad, 0.0)
    g11 = tl.where(won == 17, grad, 0.0)
    won, grad = _window(grads, places, ch, cw - 1, OH, OW, C, valid, inside, ACC)
    g00 += tl.where(won == 2, grad, 0.0)
    g10 += tl.where(won == 18, grad, 0.0)
    won, grad = _window(grads, places, ch - 1, cw, OH, OW, C, valid, inside, ACC)
    g00 += tl.where(won == 32, grad, 0.0)
    g01 += tl.where(won == 33, grad, 0.0)
    won, grad = _window(grads, places, ch - 1, cw - 1, OH, OW, C, valid, inside, ACC)
    g00 += tl.where(won == 34, grad, 0.0)
    return g00, g01, g10, g11


@triton.jit
def _window(grads, places, oh, ow, OH, OW, C, valid, inside, ACC: tl.constexpr):
    """Winners and gradients of windows (oh, ow); NOTHING where there is none."""
    exists = valid & (oh >= 0) & (oh < OH) & (ow >= 0) & (ow < OW)
    at = ((oh * OW + ow).to(tl.int64) * C)[:, None]
    mask = exists[:, None] & inside[None, :]
    won = tl.load(places + at, mask=mask, other=NOTHING).to(tl.int32)
    return won, tl.load(grads + at, mask=mask, other=0.0).to(ACC)


@triton.jit
def pixel_gradient(
    grad_ptr, winners_ptr, image, h, w, valid, cols, inside, OH, OW, C,
    SIZE: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, ACC: tl.constexpr,
    BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """g of pixels (h, w) under any window, not rounded yet."""
    grads = grad_ptr + (image.to(tl.int64) * (OH * OW) * C)[:, None] + cols[None, :]
    places = winners_ptr + (image.to(tl.int64) * (OH * OW) * C)[:, None] + cols[None, :]
    g = tl.zeros((BM, BC), ACC)
    before: tl.constexpr = (SIZE - 1) // STRIDE + 1  # windows that may hold a pixel, each way
    for k in range(0, before * before):
        oh = (h + PADDING) // STRIDE - k // before
        ow = (w + PADDING) // STRIDE - k % before
        kh = h + PADDING - oh * STRIDE
        kw = w + PADDING - ow * STRIDE
        holds = valid & (kh < SIZE) & (kw < SIZE)
        won, grad = _window(grads, places, oh, ow, OH, OW, C, holds, inside, ACC)
        g += tl.where(won == (kh * 16 + kw)[:, None], grad, 0.0)
    return g


@triton.jit
def coefficients(
    scale_ptr, rstd_ptr, sums_ptr, cols, inside, M, C,
    DY: tl.constexpr, TRAINING: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """scale, c0 and c1 of dy = scale*g + c0 + c1*(y - mean) as rows; zeros unless DY."""
    scale = tl.zeros(cols.shape, ACC)
    c0 = scale
    c1 = scale
    if DY:
        scale = tl.load(scale_ptr + cols, mask=inside, other=0.0)
        if TRAINING:
            rstd = tl.load(rstd_ptr + cols, mask=inside, other=0.0)
            part = -scale / tl.cast(M, ACC)
            c0 = part * tl.load(sums_ptr + cols, mask=inside, other=0.0)
            c1 = part * rstd * rstd * tl.load(sums_ptr + C + cols, mask=inside, other=0.0)
    return scale[None, :], c0[None, :], c1[None, :]


@triton.jit(do_not_specialize=["M", "rows", "H", "W", "OH", "OW", "CH", "CW", "tiles"])
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
    rows,  # N*CH*CW
    H,
    W,
    OH,
    OW,
    CH,
    CW,
    tiles,
    DY: tl.constexpr,  # else sums
    TRAINING: tl.constexpr,
    CELL: tl.constexpr,  # 2 for the 3x3 window of stride 2, else 1
    SIZE: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    WIDE: tl.constexpr,  # BM is at most CW
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
    scale, c0, c1 = coefficients(
        scale_ptr, rstd_ptr, sums_ptr, cols, inside, M, C, DY, TRAINING, ACC
    )
    s0 = tl.zeros((BM, BC), ACC)
    s1 = tl.zeros((BM, BC), ACC)
    first = chunk * tiles
    for tile in range(first, tl.minimum(first + tiles, tl.cdiv(rows, BM))):
        row0 = tl.cast(tile, rows.dtype) * BM
        count = tl.minimum(rows - row0, BM).to(tl.int32)
        valid = local < count
        image, ch, cw = place_within(row0, tl.minimum(local, count - 1), CH, CW, WIDE)
        base = (image.to(tl.int64) * (H * W) * C)[:, None] + cols[None, :]
        if CELL == 2:
            g00, g01, g10, g11 = cell_gradients(
                grad_ptr, winners_ptr, image, ch, cw, valid, cols, inside, OH, OW, C, ACC
            )
            top = ch * 2 - PADDING
            left = cw * 2 - PADDING
            s0, s1 = _pixel(
                g00, top, left, H, W, base, valid, y_ptr, dy_ptr, C, mean, scale, c0, c1,
                inside, s0, s1, DY, TRAINING, ACC, EVEN,
            )  # fmt: skip
            s0, s1 = _pixel(
                g01, top, left + 1, H, W, base, valid, y_ptr, dy_ptr, C, mean, scale, c0, c1,
                inside, s0, s1, DY, TRAINING, ACC, EVEN,
            )  # fmt: skip
            s0, s1 = _pixel(
                g10, top + 1, left, H, W, base, valid, y_ptr, dy_ptr, C, mean, scale, c0, c1,
                inside, s0, s1, DY, TRAINING, ACC, EVEN,
            )  # fmt: skip
            s0, s1 = _pixel(
                g11, top + 1, left + 1, H, W, base, valid, y_ptr, dy_ptr, C, mean, scale, c0, c1,
                inside, s0, s1, DY, TRAINING, ACC, EVEN,
            )  # fmt: skip
        else:
            g = pixel_gradient(
                grad_ptr, winners_ptr, image, ch, cw, valid, cols, inside, OH, OW, C,
                SIZE, STRIDE, PADDING, ACC, BM, BC,
            )  # fmt: skip
            s0, s1 = _pixel(
                g, ch, cw, H, W, base, valid, y_ptr, dy_ptr, C, mean, scale, c0, c1,
                inside, s0, s1, DY, TRAINING, ACC, EVEN,
            )  # fmt: skip
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


@triton.jit
def _pixel(
    g, row, col, H, W, base, valid, y_ptr, dy_ptr, C, mean, scale, c0, c1, inside, s0, s1,
    DY: tl.constexpr, TRAINING: tl.constexpr, ACC: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Stores dy of pixels (row, col), or adds what they bring the sums; g is 0 where none is."""
    mask = (valid & (row >= 0) & (row < H) & (col >= 0) & (col < W))[:, None]
    if not EVEN:
        mask = mask & inside[None, :]
    at = base + ((row * W + col).to(tl.int64) * C)[:, None]
    g = g.to(y_ptr.dtype.element_ty).to(ACC)
    if DY:
        dy = g * scale
        if TRAINING:
            y = tl.load(y_ptr + at, mask=mask, other=0.0).to(ACC)
            dy += c0 + c1 * (y - mean)
        tl.store(dy_ptr + at, dy.to(dy_ptr.dtype.element_ty), mask=mask)
    else:
        y = tl.load(y_ptr + at, mask=mask, other=0.0).to(ACC)
        s0 += g
        s1 += g * (y - mean)
    return s0, s1
