// Which of its levels a CPU kernel runs at: the best that this machine has, or the one that was
// set.
//
// csrc/cpu is compiled once per level, in a namespace of its name (setup_cpu.py says which levels,
// and with which instructions). Everything that speaks of levels is in this file and in
// setup_cpu.py.
#include "fusedres/cpu_levels.h"

#include <atomic>
#include <stdexcept>

#include "fusedres/add_relu.h"
#include "fusedres/batch_norm.h"
#include "fusedres/bn_act.h"
#include "fusedres/bn_relu_maxpool.h"
#include "fusedres/conv_bn.h"

// Calls X(level, ..) for each level that there is, every one of which has what those before it
// have.
#if FUSEDRES_CPU_LEVELS == 1
#define FUSEDRES_EACH_LEVEL(X, ...) X(baseline, __VA_ARGS__)
#elif FUSEDRES_CPU_LEVELS == 2
#define FUSEDRES_EACH_LEVEL(X, ...) X(baseline, __VA_ARGS__) X(avx2, __VA_ARGS__)
#elif FUSEDRES_CPU_LEVELS == 3
#define FUSEDRES_EACH_LEVEL(X, ...) \
  X(baseline, __VA_ARGS__) X(avx2, __VA_ARGS__) X(avx512, __VA_ARGS__)
#else
#define FUSEDRES_EACH_LEVEL(X, ...) \
  X(baseline, __VA_ARGS__)          \
  X(avx2, __VA_ARGS__) X(avx512, __VA_ARGS__) X(avx512_bf16, __VA_ARGS__)
#endif

namespace fusedres {
namespace {

#define FUSEDRES_NAME(level, _) #level,
constexpr const char* kNames[] = {FUSEDRES_EACH_LEVEL(FUSEDRES_NAME, )};
constexpr int kCount = sizeof kNames / sizeof kNames[0];

bool runs_here(int level) {
#if FUSEDRES_CPU_LEVELS > 1
  __builtin_cpu_init();
  if (level >= 1 && !(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")))
    return false;
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (level >= 2 && !avx512) return false;
#if FUSEDRES_CPU_LEVELS > 3
  if (level >= 3 && !__builtin_cpu_supports("avx512bf16")) return false;
#endif
#endif
  return level < kCount;
}

int best() {
  int level = 0;
  while (runs_here(level + 1)) ++level;
  return level;
}

std::atomic<int>& in_force() {
  static std::atomic<int> level{best()};
  return level;
}

}  // namespace

std::vector<std::string> cpu_levels() { return {kNames, kNames + best() + 1}; }

std::string cpu_level() { return kNames[in_force()]; }

void set_cpu_level(const std::string& name) {
  for (int level = 0; level <= best(); ++level) {
    if (name != kNames[level]) continue;
    in_force() = level;
    return;
  }
  throw std::invalid_argument("no CPU kernels of level " + name + " here");
}

// A launcher of every level, and the one that chooses.
#define FUSEDRES_DECLARE(level, launch, Params)   \
  namespace level {                               \
  void launch(const Params& params, int threads); \
  }
#define FUSEDRES_ADDRESS(level, launch, Params) level::launch,
#define FUSEDRES_LAUNCHER(launch, Params)                                                          \
  FUSEDRES_EACH_LEVEL(FUSEDRES_DECLARE, launch, Params)                                            \
  void launch(const Params& params, int threads) {                                                 \
    constexpr void (*kLaunchers[])(const Params&,                                                  \
                                   int) = {FUSEDRES_EACH_LEVEL(FUSEDRES_ADDRESS, launch, Params)}; \
    kLaunchers[in_force()](params, threads);                                                       \
  }

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
