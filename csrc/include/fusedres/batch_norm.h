// Batch normalisation's two passes over memory: statistics forward, gradient of the input backward.
#pragma once

#include "fusedres/types.h"

namespace fusedres {

// mean[c] and biased var[c] of y over (N, H, W). An empty tensor has mean 0 and var 0.
struct BatchNormStatsParams {
  DType dtype;
  Shape shape;
  int threads;
  const void* y;      // [N, C, H, W]
  void* mean;         // [C], float (double for a double y)
  void* var;          // [C], the same
  double* workspace;  // [partial_rows(shape), 2, C]
};

// dy = scale*g + c0 + c1*(y - mean), with c0 = -scale*S0/M and c1 = -scale*rstd^2*S1/M in training,
// c0 = c1 = 0 where the statistics were constants.
struct BatchNormBwdParams {
  DType dtype;
  Shape shape;
  int threads;
  bool training;
  const void* g;      // [N, C, H, W]
  const void* y;      // [N, C, H, W]
  const void* mean;   // [C], float (double for a double y); as are the next three
  const void* scale;  // [C]
  const void* rstd;   // [C]
  const void* sums;   // [2, C]: S0 = sum g, S1 = sum g*(y - mean)
  void* dy;           // [N, C, H, W], may be g or y itself
  void* workspace;    // [2, C], like sums: c0 and c1
};

void launch_batch_norm_stats(const BatchNormStatsParams& params);
void launch_batch_norm_bwd(const BatchNormBwdParams& params);

}  // namespace fusedres
