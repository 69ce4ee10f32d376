"""Compiles csrc/, its CUDA kernels too, with the host's g++ into a module that runs on the CPU.

    python tests/cuda_emulator/build.py FOLDER [--no-sanitize]

leaves FOLDER/_C.so, which takes the place of fusedres._C; a second run redoes what changed. With
the sanitizers, Python must run in environment(), which the command prints.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
RUNTIMES = ("libasan.so", "libubsan.so", "libstdc++.so.6")  # the last: who throws must find it


class Unavailable(Exception):
    """What is missing on this machine."""


def compiler(sanitize: bool) -> list[str]:
    cxx = shlex.split(os.environ.get("CXX") or "g++")
    if not shutil.which(cxx[0]):
        raise Unavailable(f"no C++ compiler ({cxx[0]})")
    half = [*cxx, "-fsyntax-only", "-x", "c++", "-"]  # g++ 12 and later, 13 on Arm
    if subprocess.run(half, input="_Float16 x;", capture_output=True, text=True).returncode:
        raise Unavailable(f"{cxx[0]} has no _Float16")
    if sanitize:
        _runtimes(cxx)
    return cxx


def _runtimes(cxx: list[str]) -> list[Path]:
    paths = []
    for name in RUNTIMES:
        command = [*cxx, f"-print-file-name={name}"]
        run = subprocess.run(command, capture_output=True, text=True)
        path = Path(run.stdout.strip())
        if run.returncode or not path.is_absolute() or not path.exists():
            raise Unavailable(f"{cxx[0]} has no {name}")
        paths.append(path.resolve())
    return paths


def environment(sanitize: bool = True) -> dict[str, str]:
    """What to add to os.environ for a Python process that loads the module."""
    if not sanitize:
        return {}
    runtimes = _runtimes(compiler(sanitize=False))
    return {"LD_PRELOAD": ":".join(map(str, runtimes)), **options()}


def options() -> dict[str, str]:
    return {
        # Python keeps what it allocated until it ends. malloc() may return null, as torch expects.
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
    }


def build(folder: Path, sanitize: bool = True) -> Path:
    """The module, compiled in `folder`."""
    if not CSRC.is_dir():
        raise Unavailable(f"no {CSRC}")
    if not importlib.util.find_spec("pybind11"):
        raise Unavailable("no pybind11 (pip install pybind11)")
    import pybind11

    python = [f"-I{sysconfig.get_path('include')}", f"-I{pybind11.get_include()}"]
    with_cuda = ["-DFUSEDRES_WITH_CUDA", "-DFUSEDRES_WITH_SM90A"]
    python += [*with_cuda, '-DFUSEDRES_CUDA_ARCHS="emulated"']
    # What is not looked at, and would take as long as all the rest: the bindings, and the CPU's
    # kernels, which they want to be linked.
    plain = ["-fno-sanitize=all", "-O0"]
    sources = {CSRC / "bindings.cpp": [*python, *plain]}
    lowest = [*plain, "-DFUSEDRES_CPU_LEVELS=1", "-DFUSEDRES_CPU_LEVEL=baseline"]
    sources[CSRC / "cpu_levels.cpp"] = lowest
    sources |= {s: lowest for s in sorted(CSRC.glob("cpu/*.cpp"))}
    sources |= {s: with_cuda for s in sorted(CSRC.glob("cuda/*.cu"))}
    target = folder / "_C.so"
    return _compile(sources, target, ["-fPIC", "-fopenmp"], ["-shared", "-fopenmp"], sanitize)


def build_program(
    source: Path,
    folder: Path,
    sanitize: bool = True,
    others: dict[Path, list[str]] | None = None,
) -> Path:
    """An executable of a file with a main(), and of `others`, each with flags of its own."""
    target = folder / source.stem
    # Exported, so that the names of kernels are found.
    link = ["-rdynamic", "-pthread"]
    return _compile({source: [], **(others or {})}, target, [], link, sanitize)


def _compile(
    sources: dict[Path, list[str]],
    target: Path,
    flags: list[str],
    link: list[str],
    sanitize: bool,
) -> Path:
    cxx = compiler(sanitize)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    ninja = shutil.which("ninja", path=path)
    if not ninja:
        raise Unavailable("no ninja (pip install ninja)")
    # The stand-ins of the toolkit's headers come before any real ones. A module of another build
    # in the same process keeps its own variables: none are unique to the process.
    common = [f"-I{HERE}", f"-I{CSRC}", f"-I{CSRC / 'include'}", "-std=c++17", "-O1", "-g1"]
    common += ["-DFUSEDRES_DEBUG", "-Wall", "-Wno-unknown-pragmas", "-fno-gnu-unique"]
    if sanitize:
        # A check that fails ends the process.
        sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
        common += [*sanitizers, "-fno-omit-frame-pointer"]
        link = [*link, *sanitizers]

    def line(*words: object) -> str:
        return " ".join(shlex.quote(str(w)) for w in words).replace("$", "$$")

    folder = target.parent.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    text = f"""builddir = {folder}
rule cxx
  command = {line(*cxx, *common, *flags)} $more -MMD -MF $out.d -c -x c++ $in -o $out
  depfile = $out.d
  deps = gcc
rule link
  command = {line(*cxx, *link)} $in -ldl -o $out
"""
    objects = []
    engine = {HERE / f"{name}.cpp": [] for name in ("emulator", "async", "products")}
    for source, more in (sources | engine).items():
        objects.append(folder / "objects" / f"{source.parent.name}-{source.name}.o")
        text += f"build {objects[-1]}: cxx {source}\n  more = {line(*more)}\n"
    target = folder / target.name
    text += f"build {target}: link {' '.join(map(str, objects))}\n"
    rules = folder / f"{target.name}.ninja"
    rules.write_text(text)
    run = subprocess.run([ninja, "-f", str(rules)], capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"{target} does not compile:\n{run.stdout}{run.stderr}")
    return target


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--no-sanitize", dest="sanitize", action="store_false")
    args = parser.parse_args()
    print(build(args.folder, args.sanitize))
    for name, value in environment(args.sanitize).items():
        print(f"{name}={shlex.quote(value)}")
