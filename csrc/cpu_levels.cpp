// Which of its levels a CPU kernel runs at: the best that this machine has, or the one that was
// set.
//
// csrc/cpu is compiled once per level, in a namespace of its name (setup.py says which levels, and
// with which instructions). Everything that speaks of levels is in this file and in setup.py.
#include "fusedres/cpu_levels.h"

#include <atomic>
#include <stdexcept>

#include "fusedres/add_relu.h"
#include "fusedres/batch_norm.h"
#include "fusedres/bn_act.h"
#include "fusedres/bn_relu_maxpool.h"
#include "fusedres/conv_bn.h"

namespace fusedres {
namespace {

enum Level { kBaseline, kAvx2, kAvx512, kAvx512Bf16, kCount };
constexpr const char* kNames[kCount] = {"baseline", "avx2", "avx512", "avx512_bf16"};

bool runs_here(Level level) {
#ifdef FUSEDRES_X86_LEVELS
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq");
  switch (level) {
    case kBaseline:
      return true;
    case kAvx2:
      return avx2;
    case kAvx512:
      return avx512;
    case kAvx512Bf16:
      return avx512 && __builtin_cpu_supports("avx512bf16");
    case kCount:
      break;
  }
  return false;
#else
  return level == kBaseline;
#endif
}

Level best() {
  Level level = kBaseline;
  for (int i = kBaseline; i < kCount; ++i) {
    if (runs_here(static_cast<Level>(i))) level = static_cast<Level>(i);
  }
  return level;
}

std::atomic<Level>& in_force() {
  static std::atomic<Level> level{best()};
  return level;
}

}  // namespace

std::vector<std::string> cpu_levels() {
  std::vector<std::string> names;
  for (int i = kBaseline; i < kCount; ++i) {
    if (runs_here(static_cast<Level>(i))) names.emplace_back(kNames[i]);
  }
  return names;
}

std::string cpu_level() { return kNames[in_force()]; }

void set_cpu_level(const std::string& name) {
  for (int i = kBaseline; i < kCount; ++i) {
    if (name == kNames[i] && runs_here(static_cast<Level>(i))) {
      in_force() = static_cast<Level>(i);
      return;
    }
  }
  throw std::invalid_argument("no CPU kernels of level " + name + " here");
}

// A launcher of every level, and the one that chooses.
#ifdef FUSEDRES_X86_LEVELS
#define FUSEDRES_LAUNCHER(launch, Params)                                     \
  namespace baseline {                                                        \
  void launch(const Params& params, int threads);                             \
  }                                                                           \
  namespace avx2 {                                                            \
  void launch(const Params& params, int threads);                             \
  }                                                                           \
  namespace avx512 {                                                          \
  void launch(const Params& params, int threads);                             \
  }                                                                           \
  namespace avx512_bf16 {                                                     \
  void launch(const Params& params, int threads);                             \
  }                                                                           \
  void launch(const Params& params, int threads) {                            \
    constexpr void (*kLaunchers[kCount])(const Params&, int) = {              \
        baseline::launch, avx2::launch, avx512::launch, avx512_bf16::launch}; \
    kLaunchers[in_force()](params, threads);                                  \
  }
#else
#define FUSEDRES_LAUNCHER(launch, Params)         \
  namespace baseline {                            \
  void launch(const Params& params, int threads); \
  }                                               \
  void launch(const Params& params, int threads) { baseline::launch(params, threads); }
#endif

FUSEDRES_LAUNCHER(launch_add_relu_fwd, AddReluFwdParams)
FUSEDRES_LAUNCHER(launch_add_relu_bwd, AddReluBwdParams)
FUSEDRES_LAUNCHER(launch_batch_norm_fwd, BatchNormFwdParams)
FUSEDRES_LAUNCHER(launch_batch_norm_bwd, BatchNormBwdParams)
FUSEDRES_LAUNCHER(launch_bn_act_fwd, BnActFwdParams)
FUSEDRES_LAUNCHER(launch_bn_act_bwd, BnActBwdParams)
FUSEDRES_LAUNCHER(launch_bn_relu_maxpool_fwd, BnReluMaxpoolFwdParams)
FUSEDRES_LAUNCHER(launch_bn_relu_maxpool_bwd, BnReluMaxpoolBwdParams)
FUSEDRES_LAUNCHER(launch_conv_bn_wgrad, ConvBnWgradParams)

namespace baseline {
int64_t conv_bn_wgrad_workspace(const ConvBnWgradParams& params);
}
int64_t conv_bn_wgrad_workspace(const ConvBnWgradParams& params) {
  return baseline::conv_bn_wgrad_workspace(params);  // the same at every level
}

}  // namespace fusedres
