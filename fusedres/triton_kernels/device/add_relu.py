"""relu(x + residual) and its backward, element by element, so that any one dense layout serves.

    out = relu(x + residual)        in ACC, rounded once
    dx  = 0 where out <= 0, else grad

The grid cuts the elements into blocks. Either direction reads two tensors and writes one: 6 bytes
per bf16 element, 12 per float, in accesses of 16 bytes where 16 divides the number of elements, as
it does wherever it divides the channels. Saved for backward: out.
"""

import triton
import triton.language as tl

from fusedres.triton_kernels.device.activation import masked, relu


@triton.jit
def add_relu_fwd_kernel(
    x_ptr,  # [numel], as are the next two
    residual_ptr,
    out_ptr,
    numel,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    base = tl.program_id(0).to(tl.int64) * BLOCK
    at = base + tl.arange(0, BLOCK)
    inside = at < numel
    u = tl.load(x_ptr + at, mask=inside, other=0.0).to(ACC)
    u += tl.load(residual_ptr + at, mask=inside, other=0.0).to(ACC)
    tl.store(out_ptr + at, relu(u).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def add_relu_bwd_kernel(
    grad_ptr,  # [numel], as are the next two
    out_ptr,
    dx_ptr,
    numel,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    base = tl.program_id(0).to(tl.int64) * BLOCK
    at = base + tl.arange(0, BLOCK)
    inside = at < numel
    grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(ACC)
    dx = masked(grad, tl.load(out_ptr + at, mask=inside, other=0.0).to(ACC))
    tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)
