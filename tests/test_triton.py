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
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="Triton is not installed (`pip install triton`)",
)


def python(*args: str, cwd: Path = TESTS.parent) -> str:
    """Output of a Python process under the interpreter; its failure is ours."""
    # one thread: the small arrays of the interpreter gain nothing from more
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-P", *args], env=environment, capture_output=True, text=True, cwd=cwd
    )
    assert run.returncode == 0, f"{run.stdout[-6000:]}\n{run.stderr[-3000:]}"
    return run.stdout


@needs_triton
@pytest.mark.parametrize(
    ("files", "select"),
    [
        (["in_interpreter.py"], ""),
        # fp64 against plain PyTorch to 1e-10 says all that gradcheck would
        (["test_conv_bn.py"], "triton and not nchw and not gradcheck"),
        (
            ["test_add_relu.py", "test_batch_norm.py", "test_bn_act.py", "test_bn_relu_maxpool.py"],
            "triton and not nchw and not gradcheck",
        ),
        (["test_functional.py", "test_deferred.py"], "triton"),
    ],
    ids=lambda value: value[0].removesuffix(".py") if isinstance(value, list) else "",
)
def test_in_the_interpreter(
    files: list[str], select: str, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [str(TESTS / name) for name in files]
    out = python("-m", "pytest", "-q", "-p", "no:cacheprovider", *paths, "-k", select)
    assert " passed" in out and "skipped" not in out.splitlines()[-1]
    with capsys.disabled():  # what the tests print is for people to see
        shown = [
            line for line in out.splitlines() if line and not set(line) <= set(".[]% 0123456789")
        ]
        print("\n" + "\n".join(shown))


@needs_triton
def test_kernels_compile_for_a_gpu_that_is_not_there(tmp_path: Path) -> None:
    """Those of a ResNet-50 training step, in bf16 for sm_90, by the gates of triton_compile.py."""
    launches = tmp_path / "launches.json"
    python(str(TESTS / "triton_launches.py"), str(launches), "--only", "resnet50")
    table = tmp_path / "table.json"
    python(str(TESTS / "triton_compile.py"), str(launches), "--out", str(table))
    rows = json.loads(table.read_text())
    kernels = {row["kernel"] for row in rows}
    assert {f"conv_bn_{k}_kernel" for k in ("fwd", "dgrad", "wgrad", "finish")} <= kernels
    assert len(rows) > 40


@needs_triton
def test_the_gates_can_close(tmp_path: Path) -> None:
    """A block too large for the registers breaks a gate, and the tool says so."""
    launches = tmp_path / "launches.json"
    python(str(TESTS / "triton_launches.py"), str(launches), "--only", "resnet50")
    lists = json.loads(launches.read_text())
    dgrad = next(x for x in lists["sm_90"] if x["kernel"] == "conv_bn_dgrad_kernel")
    for argument in dgrad["arguments"]:
        if argument[0] in ("BM", "BN"):
            argument[2] = 256
    launches.write_text(json.dumps({"sm_90": [dgrad]}))
    with pytest.raises(AssertionError, match=r"spills|OutOfResources|shared memory"):
        python(str(TESTS / "triton_compile.py"), str(launches))
