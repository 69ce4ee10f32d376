// A barrier of the whole grid; in a file of its own, as CUDA's header for it takes long to compile.
#pragma once

#include "cuda/device.h"

#ifdef __CUDACC__
#include <cooperative_groups.h>

namespace fusedres {

// Every thread of a cooperative launch waits for all the others.
__device__ __forceinline__ void grid_barrier() { cooperative_groups::this_grid().sync(); }

}  // namespace fusedres
#endif
