// The levels of instructions that CPU kernels are compiled for: baseline (SSE2 on x86-64), avx2,
// avx512, avx512_bf16.
#pragma once

#include <string>
#include <vector>

namespace fusedres {

std::vector<std::string> cpu_levels();  // those that run on this machine, the best one last
std::string cpu_level();                // the one in force, at first the best
// Whether the machine multiplies tiles of bf16 (AMX), by which libraries outrun every level.
bool cpu_has_tiles();
// Takes another one, for tests; std::invalid_argument where there is no such one.
void set_cpu_level(const std::string& name);

}  // namespace fusedres
