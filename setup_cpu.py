"""The levels of instructions that csrc/cpu is compiled for; setup.py's other half, like
setup_cuda.py.

One of them is chosen at run time (csrc/cpu_levels.cpp). No level makes a fused multiply-add of a *
and a +: where one is wanted, the source says so, and all levels that have it give the same bits.
"""

import platform
import subprocess

_AVX2 = ["-mavx2", "-mfma"]
_AVX512 = [f"-mavx512{part}" for part in ("f", "bw", "vl", "dq")]
_AVX512 += ["-mprefer-vector-width=512", *_AVX2]
# each has what those before it have
X86_LEVELS = {
    "baseline": [],
    "avx2": _AVX2,
    "avx512": _AVX512,
    "avx512_bf16": ["-mavx512bf16", *_AVX512],
}


def cpu_levels(cxx: list[str]) -> dict[str, list[str]]:
    """Names of the levels that the compiler knows, and its flags for each."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return {"baseline": []}
    known = {}
    for name, flags in X86_LEVELS.items():
        command = [*cxx, *flags, "-fsyntax-only", "-x", "c++", "/dev/null"]
        if flags and subprocess.run(command, capture_output=True).returncode:
            break  # g++ before 10 does not know bf16
        known[name] = flags
    return known
