// The second stage of per-channel sums: partial rows become [2, C] sums.
#pragma once

#include "cuda/launch.h"

namespace fusedres {

// Adds the rows of part [rows, count, C] in a fixed order into sums [2, C] = (0, 1), and where
// count is 3 into res_sums [2, C] = (0, 2). Acc is float or double. Zeros where rows is 0.
template <class Acc>
cudaError_t launch_finish_sums(const Acc* part, int64_t rows, int count, int64_t channels,
                               Acc* sums, Acc* res_sums, cudaStream_t stream, LaunchConfig* config);

extern template cudaError_t launch_finish_sums<float>(const float*, int64_t, int, int64_t, float*,
                                                      float*, cudaStream_t, LaunchConfig*);
extern template cudaError_t launch_finish_sums<double>(const double*, int64_t, int, int64_t,
                                                       double*, double*, cudaStream_t,
                                                       LaunchConfig*);

}  // namespace fusedres
