// out = relu(x + residual) and its backward on the GPU.
//
// A grid that fits the device at once goes over 16-byte vectors where all three pointers lie on 16
// bytes, else over single elements; a thread has the loads of kUnroll vectors in flight. The last
// few elements go one by one. Forward and backward each read two tensors and write one: 6 bytes per
// element of a half type, 12 per float. Backward needs out alone.
#include "common/activation.h"
#include "cuda/walk.h"
#include "fusedres/add_relu.h"

namespace fusedres {

struct AddReluForward {
  template <class Acc>
  __device__ Acc operator()(Acc x, Acc residual) const {
    const Acc u = x + residual;
    return relu_gate(u, u);
  }
};

struct AddReluBackward {
  template <class Acc>
  __device__ Acc operator()(Acc grad, Acc out) const {
    return relu_gate(out, grad);
  }
};

// result = op(a, b). No __restrict__: result may be a or b.
template <class Op, class T, int kVector>
__global__ void __launch_bounds__(kThreads)
    add_relu_kernel(const T* a, const T* b, T* result, int64_t numel) {
  using Acc = acc_t<T>;
  using Pack = Packed<T, kVector>;
  constexpr int kUnroll = 4;
  const Op op;
  const int64_t vectors = numel / kVector;
  const int64_t start = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * kThreads;
  const auto join = [&](int64_t vector, auto count) {
    Pack as[kUnroll], bs[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (u >= count) continue;
      as[u] = load_once(reinterpret_cast<const Pack*>(a) + vector + u * threads);
      bs[u] = load_once(reinterpret_cast<const Pack*>(b) + vector + u * threads);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (u >= count) continue;
      Acc x[kVector], other[kVector];
      unpack(as[u], x);
      unpack(bs[u], other);
#pragma unroll
      for (int i = 0; i < kVector; ++i) x[i] = op(x[i], other[i]);
      store(reinterpret_cast<Vector<T, kVector>*>(result) + vector + u * threads,
            rounded<T, kVector>(x));
    }
  };
  int64_t vector = start;
  for (; vector + (kUnroll - 1) * threads < vectors; vector += kUnroll * threads) {
    join(vector, Count<kUnroll>{});
  }
  if (vector < vectors) join(vector, static_cast<int>((vectors - vector + threads - 1) / threads));
  const int64_t tail = vectors * kVector + start;
  if (tail < numel) result[tail] = from_acc<T>(op(to_acc(a[tail]), to_acc(b[tail])));
}

namespace {

template <class Op>
cudaError_t launch_op(const char* name, DType dtype, const void* a, const void* b, void* result,
                      int64_t numel, const CudaTarget& target, LaunchConfig* config) {
  if (numel == 0) return cudaSuccess;
  if (any_null(a, b, result)) return cudaErrorInvalidValue;
  const DeviceGuard guard(target.device);
  if (guard.status() != cudaSuccess) return guard.status();
  return dispatch_cuda(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    return dispatch_vector<T>(aligned_16(a, b, result), [&](auto width) {
      constexpr int kVector = decltype(width)::value;
      constexpr auto kKernel = add_relu_kernel<Op, T, kVector>;
      int64_t resident = 0;
      const cudaError_t status = resident_blocks<kKernel, 0>(target.device, &resident);
      if (status != cudaSuccess) return status;
      const int64_t useful = ceil_div(numel, int64_t{kThreads} * kVector);
      *config = {name, static_cast<unsigned>(useful < resident ? useful : resident), kThreads};
      return launch(kKernel, *config, target.stream, static_cast<const T*>(a),
                    static_cast<const T*>(b), static_cast<T*>(result), numel);
    });
  });
}

}  // namespace

cudaError_t launch_add_relu_fwd(const AddReluFwdParams& p, const CudaTarget& target,
                                LaunchConfig* config) {
  return launch_op<AddReluForward>("add_relu_fwd", p.dtype, p.x, p.residual, p.out, p.numel, target,
                                   config);
}

cudaError_t launch_add_relu_bwd(const AddReluBwdParams& p, const CudaTarget& target,
                                LaunchConfig* config) {
  return launch_op<AddReluBackward>("add_relu_bwd", p.dtype, p.grad, p.out, p.dx, p.numel, target,
                                    config);
}

}  // namespace fusedres
