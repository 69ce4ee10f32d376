// How the launchers of conv_bn's 1x1 kernels split a product over a device.
#pragma once

#include <algorithm>

#include "cuda/conv_bn_product.h"
#include "cuda/finish_sums.h"
#include "cuda/launch.h"

namespace fusedres {

struct DeviceLimits {
  int multiprocessors = 0, shared_of_block = 0, shared_of_multiprocessor = 0;
  int major = 0, minor = 0;  // compute capability
};

// The device's, which must be current.
cudaError_t find_limits(int device, DeviceLimits* limits);

// Partial rows that any plan leaves at most: what workspaces are made for.
inline int64_t most_chunks(int64_t rows, const DeviceLimits& limits) {
  return std::min(ceil_div(rows, kTileRows),
                  static_cast<int64_t>(limits.multiprocessors) * kMostResidents);
}

// Splits tiles of rows and pieces of columns over blocks of which `resident` run at once: rows
// first, so that A is fetched by one block; columns too, over `least` blocks and more, where there
// are fewer tiles than blocks.
inline void split_over_blocks(ProductPlan* plan, int piece, int64_t resident, int least = 1) {
  const int64_t tiles = ceil_div(plan->rows, kTileRows);
  const int pieces = plan->columns / piece;
  int64_t groups = std::min<int64_t>(pieces, std::max<int64_t>(least, resident / tiles));
  while (pieces % groups != 0) --groups;
  const int64_t chunks = std::min(tiles, std::max<int64_t>(1, resident / groups));
  plan->groups = static_cast<int>(groups);
  plan->n_tiles = static_cast<int>(pieces / groups);
  plan->tiles = static_cast<int>(ceil_div(tiles, chunks));
  plan->chunks = static_cast<int>(ceil_div(tiles, plan->tiles));
}

// Plans with Layout's memory for mma.sync, for up to `most` blocks a multiprocessor; false where it
// does not fit. Blocks share the columns where the sums of all would not fit.
template <class Layout>
bool fit_mma(ProductPlan* plan, int piece, int most, const DeviceLimits& limits) {
  for (const int least : {1, 2, 4, 8}) {
    for (int stages = 3; stages >= 2; --stages) {
      plan->stages = stages;
      for (int residents = most; residents > 0; --residents) {
        const int64_t blocks = static_cast<int64_t>(limits.multiprocessors) * residents;
        split_over_blocks(plan, piece, blocks, least);
        const int bytes = Layout(*plan).bytes;
        if (bytes > limits.shared_of_block) continue;
        if ((bytes + 1024) * residents <= limits.shared_of_multiprocessor) return true;
      }
    }
  }
  return false;
}

// Plans with Layout's memory for wgmma; false where it does not fit. `only_kept`: nor if A, of
// several pieces, is to be copied for each of them.
template <class Layout, int kSources>
bool fit_wgmma(ProductPlan* plan, int piece, const DeviceLimits& limits, bool only_kept) {
  constexpr int kMostStages = 12, kMostOfB = 48 << 10;
  split_over_blocks(plan, piece, limits.multiprocessors);
  const int steps = plan->reduction / Layout::kBK, all_of_b = steps * plan->n_tiles;
  plan->keeps_b = all_of_b * Layout::kBBytes <= kMostOfB;
  plan->b_stages = plan->keeps_b ? all_of_b : Layout::kBBytes > (16 << 10) ? 2 : 3;
  for (int second = 3; second >= 2; --second) {
    plan->second_stages = kSources == 2 ? second : 0;
    plan->stages = 0;
    const int left = limits.shared_of_block - Layout(*plan).bytes;
    plan->stages = std::min(left / (Layout::kABytes + 16), kMostStages);
    plan->keeps_a = plan->n_tiles > 1 && plan->stages >= steps;
    if (plan->stages >= 2 && (plan->keeps_a || plan->n_tiles == 1 || !only_kept)) return true;
  }
  return false;
}

}  // namespace fusedres
