// BatchNorm's statistics and the gradient of its input in parts: what the passes over memory run
// over a tensor, and a convolution over a chunk that a cache holds.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <stdexcept>

#include "cpu/reduction.h"
#include "fusedres/batch_norm.h"

namespace fusedres::FUSEDRES_CPU_LEVEL {

// A vector of mean's type, or null.
template <class Acc, class Vector>
auto* data_of(const Vector& v) {
  constexpr DType kType = sizeof(Acc) == 8 ? DType::kFloat64 : DType::kFloat32;
  if (v.data != nullptr && v.dtype != kType) {
    throw std::invalid_argument("batch_norm: on the CPU all vectors are of one type");
  }
  using Pointer = std::conditional_t<std::is_same_v<Vector, ConstVector>, const Acc*, Acc*>;
  return static_cast<Pointer>(v.data);
}

// A row of partials: count, mean [C] and M2 [C] of some pixels.
inline int64_t moments_columns(int64_t channels) { return 1 + 2 * channels; }

// The moments of a chunk join those of `count` pixels before it. A chunk sums the deviations from
// its first value and their squares.
template <class T>
void add_moments(const Shape& shape, const Tile& chunk, const T* y, double count, double* mean,
                 double* m2) {
  using Acc = acc_t<T>;
  alignas(64) Acc pivot[kTile], sums[2][kTileRow];
  const bool inner = shape.channels_inner();
  const T* const first =
      y + (inner ? chunk.row * shape.c + chunk.channel : plane_offset(shape, chunk));
  for (int64_t i = 0; i < chunk.channels; ++i) pivot[i] = to_acc(first[i]);
  const Acc* const center = pivot;
  const int64_t channel = chunk.channel;
  sum_tile<2, T>(
      shape, chunk,
      [=](auto lanes, int64_t o, int64_t c) {
        using L = decltype(lanes);
        const auto d = L::load(y + o) - L::channel(center, c - channel);
        return Factors<typename L::Values>{d, d, {}};
      },
      sums);
  const double n = chunk.rows, inverse = 1 / n;
  const double share = n / (count + n), weight = count * share;
  for (int64_t i = 0; i < chunk.channels; ++i) {
    const double shift = sums[0][i] * inverse;
    const double chunk_m2 = std::max(0.0, sums[1][i] - shift * sums[0][i]);
    const double delta = pivot[i] + shift - mean[i];
    mean[i] += delta * share;
    m2[i] += chunk_m2 + delta * delta * weight;
  }
}

// Stage 2: the batch's mean and biased variance of each channel.
template <class Emit>
void moments_stage2(const double* partials, int64_t blocks, int64_t channels, int threads,
                    const Emit& emit) {
  const int64_t columns = moments_columns(channels);
  parallel_for(ceil_div(channels, kColumns), blocks * channels, threads, [&](int64_t tile) {
    const int64_t begin = tile * kColumns, width = std::min(kColumns, channels - begin);
    double mean[kColumns] = {}, m2[kColumns] = {}, count = 0;
    for (int64_t block = 0; block < blocks; ++block) {
      const double* const row = partials + block * columns;
      const double* const other = row + 1 + begin;
      merge_moments(count, mean, m2, row[0], other, other + channels, width);
      count += row[0];
    }
    for (int64_t i = 0; i < width; ++i) {
      emit(begin + i, mean[i], m2[i] / std::max(1.0, count), count);
    }
  });
}

// torch.lerp, whose formula never leaves the interval.
template <class Acc>
Acc moved(Acc from, Acc to, Acc amount) {
  return amount < Acc(0.5) ? from + amount * (to - from) : to - (to - from) * (Acc(1) - amount);
}

// All results per channel: in training from the partials of so many blocks, else from the running
// statistics.
template <class T>
void settle_statistics(const BatchNormFwdParams& p, const double* partials, int64_t blocks,
                       int threads) {
  using Acc = acc_t<T>;
  const Acc* const weight = data_of<Acc>(p.weight);
  const Acc* const bias = data_of<Acc>(p.bias);
  const Acc* const amount = data_of<Acc>(p.momentum_vector);
  Acc* const running_mean = data_of<Acc>(p.running_mean);
  Acc* const running_var = data_of<Acc>(p.running_var);
  Acc* const out_mean = static_cast<Acc*>(p.mean);
  Acc* const out_var = static_cast<Acc*>(p.var);
  Acc* const out_rstd = static_cast<Acc*>(p.rstd);
  Acc* const out_scale = static_cast<Acc*>(p.scale);
  Acc* const out_shift = static_cast<Acc*>(p.shift);
  const double eps = p.eps;
  const auto finish = [=](int64_t c, Acc mean, Acc var) {
    out_mean[c] = mean;
    out_var[c] = var;
    out_rstd[c] = static_cast<Acc>(1 / std::sqrt(static_cast<double>(var) + eps));
    out_scale[c] = weight == nullptr ? out_rstd[c] : weight[c] * out_rstd[c];
    out_shift[c] = bias == nullptr ? Acc(0) : bias[c];
  };
  if (!p.training) {
    for (int64_t c = 0; c < p.shape.c; ++c) finish(c, running_mean[c], running_var[c]);
    return;
  }
  const Acc step = amount == nullptr ? static_cast<Acc>(p.momentum) : *amount;
  moments_stage2(partials, blocks, p.shape.c, threads,
                 [=](int64_t c, double mean, double var, double count) {
                   finish(c, static_cast<Acc>(mean), static_cast<Acc>(var));
                   if (running_mean == nullptr || count == 0) return;
                   const Acc unbiased = static_cast<Acc>(out_var[c] * (count / (count - 1)));
                   running_mean[c] = moved(running_mean[c], out_mean[c], step);
                   running_var[c] = moved(running_var[c], unbiased, step);
                 });
}

// Writes dweight and dbias, and into the workspace what dy adds to scale*g: c0 and c1.
template <class T>
void settle_coefficients(const BatchNormBwdParams& p) {
  using Acc = acc_t<T>;
  const Acc* const scale = static_cast<const Acc*>(p.scale);
  const Acc* const rstd = static_cast<const Acc*>(p.rstd);
  const Acc* const sums = static_cast<const Acc*>(p.sums);
  const int64_t channels = p.shape.c;
  Acc* const dweight = data_of<Acc>(p.dweight);
  Acc* const dbias = data_of<Acc>(p.dbias);
  const double count = std::max<double>(1, p.shape.rows());
  Acc* const c0 = static_cast<Acc*>(p.workspace);
  Acc* const c1 = c0 + channels;
  for (int64_t c = 0; c < channels; ++c) {
    if (dweight != nullptr) dweight[c] = sums[channels + c] * rstd[c];
    if (dbias != nullptr) dbias[c] = sums[c];
    const double r = rstd[c];
    c0[c] = static_cast<Acc>(-scale[c] * (sums[c] / count));
    c1[c] = static_cast<Acc>(-scale[c] * r * r * (sums[channels + c] / count));
  }
}

// Calls body(value), value(lanes, offset, channel) being dy before it is rounded.
template <class T, class Body>
void with_input_gradient(const BatchNormBwdParams& p, const Body& body) {
  using Acc = acc_t<T>;
  const T* const g = static_cast<const T*>(p.g);
  const T* const y = static_cast<const T*>(p.y);
  const Acc* const mean = static_cast<const Acc*>(p.mean);
  const Acc* const scale = static_cast<const Acc*>(p.scale);
  const Acc* const c0 = static_cast<const Acc*>(p.workspace);
  const Acc* const c1 = c0 + p.shape.c;
  if (!p.training) {
    body([=](auto lanes, int64_t o, int64_t c) {
      using L = decltype(lanes);
      return L::channel(scale, c) * L::load(g + o);
    });
    return;
  }
  body([=](auto lanes, int64_t o, int64_t c) {
    using L = decltype(lanes);
    const auto centered = L::load(y + o) - L::channel(mean, c);
    const auto shift = L::fma(L::channel(c1, c), centered, L::channel(c0, c));
    return L::fma(L::channel(scale, c), L::load(g + o), shift);
  });
}

}  // namespace fusedres::FUSEDRES_CPU_LEVEL
