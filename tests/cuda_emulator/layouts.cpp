// csrc/cuda/tile_layout.h against plain loops, everywhere; ends with 0 where all agrees.
#include <cstdint>
#include <cstdio>
#include <map>
#include <set>
#include <vector>

#include "cuda/tile_layout.h"

namespace fusedres {

int wrong = 0;

void expect(bool right, const char* what, int line) {
  if (right || ++wrong > 20) return;
  fprintf(stderr, "line %d, wrong: %s\n", line, what);
}
#define EXPECT(condition) expect(condition, #condition, __LINE__)

// Lanes that access `bytes` bytes each at once meet no bank of four bytes twice.
bool without_conflict(const std::vector<uint32_t>& addresses, uint32_t bytes) {
  std::set<uint32_t> banks;
  for (const uint32_t address : addresses) {
    if (address % bytes) return false;
    for (uint32_t byte = 0; byte < bytes; byte += 4) {
      if (!banks.insert((address + byte) / 4 % 32).second) return false;
    }
  }
  return true;
}

// Bits of the address by others, as the hardware does it.
uint32_t swizzled(uint32_t address, int row_bytes) {
  return row_bytes == 128 ? address ^ (address >> 3 & 0x70u) : address ^ (address >> 3 & 0x30u);
}

template <int kRowBytes>
void check_chunks() {
  constexpr uint32_t kRows = 256, kChunks = kRowBytes / 16;
  std::set<uint32_t> all;
  for (uint32_t row = 0; row < kRows; ++row) {
    for (uint32_t chunk = 0; chunk < kChunks; ++chunk) {
      const uint32_t offset = chunk_offset<kRowBytes>(row, chunk);
      EXPECT(offset == swizzled(row * kRowBytes + chunk * 16, kRowBytes));
      EXPECT(offset < kRows * kRowBytes && all.insert(offset).second);
    }
  }
  for (uint32_t row = 0; row < kRows; row += 8) {
    for (uint32_t chunk = 0; chunk < kChunks; ++chunk) {  // of 8 rows
      std::vector<uint32_t> addresses;
      for (uint32_t i = 0; i < 8; ++i) {
        addresses.push_back(chunk_offset<kRowBytes>(row + i, chunk));
      }
      EXPECT(without_conflict(addresses, 16));
    }
    for (uint32_t i = 0; i < 8 * kChunks; i += 8) {  // in the order of the tile
      std::vector<uint32_t> addresses;
      for (uint32_t k = i; k < i + 8; ++k) {
        addresses.push_back(chunk_offset<kRowBytes>(row + k / kChunks, k % kChunks));
      }
      EXPECT(without_conflict(addresses, 16));
    }
  }
}

void check_staging() {
  std::set<uint32_t> all;
  for (uint32_t row = 0; row < 16; ++row) {
    std::vector<uint32_t> addresses;
    for (uint32_t chunk = 0; chunk < 8; ++chunk) {
      addresses.push_back(staging_offset(row, chunk));
      EXPECT(addresses.back() < 16 * 128 && all.insert(addresses.back()).second);
    }
    EXPECT(without_conflict(addresses, 16));
  }
  for (uint32_t half = 0; half < 16; half += 8) {  // of the rows
    for (uint32_t chunk = 0; chunk < 8; ++chunk) {
      std::vector<uint32_t> addresses;
      for (uint32_t lane = 0; lane < 32; ++lane) {
        addresses.push_back(staging_offset(half + lane / 4, chunk) + lane % 4 * 4);
      }
      EXPECT(without_conflict(addresses, 4));
    }
    for (uint32_t pair = 0; pair < 4; ++pair) {
      for (uint32_t first = 0; first < 32; first += 16) {  // 8 bytes a lane: half a warp at once
        std::vector<uint32_t> addresses;
        for (uint32_t lane = first; lane < first + 16; ++lane) {
          const uint32_t chunk = pair * 2 + lane % 4 / 2;
          addresses.push_back(staging_offset(half + lane / 4, chunk) + lane % 2 * 8);
        }
        EXPECT(without_conflict(addresses, 8));
      }
    }
  }
}

void check_fragments() {
  for (int lane = 0; lane < 32; ++lane) {
    EXPECT(fragment_row(lane) == lane / 4 && fragment_pair(lane) == lane % 4);
    for (uint32_t kk = 0; kk < 4; ++kk) {
      // Word w is of the matrix that lanes 8w.. point at: half w % 2 of the rows, w / 2 of the k.
      const int w = lane / 8;
      EXPECT(matrix_row(lane) == static_cast<uint32_t>(w % 2 * 8 + lane % 8));
      EXPECT(matrix_chunk(lane, kk) == kk * 2 + w / 2);
    }
  }
}

struct Fields {
  uint32_t start, leading, stride;
};

Fields fields_of(uint64_t descriptor) {
  constexpr uint64_t kUnused =
      uint64_t{0x3} << 14 | uint64_t{0x3} << 30 | uint64_t{0x3fff} << 46 | uint64_t{0x3ff} << 52;
  EXPECT((descriptor & kUnused) == 0);  // with the base offset, which is 0
  EXPECT(descriptor >> 62 == 1);        // 128 bytes
  const auto bytes = [&](int first) {
    return static_cast<uint32_t>(descriptor >> first & 0x3fff) * 16;
  };
  return {bytes(0), bytes(16), bytes(32)};
}

void check_descriptors() {
  for (uint32_t tile = 0; tile < 228 << 10; tile += 1024) {
    for (uint32_t kk = 0; kk < 4; ++kk) {
      const Fields k_major = fields_of(k_major_descriptor(tile, kk));
      EXPECT(k_major.start == tile + kk * 32 && k_major.stride == 1024);
      const Fields n_major = fields_of(n_major_descriptor(tile, kk));
      EXPECT(n_major.start == tile + kk * 2048 && n_major.stride == 1024);
      EXPECT(n_major.leading == kPanelBytes);
    }
  }
  for (const uint32_t bytes : {0u, 16u, 1024u, 0x3fff0u}) {
    const Fields fields = fields_of(matrix_descriptor(bytes, bytes ^ 16u, bytes ^ 32u));
    EXPECT(fields.start == bytes && fields.leading == (bytes ^ 16u));
    EXPECT(fields.stride == (bytes ^ 32u));
  }
}

// Where copies of boxes [rows, 64] to `to` leave each element, in the order of the matrix.
void copy_box(std::map<uint32_t, int>* shared, uint32_t to, int rows, int first, int stride) {
  for (int row = 0; row < rows; ++row) {
    for (int column = 0; column < 64; ++column) {
      const uint32_t address = to + row * 128 + column * 2;
      (*shared)[swizzled(address, 128)] = first + row * stride + column;
    }
  }
}

// Every element that a product of 16 k reads is the one that a copy has left for it.
void check_tiles() {
  constexpr int kN = 256;
  for (const uint32_t tile : {0u, 1024u, 5u << 10, 64u << 10}) {
    std::map<uint32_t, int> k_major, n_major;
    copy_box(&k_major, tile, kN, 0, 64);  // [N, 64 k]
    for (int panel = 0; panel < kN / 64; ++panel) {
      copy_box(&n_major, tile + panel * kPanelBytes, 64, panel * 64, kN);  // [64 k, N]
    }
    for (uint32_t kk = 0; kk < 4; ++kk) {
      const Fields by_k = fields_of(k_major_descriptor(tile, kk));
      const Fields by_n = fields_of(n_major_descriptor(tile, kk));
      for (uint32_t n = 0; n < kN; ++n) {
        for (uint32_t k = 0; k < 16; ++k) {
          const uint32_t in_k = by_k.start + n / 8 * by_k.stride + n % 8 * 128 + k * 2;
          const uint32_t in_n =
              by_n.start + n / 64 * by_n.leading + n % 64 * 2 + k / 8 * by_n.stride + k % 8 * 128;
          const int whole_k = static_cast<int>(kk * 16 + k), column = static_cast<int>(n);
          EXPECT(k_major.at(swizzled(in_k, 128)) == column * 64 + whole_k);
          EXPECT(n_major.at(swizzled(in_n, 128)) == whole_k * kN + column);
        }
      }
    }
  }
}

}  // namespace fusedres

int main() {
  fusedres::check_chunks<128>();
  fusedres::check_chunks<64>();
  fusedres::check_staging();
  fusedres::check_fragments();
  fusedres::check_descriptors();
  fusedres::check_tiles();
  return fusedres::wrong == 0 ? 0 : 1;
}
