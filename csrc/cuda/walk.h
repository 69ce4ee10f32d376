// How light kernels walk over an activation, seen as M = N*H*W rows of C channels.
//
// A thread owns kVector neighbouring channels, whose constants it keeps in registers, and goes down
// the rows. A block is `columns` threads wide and `lanes` threads high; the grid cuts the channels
// into groups and the rows into chunks, as many as fit on the device at once. With kVector > 1 the
// tensor is NHWC, C a multiple of kVector and every access one of 16 bytes; with kVector == 1 it is
// anything dense, NCHW too, where a block takes one channel and its threads lie along the pixels.
#pragma once

#include "cuda/launch.h"

namespace fusedres {

struct Walk {
  int64_t rows;      // M
  int64_t channels;  // C
  int64_t plane;     // pixels of one channel that lie side by side: H*W in NCHW, else 1
  int64_t chunk;     // rows of a block
  int columns, lanes;
  int groups, chunks;  // blocks across the channels and across the rows

  unsigned blocks() const { return static_cast<unsigned>(groups) * chunks; }
};

// For blocks of which `resident` fit on the device at once.
template <int kVector>
Walk make_walk(const Shape& shape, int64_t resident) {
  constexpr int64_t kMostColumns = kVector == 1 ? 128 : 32;  // 512 bytes of a row, or 256 and less
  Walk walk = {};
  walk.rows = shape.rows();
  walk.channels = shape.c;
  walk.plane = shape.channels_inner() ? 1 : shape.hw();
  const int64_t across = shape.channels_inner() ? ceil_div(shape.c, kVector) : shape.c;
  const int64_t most = shape.channels_inner() ? kMostColumns : 1;
  const int64_t groups = ceil_div(across, most);
  walk.columns = static_cast<int>(ceil_div(across, groups));
  walk.groups = static_cast<int>(groups);
  walk.lanes = kThreads / walk.columns;
  const int64_t useful = ceil_div(walk.rows, walk.lanes);  // a row for every lane
  const int64_t fits = resident / groups;
  const int64_t chunks = fits < 1 ? 1 : fits < useful ? fits : useful;
  walk.chunk = chunks > 0 ? ceil_div(walk.rows, chunks) : 0;
  walk.chunks = walk.chunk > 0 ? static_cast<int>(ceil_div(walk.rows, walk.chunk)) : 0;
  return walk;
}

// The walk for blocks of kKernel with kSharedBytes on a device, which must be current.
template <int kVector, auto kKernel, size_t kSharedBytes>
cudaError_t fit_walk(const Shape& shape, int device, Walk* walk) {
  int64_t resident = 0;
  const cudaError_t status = resident_blocks<kKernel, kSharedBytes>(device, &resident);
  *walk = make_walk<kVector>(shape, resident);
  return status;
}

// 16 bytes of elements where kernels may take them so, else 1.
template <class T, class... Pointers>
bool takes_vectors(const Shape& shape, Pointers... pointers) {
  constexpr int64_t kVector = 16 / sizeof(T);
  return shape.channels_inner() && shape.c % kVector == 0 && aligned_16(pointers...);
}

// Calls f with the vector width as a constant.
template <class T, class F>
cudaError_t dispatch_vector(bool vectors, const F& f) {
  if (vectors) return f(std::integral_constant<int, 16 / sizeof(T)>{});
  return f(std::integral_constant<int, 1>{});
}

// A number of rows that the compiler knows. (std::integral_constant converts on the host only.)
template <int kCount>
struct Count {
  FUSEDRES_HOST_DEVICE constexpr operator int() const { return kCount; }
};

// The part of a walk that is this thread's.
template <int kVector>
struct Strip {
  const Walk& walk;
  int column, lane;
  int64_t channel;  // the first of kVector
  int64_t part;     // index of the chunk
  int64_t begin, end;
  bool active;  // the channels exist

  __device__ explicit Strip(const Walk& w) : walk(w) {
    const int thread = static_cast<int>(threadIdx.x), block = static_cast<int>(blockIdx.x);
    column = thread % walk.columns;
    lane = thread / walk.columns;
    channel = (static_cast<int64_t>(block % walk.groups) * walk.columns + column) * kVector;
    part = block / walk.groups;
    active = lane < walk.lanes && channel < walk.channels;
    begin = part * walk.chunk + lane;
    const int64_t next = (part + 1) * walk.chunk;
    end = !active ? 0 : next < walk.rows ? next : walk.rows;
  }

