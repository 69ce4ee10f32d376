// The second stage of BatchNorm's statistics, after whichever kernel took the first.
#pragma once

#include "cuda/launch.h"
#include "fusedres/batch_norm.h"

namespace fusedres {

// Merges part [chunks, 2, C] of (mean, M2), each but the last of `chunk` rows, and leaves what
// launch_batch_norm_fwd leaves. The dtype is a half type or float.
cudaError_t launch_batch_norm_finish(const BatchNormFwdParams& params, const float* part,
                                     int64_t chunks, int64_t chunk, cudaStream_t stream,
                                     LaunchConfig* config);

}  // namespace fusedres
