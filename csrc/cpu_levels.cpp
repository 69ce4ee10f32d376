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
#ifdef __x86_64__
#include <cpuid.h>
#endif

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

bool cpu_has_tiles() {
#ifdef __x86_64__
  static const bool found = [] {  // asked once: a virtual machine may take long to answer
    constexpr unsigned kTilesOfBf16 = 1u << 22;  // CPUID.(7, 0).EDX: AMX-BF16
    unsigned a = 0, b = 0, c = 0, d = 0;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && (d & kTilesOfBf16) != 0;
  }();
  return found;
#else
  return false;
#endif
}

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
FUSEDRES_LAUNCHER(launch_conv_bn_fwd, ConvBnFwdParams)
FUSEDRES_LAUNCHER(launch_conv_bn_dgrad, ConvBnDgradParams)
FUSEDRES_LAUNCHER(launch_conv_bn_wgrad, ConvBnWgradParams)

// Bytes of a workspace, the same at every level.
#define FUSEDRES_WORKSPACE(workspace, Params) \
  namespace baseline {                        \
  int64_t workspace(const Params& params);    \
  }                                           \
  int64_t workspace(const Params& params) { return baseline::workspace(params); }

FUSEDRES_WORKSPACE(conv_bn_fwd_workspace, ConvBnFwdParams)
FUSEDRES_WORKSPACE(conv_bn_dgrad_workspace, ConvBnDgradParams)
FUSEDRES_WORKSPACE(conv_bn_wgrad_workspace, ConvBnWgradParams)

}  // namespace fusedres
