"""The triton backend without a GPU: every kernel in Triton's interpreter, in processes of their own
(the interpreter is chosen when kernels are imported), and compiled for a GPU that is not there.

.ci/run compiles for more GPUs and with another version of Triton.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs Triton: `pip install triton`"
)

# fp64 against plain PyTorch to 1e-10 says all that gradcheck would, and NCHW is NHWC there; the
# light passes that a split plan consists of have their own suites
ELSE = "triton and not nchw and not gradcheck"
SUITES = {  # a name: the file, and what of it
    "in_interpreter, networks": ("in_interpreter", "small_resnet and (split or fused_1x1)"),
    "in_interpreter_dataflows": ("in_interpreter_dataflows", ""),
    "in_interpreter_tune": ("in_interpreter_tune", ""),
    "in_interpreter_conv_act": ("in_interpreter_conv_act", "not (three_way or nan_and_inf)"),
    "in_interpreter_conv_act_calls": ("in_interpreter_conv_act_calls", ""),
    "in_interpreter_merged": ("in_interpreter_merged", "not (half or three_way)"),
    "test_bn_act": ("test_bn_act", ELSE),
    "test_batch_norm": ("test_batch_norm", ELSE),
    "test_add_relu": ("test_add_relu", "triton and not gradcheck"),
}
SLOW = {
    "test_conv_act": ("test_conv_act", "triton"),
    "test_freeze": ("test_freeze", "triton"),
    "in_interpreter, the rest": ("in_interpreter", "not small_resnet"),
    "in_interpreter_spatial": ("in_interpreter_spatial", "not three_way"),
    "in_interpreter, other dataflows": (
        "in_interpreter",
        "small_resnet and not (split or fused_1x1)",
    ),
    "in_interpreter_spatial, fp32 and fp16": ("in_interpreter_spatial", "three_way"),
    "in_interpreter_conv_act, the rest": ("in_interpreter_conv_act", "three_way or nan_and_inf"),
    "in_interpreter_merged, dtypes": ("in_interpreter_merged", "half or three_way"),
    "in_interpreter_spatial_dgrad": ("in_interpreter_spatial_dgrad", ""),
    "test_fuzz": ("test_fuzz", "triton"),
    "test_conv_bn": ("test_conv_bn", f"{ELSE} and not (split and (float32 or float16))"),
    "test_conv_bn_plans": ("test_conv_bn_plans", "triton"),
    "test_bn_relu_maxpool": ("test_bn_relu_maxpool", ELSE),
    "test_conv_bn_relu_maxpool": ("test_conv_bn_relu_maxpool", ELSE),
    "test_blocks": ("test_blocks", "triton and not nchw and not hooks"),
}
NAMES = [*SUITES, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]


def python(*args: str, interpret: bool) -> subprocess.CompletedProcess[str]:
    """A finished Python process, with or without the interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    # one thread: the small arrays of the interpreter gain nothing from more
    environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"} if interpret else {}
    command = [sys.executable, "-P", *args]
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=TESTS)


def launches_of_a_step(path: Path) -> Path:
    """The list that triton_compile.py reads, for sm_90."""
    run = python(str(TESTS / "triton_launches.py"), str(path), interpret=True)
    assert run.returncode == 0, run.stderr
    return path


def _versions(*packages: str) -> list[tuple[int, ...]]:
    return [tuple(map(int, version(p).split(".")[:2])) for p in packages]


@pytest.fixture(scope="module")
def suites(
    request: pytest.FixtureRequest,
) -> Iterator[dict[str, Future[subprocess.CompletedProcess[str]]]]:
    """Those of the suites that are selected, two at a time."""
    triton, numpy = _versions("triton", "numpy")
    if triton < (3, 7) and numpy >= (2, 4):
        pytest.skip("the interpreter of Triton 3.6 fails with numpy 2.4")

    def run(file: str, select: str) -> subprocess.CompletedProcess[str]:
        path = str(TESTS / f"{file}.py")
        options = ("-q", "-p", "no:cacheprovider", "-k", select)
        return python("-m", "pytest", path, *options, interpret=True)

    selected = {item.name for item in request.session.items}
    wanted = {
        n: s for n, s in (SUITES | SLOW).items() if f"test_in_the_interpreter[{n}]" in selected
    }
    with ThreadPoolExecutor(2) as pool:
        yield {name: pool.submit(run, *suite) for name, suite in wanted.items()}


@pytest.mark.parametrize("name", NAMES)
def test_in_the_interpreter(
    name: str,
    suites: dict[str, Future[subprocess.CompletedProcess[str]]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = suites[name].result()
    assert run.returncode == 0, f"{run.stdout[-6000:]}\n{run.stderr[-3000:]}"
    last = run.stdout.splitlines()[-1]
    assert " passed" in last and "skipped" not in last
    with capsys.disabled():  # what its tests print is for people to see
        tables = [x for x in run.stdout.splitlines() if x.startswith("  ") or x.endswith(":")]
        numbers = [x for x in tables if x.endswith(":") or x.strip()[:1].isdigit()]
        print("\n" + "\n".join([*numbers, f"{name}: {last}"]))


@pytest.mark.slow  # .ci/run compiles them for more GPUs
def test_kernels_compile_for_a_gpu_that_is_not_there(tmp_path: Path) -> None:
    """Those of a ResNet-50, in training and inference, in bf16 for sm_90."""
    launches, table = launches_of_a_step(tmp_path / "launches.json"), tmp_path / "table.json"
    arguments = (str(TESTS / "triton_compile.py"), str(launches), "--out", str(table))
    run = python(*arguments, interpret=False)
    assert run.returncode == 0, run.stdout + run.stderr
    rows = json.loads(table.read_text())
    kernels = {row["kernel"] for row in rows}
    gemms = ("fwd", "dgrad", "wgrad", "finish", "spatial_fwd", "spatial_wgrad")
    gemms += ("spatial_dgrad", "stem_fwd", "stem_wgrad")
    assert {f"conv_bn_{k}_kernel" for k in gemms} <= kernels
    assert {f"conv_act_{k}kernel" for k in ("", "sum_", "image_")} <= kernels
    assert len(rows) > 40


def test_the_gates_can_close(tmp_path: Path) -> None:
    """A block too large for the registers breaks a gate, and the tool says so."""
    launches = launches_of_a_step(tmp_path / "launches.json")
    step = json.loads(launches.read_text())["sm_90"]
    dgrad = next(x for x in step if x["kernel"] == "conv_bn_dgrad_kernel")
    for argument in dgrad["arguments"]:
        if argument[0] == "BN":
            argument[2] = 256
    launches.write_text(json.dumps({"sm_90": [dgrad]}))
    run = python(str(TESTS / "triton_compile.py"), str(launches), interpret=False)
    assert run.returncode == 1
    assert "spills" in run.stdout and "1 break a gate" in run.stdout
