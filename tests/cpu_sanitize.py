"""The CPU's kernels under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer.

    python tests/cpu_sanitize.py [--tool address] [--tool thread] [--logs FOLDER]

address: builds fusedres._C of this checkout with both of the first into a folder of its own, as
`pip install` does, and runs the fuzzers and the ops' tests on it: a call that reads or writes past
a tensor, at a misaligned address, or overflows an integer ends the process.

thread: compiles csrc/cpu with the third into a program (tests/tsan) that calls every launcher on
four threads. No Python and no libgomp is in it, of which the sanitizer knows nothing. It has the
baseline alone: levels differ by the width of a vector, not by who writes where.

Exits with 1 on findings, with 2 where a compiler or its runtime is missing.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
# what a build takes of the checkout, so that its own build folder stays as it is
SOURCES = (
    "csrc",
    "fusedres",
    "setup.py",
    "setup_cpu.py",
    "setup_cuda.py",
    "pyproject.toml",
    "README.md",
    "LICENSE",
)
# files of tests
SUITES = ("test_fuzz", "test_fuzz_public", "test_threads", "test_add_relu", "test_batch_norm")
SUITES += ("test_bn_act", "test_bn_relu_maxpool", "test_build")
SUITES += ("test_conv_bn_wgrad", "test_conv_bn_pointwise")
# of them those on the backend cpp; gradcheck runs the same kernels on the same sizes, each time
WANTED = "(cpp or wgrad or pointwise or levels) and not gradcheck"
TOOLS = ("address", "thread")
SECONDS = 1800  # of a tool
FINDING = re.compile(r"(ERROR|WARNING): \w+Sanitizer|: runtime error: ")


class Failed(Exception):
    """What did not end well."""


def run(command: list[str], log: Path, **options: object) -> None:
    """Appends what a command prints to a log.

    Raises:
        Failed: it exits with anything but 0.
    """
    with log.open("a") as file:
        print("$", shlex.join(command), file=file, flush=True)
        done = subprocess.run(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            timeout=SECONDS,
            **options,  # type: ignore[call-overload]
        )
    if done.returncode:
        raise Failed(f"{Path(command[0]).name} exits with {done.returncode}")


def compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX") or "g++")


# --- AddressSanitizer, UndefinedBehaviorSanitizer -------------------------------------------------


def address(folder: Path, log: Path) -> str:
    """The tests on a build of the extension with the sanitizers."""
    sys.path.insert(0, str(TESTS))
    from cuda_emulator import build

    checkout, site = folder / "checkout", folder / "site"
    checkout.mkdir()
    ignore = shutil.ignore_patterns("*.so", "__pycache__", "build")
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, checkout / name, ignore=ignore)
        else:
            shutil.copy(source, checkout)
    flags = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    flags += ["-fno-omit-frame-pointer", "-g1"]  # lines alone: the rest of -g takes a third longer
    cxx = folder / "cxx"  # the last -g counts, and FUSEDRES_DEBUG has one
    cxx.write_text(f'#!/bin/sh\nexec {shlex.join(compiler())} "$@" {shlex.join(flags)}\n')
    cxx.chmod(0o700)
    environment = os.environ | {"CXX": str(cxx), "FUSEDRES_CUDA": "0", "FUSEDRES_DEBUG": "1"}
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps"]
    run([*install, "--target", str(site), str(checkout)], log, env=environment)
    environment = os.environ | build.environment() | {"PYTHONPATH": str(site)}
    python = [sys.executable, "-P"]
    where = "import fusedres._C; print(fusedres._C.__file__)"
    found = subprocess.run(
        [*python, "-c", f"import torch; {where}"], env=environment, capture_output=True, text=True
    )
    if not found.stdout.startswith(str(site)):
        raise Failed(f"the build does not load: {found.stdout}{found.stderr}")
    files = [str(TESTS / f"{name}.py") for name in SUITES]
    options = ["-q", "-p", "no:cacheprovider", "--import-mode=importlib", "--tb=short"]
    options += ["-k", WANTED, "--durations=10"]
    # without its output caught, which would be lost with the process
    run([*python, "-m", "pytest", "-s", *options, *files], log, cwd=TESTS, env=environment)
    return log.read_text(errors="replace").strip().splitlines()[-1].strip("= ")


# --- ThreadSanitizer ------------------------------------------------------------------------------


def objects(folder: Path) -> Iterator[tuple[Path, list[str]]]:
    """Object files of the program and how each is compiled."""
    csrc = ROOT / "csrc"
    common = ["-std=c++17", "-O1", "-g", f"-I{csrc}", f"-I{csrc / 'include'}"]
    common += ["-fopenmp", "-fno-trapping-math", "-ffp-contract=off", "-fsanitize=thread"]
    common += ["-DFUSEDRES_CPU_LEVELS=1", "-DFUSEDRES_CPU_LEVEL=baseline"]
    for source in sorted((TESTS / "tsan").glob("*.cpp")):
        yield folder / f"{source.stem}.o", [*common, "-c", str(source)]
    for source in [csrc / "cpu_levels.cpp", *sorted((csrc / "cpu").glob("*.cpp"))]:
        yield folder / f"{source.stem}-{source.parent.name}.o", [*common, "-c", str(source)]


def thread(folder: Path, log: Path) -> str:
    """A program that runs every launcher on several threads."""

    def compiled(target: Path, flags: list[str]) -> Path:
        own = target.with_suffix(".txt")  # two at once: a log each
        run([*compiler(), *flags, "-o", str(target)], own)
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        made = list(pool.map(compiled, *zip(*objects(folder), strict=True)))
    program = folder / "light_passes"
    link = ["-fsanitize=thread", "-pthread", "-o", str(program), *map(str, made)]
    run([*compiler(), *link], log)
    environment = os.environ | {"TSAN_OPTIONS": "exitcode=66 history_size=4"}
    # where addresses are random in more bits than the sanitizer's map of memory has room for
    fixed = [shutil.which("setarch") or "", "--addr-no-randomize"]
    if not fixed[0] or subprocess.run([*fixed, "true"], capture_output=True).returncode:
        fixed = []
    run([*fixed, str(program)], log, env=environment)
    return log.read_text(errors="replace").strip().splitlines()[-1]


# --- the command ----------------------------------------------------------------------------------


def missing() -> str:
    """What this machine lacks."""
    cxx = compiler()
    if not shutil.which(cxx[0]):
        return f"there is no C++ compiler ({cxx[0]})"
    for name in ("libasan.so", "libubsan.so", "libtsan.so"):
        found = subprocess.run([*cxx, f"-print-file-name={name}"], capture_output=True, text=True)
        if not Path(found.stdout.strip()).is_absolute():
            return f"{cxx[0]} has no {name}"
    return ""


def excerpt(text: str) -> str:
    """The first finding in a log, or its end."""
    lines = text.splitlines()
    found = [i for i, line in enumerate(lines) if FINDING.search(line)]
    return "\n".join(lines[found[0] :][:40] if found else lines[-60:])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tool", action="append", choices=TOOLS, help="all of them unless given")
    parser.add_argument("--logs", type=Path, help="where what the tools print is kept")
    args = parser.parse_args()
    if reason := missing():
        print(f"cpu_sanitize: {reason}", file=sys.stderr)
        return 2
    logs = args.logs or Path(tempfile.mkdtemp(prefix="cpu-sanitize-"))
    logs.mkdir(parents=True, exist_ok=True)
    clean = True
    print("| sanitizer | | verdict | seconds | log |\n|---|---|---|---|---|")
    for tool in args.tool or TOOLS:
        log = logs / f"{tool}.txt"
        log.write_text("")
        start, good = time.monotonic(), True
        with tempfile.TemporaryDirectory(prefix=f"{tool}-", ignore_cleanup_errors=True) as folder:
            try:
                verdict = {"address": address, "thread": thread}[tool](Path(folder), log)
            except (Failed, subprocess.TimeoutExpired) as error:
                good, verdict = False, str(error)
                for part in Path(folder).glob("*.txt"):
                    log.write_text(log.read_text(errors="replace") + part.read_text())
        clean = clean and good
        seconds = round(time.monotonic() - start)
        said = "clean" if good else "FINDINGS"
        print(f"| {tool} | {said} | {verdict} | {seconds} | {log} |", flush=True)
        if not good:
            print(excerpt(log.read_text(errors="replace")), file=sys.stderr)
    return 0 if clean else 1


if __name__ == "__main__":
    sys.exit(main())