  // Of the first of this thread's elements in a row.
  __device__ int64_t offset(int64_t row) const {
    FUSEDRES_DEVICE_CHECK(0 <= row && row < walk.rows && channel + kVector <= walk.channels);
    if (kVector > 1 || walk.plane == 1) return row * walk.channels + channel;
    const int64_t image = row / walk.plane;
    return (image * walk.channels + channel - image) * walk.plane + row;
  }

  // for_each_group from the last row to the first: for a pass after one that went down the same
  // tensor, whose last rows are still in the cache.
  template <int kUnroll, class Body>
  __device__ void for_each_group_upwards(const Body& body) const {
    if (begin >= end) return;
    const int64_t rows = (end - begin + walk.lanes - 1) / walk.lanes;
    const int64_t whole = rows / kUnroll * kUnroll;
    if (whole < rows) body(begin + whole * walk.lanes, static_cast<int>(rows - whole));
    const int64_t step = static_cast<int64_t>(walk.lanes) * kUnroll;
    for (int64_t row = begin + whole * walk.lanes - step; row >= begin; row -= step) {
      body(row, Count<kUnroll>{});
    }
  }

  // Calls body(row, count) for groups of up to kUnroll rows: row, row + lanes, ..., `count` of
  // them, whose loads are then in flight together. `count` is a constant but for the last group.
  template <int kUnroll, class Body>
  __device__ void for_each_group(const Body& body) const {
    const int64_t step = static_cast<int64_t>(walk.lanes) * kUnroll;
    int64_t row = begin;
    for (; row + step - walk.lanes < end; row += step) {
      body(row, Count<kUnroll>{});
    }
    if (row < end) body(row, static_cast<int>((end - row + walk.lanes - 1) / walk.lanes));
  }
};

// This thread's values of a [C] vector; 0 where its channels do not exist.
template <int kVector, class Acc>
__device__ __forceinline__ void load_channels(const Strip<kVector>& strip, const Acc* vector,
                                              Acc (&values)[kVector]) {
#pragma unroll
  for (int i = 0; i < kVector; ++i) values[i] = strip.active ? vector[strip.channel + i] : Acc(0);
}

template <int kVector, class Acc>
__device__ __forceinline__ void store_channels(const Strip<kVector>& strip, Acc* vector,
                                               const Acc (&values)[kVector]) {
#pragma unroll
  for (int i = 0; i < kVector; ++i) vector[strip.channel + i] = values[i];
}

// values where round(relu((y - mean)*scale + bias)) lets them pass. The activation is the forward's
// to the bit: one that rounds to zero masks.
template <class T, int kVector, class Acc>
__device__ __forceinline__ void mask_from_y(const Acc (&y)[kVector], const Acc (&mean)[kVector],
                                            const Acc (&scale)[kVector], const Acc (&bias)[kVector],
                                            Acc (&values)[kVector]) {
  Acc u[kVector];
#pragma unroll
  for (int i = 0; i < kVector; ++i) u[i] = (y[i] - mean[i]) * scale[i] + bias[i];
  const Vector<T, kVector> a = rounded<T, kVector>(u);
#pragma unroll
  for (int i = 0; i < kVector; ++i) values[i] = relu_gate(to_acc(a.values[i]), values[i]);
}

// Adds up what the lanes of each column have, in a fixed order; lane 0 gets the sums. Needs shared
// memory for kCount * kThreads values.
template <int kCount, int kVector, class Acc>
__device__ void sum_lanes(const Strip<kVector>& strip, Acc (&values)[kCount]) {
  Acc* const shared = shared_memory<Acc>() + threadIdx.x;  // [kCount][kThreads]
#pragma unroll
  for (int k = 0; k < kCount; ++k) shared[k * kThreads] = values[k];
  for (int left = strip.walk.lanes; left > 1;) {
    const int half = (left + 1) / 2;
    __syncthreads();
    if (strip.lane < left - half) {
      const Acc* const other = shared + half * strip.walk.columns;
#pragma unroll
      for (int k = 0; k < kCount; ++k) {
        values[k] += other[k * kThreads];
        shared[k * kThreads] = values[k];
      }
    }
    left = half;
  }
}

}  // namespace fusedres
