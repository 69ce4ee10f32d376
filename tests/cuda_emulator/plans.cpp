// How csrc/cuda/conv_bn_launch.h splits products over devices, at every size that may come: the
// whole product is covered, what a block needs fits, rings are as long as what they have to hold.
// Ends with 0 where all of it holds.
#include <cstdio>
#include <initializer_list>

#include "cuda/conv_bn_launch.h"
#include "cuda/conv_bn_mma.h"
#include "cuda/conv_bn_wgmma.h"

namespace fusedres {

int wrong = 0;
long fits = 0;

void expect(bool right, const char* what, int line, const ProductPlan& plan, int piece) {
  if (right || ++wrong > 20) return;
  fprintf(stderr, "line %d, wrong: %s: %lld rows, %d to %d channels, pieces of %d, %d sums\n", line,
          what, static_cast<long long>(plan.rows), plan.reduction, plan.columns, piece, plan.sums);
}
#define EXPECT(condition) expect(condition, #condition, __LINE__, plan, piece)

constexpr DeviceLimits kA100 = {108, 163 << 10, 164 << 10, 8, 0};
constexpr DeviceLimits kAda = {84, 99 << 10, 100 << 10, 8, 9};
constexpr DeviceLimits kHopper = {132, 227 << 10, 228 << 10, 9, 0};
constexpr DeviceLimits kEmulated = {3, 227 << 10, 228 << 10, 9, 0};

void check_split(const ProductPlan& plan, int piece, const DeviceLimits& limits) {
  const int64_t tiles = ceil_div(plan.rows, kTileRows);
  EXPECT(plan.chunks >= 1 && plan.tiles >= 1);
  EXPECT(static_cast<int64_t>(plan.chunks) * plan.tiles >= tiles);     // all of the rows,
  EXPECT(static_cast<int64_t>(plan.chunks - 1) * plan.tiles < tiles);  // no block without any
  EXPECT(plan.groups * plan.n_tiles * piece == plan.columns);          // all of the columns
  EXPECT(plan.chunks <= most_chunks(plan.rows, limits));               // of the workspace
}

template <int kBN, int kSources, int kVectors>
bool check_mma(ProductPlan plan, int most, const DeviceLimits& limits) {
  using Layout = MmaLayout<kBN, kSources, kVectors>;
  constexpr int piece = kBN;
  if (plan.columns % kBN != 0 || !fit_mma<Layout>(&plan, kBN, most, limits)) return false;
  ++fits;
  check_split(plan, kBN, limits);
  const Layout layout(plan);
  EXPECT(layout.bytes <= limits.shared_of_block);
  EXPECT(plan.stages == 2 || plan.stages == 3);
  EXPECT(Layout::kABytes % 1024 == 0 && Layout::kBBytes % 1024 == 0);  // a pattern each
  EXPECT(layout.staging % 128 == 0 && layout.scratch % 16 == 0);
  EXPECT(layout.running % 16 == 0 && layout.table % 16 == 0);
  return true;
}

template <int kBN, int kSources, int kVectors>
bool check_wgmma(ProductPlan plan, bool only_kept, const DeviceLimits& limits, bool* kept,
                 ProductPlan* chosen = nullptr) {
  using Layout = WgmmaLayout<kBN, kSources, kVectors>;
  constexpr int piece = kBN;
  if (plan.columns % kBN != 0 || !fit_wgmma<Layout, kSources>(&plan, kBN, limits, only_kept)) {
    return false;
  }
  ++fits;
  check_split(plan, kBN, limits);
  const Layout layout(plan);
  const int steps = plan.reduction / Layout::kBK;
  EXPECT(layout.bytes <= limits.shared_of_block);
  EXPECT(plan.stages >= 2 && plan.b_stages >= 1);
  EXPECT((plan.second_stages >= 2) == (kSources == 2));
  EXPECT(!plan.keeps_a || (plan.n_tiles > 1 && plan.stages >= steps));
  EXPECT(!plan.keeps_b || plan.b_stages == steps * plan.n_tiles);
  EXPECT(plan.keeps_b || plan.b_stages >= 2);
  EXPECT(!only_kept || plan.n_tiles == 1 || plan.keeps_a);
  EXPECT(layout.second % 1024 == 0 && layout.b % 1024 == 0);
  EXPECT(layout.staging % 128 == 0 && layout.scratch % 16 == 0);
  EXPECT(layout.running % 16 == 0 && layout.table % 16 == 0 && layout.barriers % 8 == 0);
  *kept = plan.n_tiles == 1 || plan.keeps_a;
  if (chosen != nullptr) *chosen = plan;
  return true;
}

// As the launchers try them; whether one fits, and whether A is then fetched once.
template <int kSources, int kVectors>
bool wgmma_fits(const ProductPlan& plan, bool forward, const DeviceLimits& limits, bool* kept,
                ProductPlan* to = nullptr) {
  for (const bool only : {true, false}) {
    if (forward && check_wgmma<256, kSources, kVectors>(plan, only, limits, kept, to)) return true;
    if (check_wgmma<128, kSources, kVectors>(plan, only, limits, kept, to)) return true;
    if (check_wgmma<64, kSources, kVectors>(plan, only, limits, kept, to)) return true;
  }
  return false;
}

void check_everything() {
  constexpr int kMostOfMma = ConvBnFwdParams::kMostOfMma;
  constexpr int kChannels[] = {64, 128, 192, 256, 320, 512, 832, 1024, 2048};
  constexpr int64_t kRows[] = {1,    127,   128,   129,    300,    1000,
                               9408, 12544, 50176, 200704, 802816, 0x7fffff00};
  for (const DeviceLimits& limits : {kA100, kAda, kHopper, kEmulated}) {
    for (const int64_t rows : kRows) {
      for (const int reduction : kChannels) {
        for (const int columns : kChannels) {
          for (const int sums : {0, 2, 3}) {
            ProductPlan plan = {};
            plan.rows = rows;
            plan.reduction = reduction;
            plan.columns = columns;
            plan.sums = sums;
            const int piece = 64;
            bool kept = false;
            if (sums != 3) {
              check_mma<128, 1, 0>(plan, 1, limits);
              const bool plain = check_mma<64, 1, 0>(plan, 2, limits);
              check_mma<128, 1, 3>(plan, 1, limits);
              check_mma<64, 1, 3>(plan, 2, limits);
              check_mma<128, 2, 6>(plan, 1, limits);
              const bool joined = check_mma<64, 2, 6>(plan, 2, limits);
              EXPECT(plain || reduction > kMostOfMma);
              EXPECT(joined || reduction > kMostOfMma);
              if (limits.major == 9) {
                EXPECT((wgmma_fits<1, 0>(plan, true, limits, &kept)));
                EXPECT((wgmma_fits<1, 3>(plan, true, limits, &kept)));
                EXPECT((wgmma_fits<2, 6>(plan, true, limits, &kept)));
              }
            }
            check_mma<128, 2, 5>(plan, 1, limits);
            const bool gradient = check_mma<64, 2, 5>(plan, 1, limits);
            EXPECT(gradient || reduction > kMostOfMma);
            if (limits.major == 9) EXPECT((wgmma_fits<2, 5>(plan, false, limits, &kept)));
          }
        }
      }
    }
  }
}

// On Hopper the tiles of ResNet-50's stages 1 to 3 at batch 256 are fetched, and their prologues
// done, once; but for the gradient of the 1,024 channels, whose tile does not fit.
void check_resnet() {
  struct Layer {
    int64_t rows;
    int in, out;
  };
  constexpr Layer kLayers[] = {{802816, 64, 64},   {802816, 64, 256},  {802816, 256, 64},
                               {802816, 256, 128}, {200704, 128, 512}, {200704, 512, 128},
                               {200704, 512, 256}, {50176, 256, 1024}, {50176, 1024, 256}};
  for (const Layer& layer : kLayers) {
    ProductPlan plan = {};
    plan.rows = layer.rows;
    plan.reduction = layer.in;
    plan.columns = layer.out;
    plan.sums = 2;
    const int piece = 0;
    bool kept = false;
    EXPECT((wgmma_fits<1, 3>(plan, true, kHopper, &kept)) && kept);
    EXPECT((wgmma_fits<2, 6>(plan, true, kHopper, &kept)) && kept);
    std::swap(plan.reduction, plan.columns);
    plan.sums = 3;
    EXPECT((wgmma_fits<2, 5>(plan, false, kHopper, &kept)));
    EXPECT(kept == (layer.out < 1024));
  }
}

// The sizes of fusedres/ops/_self_check.py, for more tiles than multiprocessors: both ways they
// have to meet blocks of several tiles and pieces, with A kept and not, with B kept and not.
void check_self_check() {
  struct Layer {
    int in, out;
  };
  constexpr Layer kLayers[] = {{64, 128}, {128, 512}, {512, 128}, {256, 1024}, {1024, 512}};
  for (const DeviceLimits& limits : {kHopper, kEmulated}) {
    for (const bool forward : {true, false}) {
      bool several_kept = false, several_not = false, keeps_b = false, streams_b = false;
      ProductPlan plan = {};
      const int piece = 0;
      for (const Layer& layer : kLayers) {
        ProductPlan chosen = {};
        plan.rows = 128 * (limits.multiprocessors + 2) + 77;
        plan.reduction = forward ? layer.in : layer.out;
        plan.columns = forward ? layer.out : layer.in;
        plan.sums = forward || layer.in != 128 ? 2 : 3;
        bool kept = false;
        if (!forward) {
          EXPECT((wgmma_fits<2, 5>(plan, false, limits, &kept, &chosen)));
        } else if (layer.in == 128) {
          EXPECT((wgmma_fits<2, 6>(plan, true, limits, &kept, &chosen)));
        } else {
          EXPECT((wgmma_fits<1, 3>(plan, true, limits, &kept, &chosen)));
        }
        EXPECT(chosen.tiles > 1 && chosen.groups == 1);
        several_kept |= chosen.n_tiles > 1 && chosen.keeps_a;
        several_not |= chosen.n_tiles > 1 && !chosen.keeps_a;
        keeps_b |= chosen.keeps_b;
        streams_b |= !chosen.keeps_b;
      }
      EXPECT(several_kept && several_not && keeps_b && streams_b);
    }
  }
}

}  // namespace fusedres

int main() {
  fusedres::check_everything();
  fusedres::check_resnet();
  fusedres::check_self_check();
  printf("%ld plans\n", fusedres::fits);
  return fusedres::wrong == 0 ? 0 : 1;
}
