// What the selftests share: how they start kernels, and a main() that runs a case of theirs.
#pragma once

#include <cmath>
#include <cstdlib>
#include <string>
#include <vector>

#include "cuda/launch.h"

extern "C" void emulator_configure(uint64_t seed, int multiprocessors,
                                   int blocks_per_multiprocessor, size_t max_shared_bytes);
extern "C" void emulator_set_capability(int major, int minor);
extern "C" const char* emulator_launched();
extern "C" void emulator_clear_launched();

namespace fusedres {

template <class... Params, class... Args>
cudaError_t start(void (*kernel)(Params...), unsigned blocks, unsigned threads, size_t shared_bytes,
                  bool cooperative, Args... args) {
  LaunchConfig config;
  config.blocks = blocks;
  config.threads = threads;
  config.shared_bytes = shared_bytes;
  config.cooperative = cooperative;
  return launch(kernel, config, nullptr, args...);
}

inline bool runs(cudaError_t status) {
  if (status != cudaSuccess) fprintf(stderr, "refused: %s\n", cudaGetErrorName(status));
  return status == cudaSuccess;
}

inline bool check(bool right, const char* what) {
  if (!right) fprintf(stderr, "wrong: %s\n", what);
  return right;
}
#define CHECK(condition) \
  if (!check(condition, #condition)) return false

// CASE [SEED...]
inline int run_cases(int argc, char** argv, size_t max_shared_bytes,
                     bool (*run_case)(const std::string& name)) {
  const std::string name = argc > 1 ? argv[1] : "";
  bool right = argc > 2 || run_case(name);
  for (int i = 2; i < argc; ++i) {
    emulator_configure(strtoull(argv[i], nullptr, 10), 3, 1, max_shared_bytes);
    right = run_case(name) && right;
  }
  return right ? 0 : 1;
}

}  // namespace fusedres
