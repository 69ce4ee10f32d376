// BatchNorm's statistics with all that follows from them per channel, and the gradient of its
// input, on the CPU.
//
// Statistics: one pass. A chunk (see cpu/reduction.h) sums the deviations from its first value and
// their squares; as that value is one of the chunk's own, what cancels in
// M2 = sum d^2 - (sum d)^2 / n is at most n + 1 times M2, and n is small. Chunks, then blocks, are
// merged by Chan's formula in double, in fixed order. E[x^2] - E[x]^2 would cancel without bound.
// Reads y once: 2 bytes per bf16 element, 4 per float.
// Backward: element by element, split over pixels (NHWC) or planes (NCHW). Reads g and y, writes
// dy; the reductions it needs, sums, come from whichever kernel wrote g.
#include "fusedres/batch_norm.h"

#include <cmath>
#include <stdexcept>

#include "common/dispatch.h"
#include "cpu/reduction.h"

namespace fusedres::FUSEDRES_CPU_LEVEL {
namespace {

// A vector of mean's type, or null.
template <class Acc, class Vector>
auto* data_of(const Vector& v, DType dtype) {
  if (v.data != nullptr && v.dtype != dtype) {
    throw std::invalid_argument("batch_norm: on the CPU all vectors are of one type");
  }
  using Pointer = std::conditional_t<std::is_same_v<Vector, ConstVector>, const Acc*, Acc*>;
  return static_cast<Pointer>(v.data);
}

template <class Acc>
constexpr DType kVectorType = sizeof(Acc) == 8 ? DType::kFloat64 : DType::kFloat32;

// Stage 1: count, mean and M2 of each block into partials [partial_rows, 1 + 2*C].
template <class T>
void moments_stage1(const Shape& shape, int threads, const T* y, double* partials) {
  using Acc = acc_t<T>;
  for_each_item(shape, threads, [&](int64_t block, const Tile& item) {
    double* const row = partials + block * (1 + 2 * shape.c);
    double* const mean = row + 1 + item.channel;
    double* const m2 = mean + shape.c;
    std::fill_n(mean, item.channels, 0.0);
    std::fill_n(m2, item.channels, 0.0);
    double count = 0;
    for_each_chunk(shape, item, [&](const Tile& chunk) {
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
      const double total = count + n, share = n / total, weight = count * share;
      for (int64_t i = 0; i < chunk.channels; ++i) {
        const double shift = sums[0][i] * inverse;
        const double chunk_m2 = std::max(0.0, sums[1][i] - shift * sums[0][i]);
        const double delta = pivot[i] + shift - mean[i];
        mean[i] += delta * share;
        m2[i] += chunk_m2 + delta * delta * weight;
      }
      count = total;
    });
    if (item.channel == 0) row[0] = count;
  });
}

// Stage 2: the batch's mean and biased variance of each channel.
template <class Emit>
void moments_stage2(const double* partials, int64_t blocks, int64_t channels, int threads,
                    const Emit& emit) {
  const int64_t columns = 1 + 2 * channels;
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

template <class T>
void batch_norm_fwd(const BatchNormFwdParams& p, int threads) {
  using Acc = acc_t<T>;
  constexpr DType kType = kVectorType<Acc>;
  const Acc* const weight = data_of<Acc>(p.weight, kType);
  const Acc* const bias = data_of<Acc>(p.bias, kType);
  const Acc* const amount = data_of<Acc>(p.momentum_vector, kType);
  Acc* const running_mean = data_of<Acc>(p.running_mean, kType);
  Acc* const running_var = data_of<Acc>(p.running_var, kType);
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
  double* const partials = static_cast<double*>(p.workspace);
  moments_stage1<T>(p.shape, threads, static_cast<const T*>(p.y), partials);
  const Acc step = amount == nullptr ? static_cast<Acc>(p.momentum) : *amount;
  moments_stage2(partials, partial_rows(p.shape), p.shape.c, threads,
                 [=](int64_t c, double mean, double var, double count) {
                   finish(c, static_cast<Acc>(mean), static_cast<Acc>(var));
                   if (running_mean == nullptr || count == 0) return;
                   const Acc unbiased = static_cast<Acc>(out_var[c] * (count / (count - 1)));
                   running_mean[c] = moved(running_mean[c], out_mean[c], step);
                   running_var[c] = moved(running_var[c], unbiased, step);
                 });
}

template <class T>
void batch_norm_bwd(const BatchNormBwdParams& p, int threads) {
  using Acc = acc_t<T>;
  const T* const g = static_cast<const T*>(p.g);
  const T* const y = static_cast<const T*>(p.y);
  const Acc* const mean = static_cast<const Acc*>(p.mean);
  const Acc* const scale = static_cast<const Acc*>(p.scale);
  const Acc* const rstd = static_cast<const Acc*>(p.rstd);
  const Acc* const sums = static_cast<const Acc*>(p.sums);
  T* const dy = static_cast<T*>(p.dy);
  const int64_t channels = p.shape.c;
  Acc* const dweight = data_of<Acc>(p.dweight, kVectorType<Acc>);
  Acc* const dbias = data_of<Acc>(p.dbias, kVectorType<Acc>);
  for (int64_t c = 0; c < channels; ++c) {
    if (dweight != nullptr) dweight[c] = sums[channels + c] * rstd[c];
    if (dbias != nullptr) dbias[c] = sums[c];
  }
  if (!p.training) {
    elementwise<T>(p.shape, threads, [=](auto lanes, int64_t o, int64_t c) {
      using L = decltype(lanes);
      L::store(dy + o, L::channel(scale, c) * L::load(g + o));
    });
    return;
  }
  const double count = std::max<double>(1, p.shape.rows());
  Acc* const c0 = static_cast<Acc*>(p.workspace);
  Acc* const c1 = c0 + channels;
  for (int64_t c = 0; c < channels; ++c) {
    const double r = rstd[c];
    c0[c] = static_cast<Acc>(-scale[c] * (sums[c] / count));
    c1[c] = static_cast<Acc>(-scale[c] * r * r * (sums[channels + c] / count));
  }
  dispatch(streams(p.shape, dy), [&](auto stream) {
    elementwise<T>(p.shape, threads, [=](auto lanes, int64_t o, int64_t c) {
      using L = decltype(lanes);
      const auto centered = L::load(y + o) - L::channel(mean, c);
      const auto shift = L::fma(L::channel(c1, c), centered, L::channel(c0, c));
      const auto value = L::fma(L::channel(scale, c), L::load(g + o), shift);
      stream ? L::stream(dy + o, value) : L::store(dy + o, value);
    });
  });
}

}  // namespace

void launch_batch_norm_fwd(const BatchNormFwdParams& params, int threads) {
  dispatch(params.dtype,
           [&](auto tag) { batch_norm_fwd<typename decltype(tag)::type>(params, threads); });
}

void launch_batch_norm_bwd(const BatchNormBwdParams& params, int threads) {
  dispatch(params.dtype,
           [&](auto tag) { batch_norm_bwd<typename decltype(tag)::type>(params, threads); });
}

}  // namespace fusedres::FUSEDRES_CPU_LEVEL
