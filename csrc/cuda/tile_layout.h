// Where the elements of a tile lie in shared memory, and in the registers of a warp that multiplies
// them: plain arithmetic, which runs, and is tested, on the host.
//
// A tile is made of rows of 128 bytes (or of 64), as bulk copies with a swizzle of that width leave
// them: of every 8 rows of 128 bytes, a pattern of 1,024 bytes, row r has its 16-byte chunks
// permuted by XOR with r, so that 8 lanes that read one chunk of 8 rows, or 8 chunks of one row,
// meet no bank twice.
#pragma once

#include <cstdint>

#include "common/activation.h"

namespace fusedres {

constexpr int kChunkBytes = 16;

// What of a row's number its chunks are permuted by.
template <int kRowBytes>
FUSEDRES_HOST_DEVICE constexpr uint32_t swizzle_key(uint32_t row) {
  static_assert(kRowBytes == 128 || kRowBytes == 64);
  return kRowBytes == 128 ? row & 7u : (row >> 1) & 3u;
}

// Offset in bytes of a 16-byte chunk of a row from the start of its tile, which lies on 1,024
// bytes.
template <int kRowBytes>
FUSEDRES_HOST_DEVICE constexpr uint32_t chunk_offset(uint32_t row, uint32_t chunk) {
  return row * kRowBytes + ((chunk ^ swizzle_key<kRowBytes>(row)) * kChunkBytes);
}

// The same in a warp's staging buffer, 16 rows of 128 bytes, which is written in fragments, of 8
// rows by 4 lanes each, and read in rows. No bank is met twice where each lane writes 4 bytes, 4
// lanes a chunk of their row; where each writes 8, 4 lanes two chunks 2j and 2j + 1 (half a warp at
// a time, so 4 rows, whose keys differ above their lowest bit); and where 8 lanes read a row.
FUSEDRES_HOST_DEVICE constexpr uint32_t staging_offset(uint32_t row, uint32_t chunk) {
  const uint32_t key = ((row & 3u) << 1) | ((row >> 2) & 1u);
  return row * 128u + ((chunk ^ key) * kChunkBytes);
}

// --- fragments of m16n8k16 and of m64nNk16, which are the same for each warp ---------------------

// Of A [16 rows, 16 k] a lane holds four words of two neighbours in k. Rows come in two halves, as
// do the k: word w is of half w % 2 of the rows and half w / 2 of the k.
FUSEDRES_HOST_DEVICE constexpr int fragment_row(int lane) { return lane / 4; }   // and 8 below it
FUSEDRES_HOST_DEVICE constexpr int fragment_pair(int lane) { return lane % 4; }  // of 2 elements

// The 16-byte row that a lane points at when a warp loads the four 8x8 matrices of A [16, 16] at k
// step kk of a tile of rows of K: (row of the 16, chunk of that row).
FUSEDRES_HOST_DEVICE constexpr uint32_t matrix_row(uint32_t lane) { return lane % 16u; }
FUSEDRES_HOST_DEVICE constexpr uint32_t matrix_chunk(uint32_t lane, uint32_t kk) {
  return (kk * 2u) ^ (lane / 16u);  // xor, as what follows is one too
}

// --- descriptors of B in shared memory, for warpgroups (PTX: matrix descriptor) ------------------

constexpr uint64_t kSwizzle128 = 1;  // of bits 62 and 63

// Addresses and strides are in bytes, multiples of 16 and below 2^18.
FUSEDRES_HOST_DEVICE constexpr uint64_t matrix_descriptor(uint32_t address, uint32_t leading,
                                                          uint32_t stride) {
  return static_cast<uint64_t>((address & 0x3ffffu) >> 4) |
         (static_cast<uint64_t>((leading & 0x3ffffu) >> 4) << 16) |
         (static_cast<uint64_t>((stride & 0x3ffffu) >> 4) << 32) | (kSwizzle128 << 62);
}

// B as rows of 64 k, one for each column n of the product: [N, 64], K-major. `kk` counts steps of
// 16 k. Every 8 rows repeat the pattern; the leading stride means nothing where a row is one
// pattern wide.
FUSEDRES_HOST_DEVICE constexpr uint64_t k_major_descriptor(uint32_t tile, uint32_t kk) {
  return matrix_descriptor(tile + kk * 32u, 16u, 1024u);
}

// B as rows of 64 columns n, one for each of 64 k: panels [64 k, 64 n] one after another, N-major.
// From one panel to the next it is 8 KB, from 8 k to the next 8 a pattern.
constexpr uint32_t kPanelBytes = 64 * 128;
FUSEDRES_HOST_DEVICE constexpr uint64_t n_major_descriptor(uint32_t tile, uint32_t kk) {
  return matrix_descriptor(tile + kk * 2048u, kPanelBytes, 1024u);
}

}  // namespace fusedres
