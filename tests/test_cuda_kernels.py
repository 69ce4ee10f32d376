"""The cuda backend without a GPU: csrc/cuda, compiled for the CPU by tests/cuda_emulator under
AddressSanitizer and UndefinedBehaviorSanitizer, runs in processes of its own.

Every kernel instantiation that ships has to run in one of them.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from cuda_emulator import build

from fusedres import native

TESTS = Path(__file__).resolve().parent
CSRC = TESTS.parent / "csrc"

# in_emulator has every kernel at every size; the others, marked slow, show that ops, gradients and
# blocks hold on them. fp64 against plain PyTorch to 1e-10 says all that gradcheck would.
PASSES = "bn_act or follow_from_y"
SMALL = f"3 1 {48 << 10}"  # multiprocessors, blocks of each, bytes of shared memory: few fit
SUITES = {  # a name: the file, what of it, and maybe another device than the emulator's own
    "in_emulator, activations": ("in_emulator", PASSES, SMALL),
    "in_emulator, the rest": ("in_emulator", f"not ({PASSES})", SMALL),
    "conv_bn_tensor_core": ("test_conv_bn_tensor_core", "three_way or rings"),
}
MMA = "rings and mma and not wgmma"
SLOW = {
    "test_fuzz": ("test_fuzz", "cuda"),
    "test_fuzz_public": ("test_fuzz_public", "cuda"),
    "test_threads": ("test_threads", "cuda"),
    "test_conv_bn_tensor_core": ("test_conv_bn_tensor_core", "not three_way and not rings"),
    # other rings, and blocks beside each other: on one multiprocessor of little memory, and on many
    "conv_bn_tensor_core, 99 KB": ("test_conv_bn_tensor_core", MMA, f"1 1 {99 << 10}"),
    "conv_bn_tensor_core, wide": ("test_conv_bn_tensor_core", "rings", f"132 1 {227 << 10}"),
    "test_cuda_gpu": ("test_cuda_gpu", ""),  # what of it needs no device
    "test_conv_bn": ("test_conv_bn", "cuda and not gradcheck and not nchw"),
    "test_conv_bn_plans": ("test_conv_bn_plans", "cuda"),
    "test_bn_relu_maxpool": ("test_bn_relu_maxpool", "cuda and not gradcheck and not nchw"),
    "test_bn_act": ("test_bn_act", "cuda and not gradcheck and not nchw"),
    "test_batch_norm": ("test_batch_norm", "cuda and not gradcheck and not 2048"),
    "test_add_relu": ("test_add_relu", "cuda and not gradcheck"),
    "test_functional": ("test_functional", "cuda and not gradcheck"),
}

Run = subprocess.CompletedProcess[str]


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The extension for the emulator; in build/, so that a second run compiles what changed."""
    if not build.CSRC.is_dir():
        pytest.skip(f"no source checkout around {__file__}")
    folder = TESTS.parent / "build" / "emulated"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        folder = tmp_path_factory.mktemp("emulated")
    try:
        return build.build(folder)
    except build.Unavailable as missing:
        pytest.skip(str(missing))


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the suites leave the names of the kernels they ran."""
    return tmp_path_factory.mktemp("launched")


@pytest.fixture(scope="module")
def suites(
    module: Path, record: Path, request: pytest.FixtureRequest
) -> Iterator[dict[str, Future[Run]]]:
    """Those of the suites that are selected, two at a time."""
    environment = (
        os.environ
        | build.environment()
        | {
            "PYTHONPATH": str(build.HERE),
            "FUSEDRES_EMULATED": str(module),
            "FUSEDRES_LAUNCHED": str(record),
            "OMP_NUM_THREADS": "1",
        }
    )

    def run(file: str, select: str, limits: str = "") -> Run:
        command = [sys.executable, "-P", "-m", "pytest", str(TESTS / f"{file}.py"), "-q"]
        command += ["-p", "emulated", "-p", "no:cacheprovider", "-k", select, "-m", "not gpu"]
        device = environment | ({"FUSEDRES_EMULATED_LIMITS": limits} if limits else {})
        return subprocess.run(command, env=device, capture_output=True, text=True, cwd=TESTS)

    selected = {item.name for item in request.session.items}
    wanted = {n for n in SUITES | SLOW if f"test_in_the_emulator[{n}]" in selected}
    if "test_every_kernel_that_ships_has_run" in selected:
        wanted |= set(SUITES)
    with ThreadPoolExecutor(2) as pool:
        yield {n: pool.submit(run, *s) for n, s in (SUITES | SLOW).items() if n in wanted}


NAMES = [*SUITES, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]


@pytest.mark.parametrize("name", NAMES)
def test_in_the_emulator(
    name: str, suites: dict[str, Future[Run]], capsys: pytest.CaptureFixture[str]
) -> None:
    finished = suites[name].result()
    last = finished.stdout.strip().splitlines()[-1:]
    assert finished.returncode == 0, finished.stdout[-8000:] + finished.stderr[-8000:]
    assert " passed" in last[0] and "skipped" not in last[0], last
    with capsys.disabled():
        print(f"\n  {name}: {last[0]}")


def kernels(symbols: str) -> set[str]:
    """Mangled names of the kernels in a listing of symbols: by convention they end in _kernel."""
    return set(re.findall(r"\b_ZN8fusedres\d+[a-z_]+_kernel[IE]\w*", symbols))


def shipped_kernels(path: str) -> set[str]:
    """Those in the GPU code of the built extension."""
    from test_build import tool_output

    return kernels(tool_output("cuobjdump", "--dump-elf-symbols", path))


def test_every_kernel_that_ships_has_run(
    module: Path, record: Path, suites: dict[str, Future[Run]]
) -> None:
    for finished in suites.values():
        finished.result()
    ran = set().union(*(path.read_text().split() for path in record.iterdir()))
    listing = subprocess.run(["nm", "--defined-only", module], capture_output=True, text=True)
    emulated = kernels(listing.stdout)
    assert len(emulated) > 80
    assert emulated <= ran, sorted(emulated - ran)
    extension = native.load()
    if extension is not None and extension.cuda_built:
        assert extension.__file__ is not None
        assert shipped_kernels(extension.__file__) == emulated


@pytest.mark.skipif(not CSRC.is_dir(), reason="needs the source tree")
@pytest.mark.parametrize("path", sorted(CSRC.glob("cuda/*")), ids=lambda p: p.name)
def test_sources_keep_to_the_words_of_device_h(path: Path) -> None:
    code = re.sub(r"//.*", "", path.read_text())
    assert "<<<" not in code
    assert "__shared__" not in code.replace("extern __shared__ __align__(1024)", "", 1)
    code = re.sub(r"__launch_bounds__\([^)]*\)", "", code)
    names = re.findall(r"__global__\s+void\s+(\w+)\(", code)
    assert all(name.endswith("_kernel") for name in names), names
