// All weights of a model cast to a half type at once, each [K, R, S, C]. GPU only.
#pragma once

#ifdef FUSEDRES_WITH_CUDA
#include "fusedres/cuda_launch.h"
#include "fusedres/types.h"

namespace fusedres {

// One weight. The source is dense, either as [K, C, R, S] or as [K, R, S, C].
struct PackEntry {
  const float* source;
  int64_t
      offset;  // of its first element in the buffer; a multiple of 8, up to which all is written
  int32_t filters, channels, taps;  // K, C, R*S
  bool channels_last;
};

// For up to kMost weights by value: a kernel takes 4 KB of arguments.
struct PackParams {
  static constexpr int kMost = 96;
  DType dtype;   // of the buffer: float16 or bfloat16
  void* buffer;  // on 16 bytes
  int count;
  PackEntry entries[kMost];
};

// On the given device and stream; `config` tells what was launched, for error messages.
cudaError_t launch_pack(const PackParams& params, const CudaTarget& target, LaunchConfig* config);

}  // namespace fusedres
#endif
