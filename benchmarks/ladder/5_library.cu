// Rung 5: the library's own kernels, csrc/cuda/conv_bn_mma.h and conv_bn_wgmma.h, by the launcher
// that everything else calls; with BatchNorm's statistics of y, and without.
//
// Against rung 4: a block makes all columns of a tile one piece after another and, where they fit,
// keeps what the prologue made in shared memory, so that it is done once; w stays there too where
// it is small. The product leaves by a buffer of each warp, in rows of 128 bytes. On that way every
// column's mean and M2 are taken, and merged in a fixed order: one partial row a block, which a
// second, small kernel merges. x is read once and y written once, statistics or not.
//
// Bound by memory, or by tensor cores, as far as the instructions of prologue and epilogue allow;
// how far that is, is what the rows say.
#include "cuda/conv_bn.h"
#include "ladder.h"

namespace fusedres {

// The launcher of the gradient, beside that of the forward, asks for these. Nobody calls it here.
cudaError_t conv_bn_dgrad_mma(const ConvBnDgradParams&, float*, const DeviceLimits&, ProductPlan*,
                              const CudaTarget&, LaunchConfig*) {
  return cudaErrorNotSupported;
}
cudaError_t conv_bn_dgrad_wgmma(const ConvBnDgradParams&, float*, const DeviceLimits&, ProductPlan*,
                                const CudaTarget&, LaunchConfig*) {
  return cudaErrorNotSupported;
}

namespace {

ConvBnFwdParams params_of(const Problem& p, bool statistics) {
  ConvBnFwdParams q = {};
  q.input.dtype = q.output.dtype = q.weight.dtype = DType::kBFloat16;
  q.input.shape = {p.m, p.c, 1, 1, Layout::kNHWC};
  q.input.relu = true;
  q.input.y = p.x;
  q.input.mean = p.mean;
  q.input.scale = p.scale;
  q.input.bias = p.bias;
  q.weight.data = p.w;
  q.y = p.y;
  q.output.shape = {p.m, p.k, 1, 1, Layout::kNHWC};
  q.output.training = statistics;
  q.output.eps = 1e-5;
  q.output.y = p.y;
  float* const rest = static_cast<float*>(p.workspace);  // what the ladder has no use for
  q.output.mean = p.y_mean;
  q.output.var = p.y_var;
  if (rest != nullptr) {
    q.output.rstd = rest;
    q.output.scale = rest + p.k;
    q.output.shift = rest + 2 * p.k;
    q.workspace = rest + 3 * p.k;
  }
  return q;
}

cudaError_t run(const Problem& p, Product product, bool statistics) {
  LaunchConfig config;
  return launch_conv_bn_fwd(params_of(p, statistics), product, {0, nullptr}, &config);
}

}  // namespace

cudaError_t library_workspace(const Problem& p, int64_t* bytes) {
  const cudaError_t status = conv_bn_fwd_workspace(params_of(p, true), 0, bytes);
  *bytes += 3 * p.k * static_cast<int64_t>(sizeof(float));
  return status;
}

cudaError_t run_library_mma(const Problem& p) { return run(p, Product::kMma, false); }
cudaError_t run_library_mma_stats(const Problem& p) { return run(p, Product::kMma, true); }
cudaError_t run_library_wgmma(const Problem& p) { return run(p, Product::kWgmma, false); }
cudaError_t run_library_wgmma_stats(const Problem& p) { return run(p, Product::kWgmma, true); }

}  // namespace fusedres
