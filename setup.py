"""Builds fusedres._C: csrc/ compiled by a C++ compiler and, where there is one, nvcc. No torch.

FUSEDRES_CUDA        unset: CUDA kernels if nvcc is in CUDA_HOME or on PATH; 0: none; 1: required;
                     wheel: nvcc from pip wheels, which build isolation fetches
FUSEDRES_CUDA_ARCHS  "90;100": these architectures instead of the default list
FUSEDRES_DEBUG       1: little optimisation, line information, debug symbols, bounds checks in CUDA
                     kernels
CXX                  the C++ compiler
"""

import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

sys.path.insert(0, str(Path(__file__).resolve().parent))  # build isolation leaves it out
from setup_cpu import cpu_levels
from setup_cuda import CUDA, NVCC_WHEELS, choose_archs, find_nvcc, output_of, toolkit_file

DEBUG = os.environ.get("FUSEDRES_DEBUG", "0") == "1"
LINUX = platform.system() == "Linux"


class NinjaBuild(build_ext):
    """Compiles through a build.ninja, so that builds are parallel and only redo what changed."""

    def build_extension(self, ext: Extension) -> None:
        cxx = shlex.split(os.environ.get("CXX") or "g++")
        if not shutil.which(cxx[0]):
            sys.exit(
                f"fusedres: no C++ compiler ({cxx[0]} not found). Install one with "
                "`apt-get install g++` or `dnf install gcc-c++`, or name yours in CXX"
            )
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
        ninja = shutil.which("ninja", path=path)
        if not (ninja and importlib.util.find_spec("pybind11")):
            sys.exit("fusedres: without build isolation, first `pip install ninja pybind11`")
        import pybind11

        build = Path("build", f"ninja-{sysconfig.get_config_var('SOABI')}")
        build.mkdir(parents=True, exist_ok=True)
        module = build / "_C.so"
        (build / "build.ninja").write_text(self.rules(build, module, cxx, pybind11.get_include()))
        if subprocess.run([ninja, "-f", str(build / "build.ninja")]).returncode:
            sys.exit("fusedres: compiling csrc/ failed, see above")
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(module, target)

    def rules(self, build: Path, module: Path, cxx: list[str], pybind11_include: str) -> str:
        common = ["-std=c++17", "-O1" if DEBUG else "-O3", "-Icsrc", "-Icsrc/include"]
        common += ["-g", "-DFUSEDRES_DEBUG"] if DEBUG else []
        # No kernel looks at floating-point exception flags; kept, they would forbid vector selects.
        host = ["-fPIC", "-fvisibility=hidden", "-fopenmp", "-fno-trapping-math"]
        host += ["-Wno-maybe-uninitialized"]  # gcc means its own intrinsics
        levels = cpu_levels(cxx)
        host += ["-ffp-contract=off", f"-DFUSEDRES_CPU_LEVELS={len(levels)}"]
        python = [f"-I{sysconfig.get_path('include')}", f"-I{pybind11_include}"]
        cuda, codes, hopper, libs, archs, version = [], [], [], [], [], ""
        if nvcc := find_nvcc(build):
            archs = choose_archs(nvcc)
            host_cxx = next(w for w in cxx if Path(w).name not in ("ccache", "sccache", "distcc"))
            cuda = [*common, "-ccbin", host_cxx, "-Xcompiler=-fPIC,-fvisibility=hidden"]
            codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
            # PTX of the newest for GPUs to come; an architecture-specific one (90a) has no future.
            newest = sorted((a for a in archs if a.isdigit()), key=int)[-1:]
            codes += [f"-gencode=arch=compute_{a},code=compute_{a}" for a in newest]
            cuda += ["-DFUSEDRES_WITH_CUDA", "-lineinfo" if DEBUG else ""]
            # Hopper's own instructions are an architecture apart, for toolkits from 12.5 on
            release = re.search(r"release (\d+)\.(\d+)", output_of(nvcc, "--version"))
            recent = release is not None and tuple(map(int, release.groups())) >= (12, 5)
            if recent and {"90", "90a"} & set(archs):
                hopper = ["-gencode=arch=compute_90a,code=sm_90a"]
                cuda += ["-DFUSEDRES_WITH_SM90A"]
                python += ["-DFUSEDRES_WITH_SM90A"]
            # As a system folder the toolkit stays out of the dependencies. Its version is a comment
            # in the command instead, so that another toolkit does recompile.
            include = ["-isystem", str(toolkit_file(nvcc, "cuda_runtime_api.h").parent)]
            version = output_of(nvcc, "--version").splitlines()[-1]
            cuda += include
            python += ["-DFUSEDRES_WITH_CUDA", *include]
            python += [f'-DFUSEDRES_CUDA_ARCHS="{";".join(archs)}"']
            libs = [str(toolkit_file(nvcc, "libcudart_static.a")), "-ldl", "-lrt", "-lpthread"]
        what = f"{nvcc} for {' '.join(archs)}" if nvcc else "none"
        print(f"fusedres: CPU kernels: {' '.join(levels)}; CUDA kernels: {what}", flush=True)

        def line(*words: object) -> str:
            return " ".join(shlex.quote(str(w)) for w in words if w).replace("$", "$$")

        objects = []
        link = line(*cxx, "-shared", "-fopenmp", "-Wl,--exclude-libs,ALL", "-o", module)
        text = f"""builddir = {build}
rule cxx
  command = {line(*cxx, *common, *host, "-Wall", "-Wextra")} -MMD -MF $out.d $extra -c $in -o $out
  depfile = $out.d
  deps = gcc
rule nvcc
  command = {line(nvcc, *cuda)} $extra -MMD -MF $out.d -c $in -o $out # {version}
  depfile = $out.d
  deps = gcc
rule link
  command = {link} $in {line(*libs)}
"""
        for source in (s for s in SOURCES if nvcc or s.suffix != ".cu"):
            rule = "nvcc" if source.suffix == ".cu" else "cxx"
            # Only the bindings see Python: a new build environment recompiles nothing else.
            variants = {"": python if source.name == "bindings.cpp" else []}
            if rule == "nvcc":
                variants = {"": hopper if hopper and source.stem.endswith("_wgmma") else codes}
            if source.parent.name == "cpu":
                variants = {n: [f"-DFUSEDRES_CPU_LEVEL={n}", *f] for n, f in levels.items()}
            for name, flags in variants.items():
                obj = build / source.relative_to("csrc").parent / name / f"{source.name}.o"
                text += f"build {obj}: {rule} {source}\n  extra = {line(*flags)}\n"
                objects.append(obj)
        return text + f"build {module}: link {' '.join(map(str, objects))}\n"


SOURCES = sorted(p for p in Path("csrc").rglob("*") if p.suffix in (".cpp", ".cu"))
if not LINUX:
    print(f"fusedres: no extension on {platform.system()}: the reference path in PyTorch serves")
setup(
    ext_modules=[Extension("fusedres._C", [str(s) for s in SOURCES])] if LINUX else [],
    cmdclass={"build_ext": NinjaBuild},
    setup_requires=NVCC_WHEELS if CUDA == "wheel" else [],
)
