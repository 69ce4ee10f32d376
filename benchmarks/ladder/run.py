"""Compiles the kernel ladder with nvcc and runs it.

    python benchmarks/ladder/run.py [--archs 90] [--build-only] [arguments of the ladder]

Arguments of the ladder: --m M --c C --k K (one size instead of ResNet-50's), --rungs NAME,NAME,
--check-only, --json FILE (a row a line), --runs N, --seed N. Ends with 1 where a rung is wrong.
Needs nvcc (CUDA_HOME or PATH), g++ and ninja; objects stay in build/ladder.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CSRC = ROOT / "csrc"
sys.path.insert(0, str(ROOT))
from setup_cuda import find_nvcc, output_of, toolkit_file  # noqa: E402

sys.path.pop(0)  # whose package is not what the tests mean

RUNGS = sorted(HERE.glob("[1-9]_*.cu"))
LIBRARY = [
    CSRC / "cuda" / f"{name}.cu"
    for name in ("conv_bn", "conv_bn_fwd_mma", "conv_bn_fwd_wgmma", "batch_norm", "finish_sums")
]
DEFINES = ["-DFUSEDRES_WITH_CUDA", "-DFUSEDRES_WITH_SM90A"]
COMMON = ["-std=c++17", "-O3", f"-I{CSRC}", f"-I{CSRC / 'include'}", *DEFINES]


def for_hopper(source: Path) -> bool:
    """Whether it has instructions that no GPU but 9.0 has."""
    return source.stem.endswith("_wgmma") or source.stem in ("3_tma", "4_warp_specialised")


def flags(source: Path, archs: list[str]) -> list[str]:
    """nvcc's for one file."""
    codes = ["90a"] if for_hopper(source) else archs
    return [*COMMON, *(f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in codes)]


def archs_here() -> list[str]:
    """Those of the GPUs that are here; without one, what the ladder is for."""
    if smi := shutil.which("nvidia-smi"):
        query = [smi, "--query-gpu=compute_cap", "--format=csv,noheader"]
        run = subprocess.run(query, capture_output=True, text=True)
        found = sorted({line.strip().replace(".", "") for line in run.stdout.splitlines()})
        if run.returncode == 0 and found and all(arch.isdigit() for arch in found):
            return found
    return ["80", "90"]


def build(folder: Path, archs: list[str]) -> Path:
    """The program, compiled in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    nvcc = find_nvcc(folder)
    if nvcc is None:
        sys.exit(
            "ladder: there is no nvcc in CUDA_HOME or on PATH. Without one, `pytest "
            "tests/test_ladder.py` runs every rung on the CPU"
        )
    cxx = shlex.split(os.environ.get("CXX") or "g++")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    ninja = shutil.which("ninja", path=path)
    if not (ninja and shutil.which(cxx[0])):
        sys.exit(f"ladder: needs {cxx[0]}, and ninja (pip install ninja)")

    def line(*words: object) -> str:
        return " ".join(shlex.quote(str(w)) for w in words).replace("$", "$$")

    libs = [toolkit_file(nvcc, "libcudart_static.a"), "-ldl", "-lrt", "-lpthread"]
    version = output_of(nvcc, "--version").splitlines()[-1]  # another one compiles all anew
    text = f"""builddir = {line(folder)}
rule nvcc
  command = {line(nvcc, "-ccbin", cxx[-1])} $flags -MMD -MF $out.d -c $in -o $out # {version}
  depfile = $out.d
  deps = gcc
rule link
  command = {line(*cxx)} $in {line(*libs)} -o $out
"""
    objects = []
    for source in [HERE / "ladder.cu", *RUNGS, *LIBRARY]:
        objects.append(folder / f"{source.name}.o")
        text += f"build {line(objects[-1])}: nvcc {line(source)}\n"
        text += f"  flags = {line(*flags(source, archs))}\n"
    program = folder / "ladder"
    text += f"build {line(program)}: link {line(*objects)}\n"
    (folder / "build.ninja").write_text(text)
    if subprocess.run([ninja, "-f", str(folder / "build.ninja")]).returncode:
        sys.exit("ladder: compiling failed, see above")
    return program


def main() -> int:
    """What the program returns."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--archs", nargs="+", help="default: those of the GPUs here, else 80 90")
    parser.add_argument("--build-only", action="store_true")
    args, rest = parser.parse_known_args()
    program = build(ROOT / "build" / "ladder", args.archs or archs_here())
    if args.build_only:
        print(program)
        return 0
    return subprocess.run([program, *rest]).returncode


if __name__ == "__main__":
    sys.exit(main())
