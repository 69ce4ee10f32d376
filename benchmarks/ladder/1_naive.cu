// Rung 1: a thread makes an element of y.
//
// Split: 256 threads a block; neighbours in a warp have neighbouring columns of a row, so that they
// read the same x at the same time and y leaves in whole sectors.
//
// Bytes: a product reads 2 bytes of x and 2 of w, c of them an element of y. Caches catch most of
// it, but every product is a load of x, a load of w, and the loads of three vectors; the lanes of a
// warp read w at 32 rows, 2*c bytes apart, 32 sectors a load.
//
// Bound by the caches and by instructions: the prologue, five operations, is done anew for each of
// the k columns that a row of x meets, beside one multiplication. Tensor cores idle.
//
// The next rung keeps tiles of x and w in shared memory, where 64 columns and 128 rows share them,
// does the prologue once for 64 columns, and multiplies by tensor cores.
#include "ladder.h"

namespace fusedres {

__global__ void __launch_bounds__(kThreads) naive_kernel(const Problem p) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (at >= p.m * p.k) return;
  const BFloat16* const x = p.x + at / p.k * p.c;
  const BFloat16* const w = p.w + at % p.k * p.c;
  float sum = 0;
  for (int i = 0; i < p.c; ++i) {
    const float a = activate(to_acc(x[i]), p.mean[i], p.scale[i], p.bias[i]);
    sum += to_acc(from_acc<BFloat16>(a)) * to_acc(w[i]);
  }
  p.y[at] = from_acc<BFloat16>(sum);
}

cudaError_t run_naive(const Problem& p) {
  return start_rung<naive_kernel>("naive", ceil_div(p.m * p.k, kThreads), kThreads, 0, p);
}

}  // namespace fusedres
