// What the two products of conv_bn's 1x1 kernels share: how work is split, and what they are made
// for (conv_bn_prologue.h and conv_bn_epilogue.h have the parts that touch data).
//
//   [M, columns] = prologue([M, reduction]) @ B,   M = N*H*W
//
// A block goes over a chunk of the rows, tile by tile of kTileRows; of each tile it makes n_tiles
// pieces of kBN columns, one after another. Eight warps multiply, each 16 rows of the tile and all
// of the columns, whatever the instruction: fragments, and with them prologue and epilogue, are the
// same for mma.sync and for a warpgroup's wgmma. Sums over rows stay on the chip until the block is
// done, and leave one partial row a chunk.
#pragma once

#include "cuda/tensor_core.h"
#include "fusedres/conv_bn.h"

namespace fusedres {

constexpr int kTileRows = 128, kWarpRows = 16, kWarps = kTileRows / kWarpRows;
constexpr int kMultipliers = kWarps * 32;  // threads that multiply
constexpr int kStagingBytes = 16 * 128;    // of a warp: rows of its tile on their way out

// Blocks of mma.sync's kernels that a multiprocessor has registers for, at most.
constexpr int kMostResidents = 2;

struct ProductPlan {
  int64_t rows;            // M
  int reduction, columns;  // multiples of 64
  int tiles, chunks;       // tiles of rows a chunk, and chunks
  int groups, n_tiles;     // blocks beside each other over the columns, pieces of each
  int sums;                // values that a column leaves: 2 or 3; 0: none are wanted
  int stages;              // of mma.sync's ring; of wgmma's ring of the first source of A
  int second_stages;       // of wgmma's ring of the second one; 0 where there is none
  int b_stages;            // of wgmma's ring of B
  bool keeps_a, keeps_b;   // wgmma: a tile's A stays for all pieces; B stays for all tiles

  unsigned blocks() const { return static_cast<unsigned>(chunks) * groups; }
};

// The part of the product that is this block's. Found anew where it is wanted: kept, it would take
// registers from the accumulators.
struct BlockPart {
  int chunk, group;
  int64_t first_tile;
  int tiles;   // of rows; at least one
  int column;  // the first

  __device__ BlockPart(const ProductPlan& plan, int piece) {
    int block = static_cast<int>(blockIdx.x);
    forget(block);
    chunk = block / plan.groups;
    group = block % plan.groups;
    first_tile = static_cast<int64_t>(chunk) * plan.tiles;
    const int64_t left = (plan.rows + kTileRows - 1) / kTileRows - first_tile;
    tiles = static_cast<int>(left < plan.tiles ? left : plan.tiles);
    column = group * plan.n_tiles * piece;
  }
};

// Rows of tile `index` that exist and are of the warp: 0 to 16.
__device__ __forceinline__ int rows_of_warp(const ProductPlan& plan, int64_t tile, int warp) {
  const int64_t left = plan.rows - (tile * kTileRows + warp * kWarpRows);
  return left < 0 ? 0 : left < kWarpRows ? static_cast<int>(left) : kWarpRows;
}

// Two neighbours in a word, as floats and back.
template <class T>
__device__ __forceinline__ void unpack_pair(uint32_t word, float (&x)[2]) {
  unpack(Packed<T, 2>{{word}}, x);
}
template <class T>
__device__ __forceinline__ uint32_t pack_pair(const float (&x)[2]) {
  T pair[2];
  round_pair(x[0], x[1], pair);
  uint32_t word;
  memcpy(&word, pair, sizeof word);
  return word;
}

}  // namespace fusedres
