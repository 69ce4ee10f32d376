// out = relu(x + residual) and its backward on the GPU.
//
// A grid-stride loop over 16-byte vectors where all three pointers are aligned to 16 bytes, else
// over single elements; the last few elements go one by one. Forward and backward each read two
// tensors and write one: 6 bytes per element of a half type, 12 per float. Backward needs out
// alone.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "common/activation.h"
#include "fusedres/add_relu.h"

namespace fusedres {
namespace {

__device__ __forceinline__ float to_acc(float x) { return x; }
__device__ __forceinline__ double to_acc(double x) { return x; }
__device__ __forceinline__ float to_acc(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_acc(__nv_bfloat16 x) { return __bfloat162float(x); }

__device__ __forceinline__ void store(float* p, float x) { *p = x; }
__device__ __forceinline__ void store(double* p, double x) { *p = x; }
__device__ __forceinline__ void store(__half* p, float x) { *p = __float2half_rn(x); }
__device__ __forceinline__ void store(__nv_bfloat16* p, float x) { *p = __float2bfloat16_rn(x); }

struct Forward {
  template <class Acc>
  __device__ Acc operator()(Acc x, Acc residual) const {
    const Acc u = x + residual;
    return relu_gate(u, u);
  }
};

struct Backward {
  template <class Acc>
  __device__ Acc operator()(Acc grad, Acc out) const {
    return relu_gate(out, grad);
  }
};

template <class T, int kVector>
struct alignas(sizeof(T) * kVector) Vector {
  T values[kVector];
};

constexpr int kThreads = 256;

// result = op(a, b). No __restrict__: result may be a or b.
template <class Op, class T, int kVector>
__global__ void __launch_bounds__(kThreads)
    add_relu_kernel(const T* a, const T* b, T* result, int64_t numel) {
  using Vec = Vector<T, kVector>;
  const Op op;
  const int64_t vectors = numel / kVector;
  const int64_t start = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t v = start; v < vectors; v += step) {
    const Vec va = reinterpret_cast<const Vec*>(a)[v];
    const Vec vb = reinterpret_cast<const Vec*>(b)[v];
    Vec out;
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      store(&out.values[i], op(to_acc(va.values[i]), to_acc(vb.values[i])));
    }
    reinterpret_cast<Vec*>(result)[v] = out;
  }
  const int64_t tail = vectors * kVector + start;
  if (tail < numel) store(result + tail, op(to_acc(a[tail]), to_acc(b[tail])));
}

template <class Op, class T, int kVector>
cudaError_t launch_vector(const void* a, const void* b, void* result, int64_t numel,
                          const CudaTarget& target, LaunchConfig* config) {
  // Enough blocks to fill any GPU; the loop takes the rest.
  constexpr int64_t kMaxBlocks = 1 << 16;
  const int64_t per_block = int64_t{kThreads} * kVector;
  const int64_t blocks = (numel + per_block - 1) / per_block;
  *config = {static_cast<unsigned>(blocks < kMaxBlocks ? blocks : kMaxBlocks), kThreads, kVector};
  add_relu_kernel<Op, T, kVector><<<config->blocks, config->threads, 0, target.stream>>>(
      static_cast<const T*>(a), static_cast<const T*>(b), static_cast<T*>(result), numel);
  return cudaGetLastError();
}

template <class Op, class T>
cudaError_t launch_typed(const void* a, const void* b, void* result, int64_t numel,
                         const CudaTarget& target, LaunchConfig* config) {
  const auto address = [](const void* p) { return reinterpret_cast<uintptr_t>(p); };
  if ((address(a) | address(b) | address(result)) % 16 == 0) {
    return launch_vector<Op, T, 16 / sizeof(T)>(a, b, result, numel, target, config);
  }
  return launch_vector<Op, T, 1>(a, b, result, numel, target, config);
}

template <class Op>
cudaError_t launch(DType dtype, const void* a, const void* b, void* result, int64_t numel,
                   const CudaTarget& target, LaunchConfig* config) {
  if (numel == 0) return cudaSuccess;
  const DeviceGuard guard(target.device);
  if (guard.status() != cudaSuccess) return guard.status();
  switch (dtype) {
    case DType::kFloat32:
      return launch_typed<Op, float>(a, b, result, numel, target, config);
    case DType::kFloat16:
      return launch_typed<Op, __half>(a, b, result, numel, target, config);
    case DType::kBFloat16:
      return launch_typed<Op, __nv_bfloat16>(a, b, result, numel, target, config);
    case DType::kFloat64:
      return launch_typed<Op, double>(a, b, result, numel, target, config);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t launch_add_relu_fwd(const AddReluFwdParams& p, const CudaTarget& target,
                                LaunchConfig* config) {
  return launch<Forward>(p.dtype, p.x, p.residual, p.out, p.numel, target, config);
}

cudaError_t launch_add_relu_bwd(const AddReluBwdParams& p, const CudaTarget& target,
                                LaunchConfig* config) {
  return launch<Backward>(p.dtype, p.grad, p.out, p.dx, p.numel, target, config);
}

}  // namespace fusedres
