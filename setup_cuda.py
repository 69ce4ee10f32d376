"""Finds nvcc, its toolkit's files and the architectures to compile for; setup.py's other half.

FUSEDRES_CUDA and FUSEDRES_CUDA_ARCHS are described there.
"""

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

# One of each generation: code for 8.0 runs on 8.6 and 8.9 too, where nothing here would gain.
DEFAULT_ARCHS = ["80", "90", "100", "120"]
# nvcc's pieces, all of one minor version: pip would otherwise mix a newer nvvm with an older ptxas.
NVCC_WHEELS = [
    f"nvidia-{part}==13.0.*"
    for part in ("cuda-nvcc", "cuda-crt", "nvvm", "cuda-runtime", "cuda-cccl")
]
CUDA = os.environ.get("FUSEDRES_CUDA", "auto") or "auto"
if CUDA not in ("auto", "0", "1", "wheel"):
    sys.exit(f"fusedres: FUSEDRES_CUDA={CUDA!r} is not one of 0, 1, wheel (or unset)")


def merge_wheels(target: Path) -> Path:
    """nvcc of the nvidia-* wheels, whose trees may lie in several folders, linked into one.

    One tree at a fixed place also keeps nvcc's command line, and so the objects, from one isolated
    build environment to the next.
    """
    shutil.rmtree(target, ignore_errors=True)
    for root in (Path(entry or ".", "nvidia", "cu13") for entry in sys.path):
        for source in (f for f in root.rglob("*") if f.is_file()):
            link = target / source.relative_to(root)
            link.parent.mkdir(parents=True, exist_ok=True)
            if not link.exists():
                link.symlink_to(source.resolve())
    needed = ["bin/nvcc", "bin/crt", "nvvm/bin/cicc", "include/cuda_runtime_api.h", "include/cccl"]
    missing = [piece for piece in needed if not (target / piece).exists()]
    if missing:
        quoted = " ".join(f'"{wheel}"' for wheel in NVCC_WHEELS)
        sys.exit(
            f"fusedres: FUSEDRES_CUDA=wheel finds no nvidia/cu13/{missing[0]} on sys.path. Without "
            f"build isolation the wheels must be there first: pip install {quoted}"
        )
    return target / "bin" / "nvcc"


def find_nvcc(build: Path) -> Path | None:
    if CUDA == "0":
        return None
    if CUDA == "wheel":
        return merge_wheels(build / "toolkit")
    home = os.environ.get("CUDA_HOME")
    nvcc = (home and shutil.which("nvcc", path=Path(home, "bin"))) or shutil.which("nvcc")
    if CUDA == "1" and not nvcc:
        sys.exit(
            "fusedres: FUSEDRES_CUDA=1, but there is no nvcc in CUDA_HOME or on PATH. Set "
            "CUDA_HOME, or take nvcc from pip wheels with FUSEDRES_CUDA=wheel"
        )
    return Path(nvcc) if nvcc else None


def output_of(*command: object) -> str:
    run = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    if run.returncode:
        sys.exit(f"fusedres: {shlex.join(map(str, command))} failed:\n{run.stdout}{run.stderr}")
    return run.stdout + run.stderr


def choose_archs(nvcc: Path) -> list[str]:
    known = {code.removeprefix("sm_") for code in output_of(nvcc, "--list-gpu-code").split()}
    asked = os.environ.get("FUSEDRES_CUDA_ARCHS", "").replace(",", ";").replace(" ", ";")
    archs = [arch for arch in asked.split(";") if arch]
    unknown = [a for a in archs or DEFAULT_ARCHS if a.rstrip("af") not in known]  # 90a, 100f
    names = f"{', '.join(unknown)} (known: {' '.join(sorted(known, key=lambda a: (len(a), a)))})"
    if unknown and archs:
        sys.exit(f"fusedres: FUSEDRES_CUDA_ARCHS={asked!r}: {nvcc} does not know {names}")
    if unknown:
        print(f"fusedres: leaving out architectures that {nvcc} does not know: {names}")
    return archs or [a for a in DEFAULT_ARCHS if a not in unknown]


def toolkit_file(nvcc: Path, name: str) -> Path:
    """A header or library of nvcc's own toolkit, wherever wheels, distributions or conda put it."""
    settings = output_of(nvcc, "--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull)
    top = Path(next(s for s in settings.splitlines() if s.startswith("#$ TOP=")).partition("=")[2])
    folders = [d for pattern in ("include", "lib*", "targets/*/*") for d in top.glob(pattern)]
    debian = [Path("/usr/include"), Path("/usr/lib", sysconfig.get_config_var("MULTIARCH") or "")]
    for folder in folders + debian:
        if (folder / name).exists():
            return folder / name
    sys.exit(f"fusedres: {nvcc} works, but its toolkit in {top} has no {name}")
