"""The emulator that runs csrc/cuda on the CPU: it computes what a GPU would, and catches what a GPU
would fault on, hang at or get wrong now and then.

The kernels are those of cuda_emulator/selftest.cu, right ones and wrong ones.
"""

import os
import re
import subprocess

import pytest
from cuda_emulator import build

SEEDS = range(1, 9)
RIGHT = [
    "block_sums",
    "grid_sums",
    "warps",
    "halves",
    "host_threads",
    "copies",
    "barrier",
    "shared",
]
CAUGHT = {
    "divergent_barrier": r"divergent_kernel.* but other threads of the block wait at",
    "early_return": "early_return_kernel.*(of the block wait at|of the block have left)",
    "early_return_grid": "leaves while other blocks wait at|threads have left",
    "grid_barrier_alone": "the launch is not cooperative",
    "missing_lane": "for lanes 0x00000080 of mask 0xffffffff, which never arrive",
    "absent_lane": "for lanes 0xffffff80 of mask 0xffffffff, which never arrive",
    "deadlock": "for lanes 0x00000200 of mask 0xffffffff, which never arrive",
    "foreign_mask": "with mask 0x0000ffff, in which it is not",
    "misaligned": r"copy_kernel<float>.* misaligned load of 16 bytes",
    "check": r"thread \(63, 0, 0\): .*device check failed: int\(threadIdx.x\) < bound",
    "throws": r"throwing_kernel.*thread \(1, 0, 0\): throws an exception",
    "launches": "launching_kernel.* launches a kernel",
    "shared_overrun": "(?s)heap-buffer-overflow.*WRITE of size 4.*shared_kernel",
    "global_overrun": "(?s)heap-buffer-overflow.*copy_kernel",
    "no_shared": "(?s)SEGV.*shared_kernel",
    "overflow": "stack-overflow",
}


def unless_unavailable(make, *args):
    if not build.CSRC.is_dir():
        pytest.skip(f"no source checkout around {__file__}")
    try:
        return make(*args)
    except build.Unavailable as missing:
        pytest.skip(str(missing))


@pytest.fixture(scope="module")
def selftest(tmp_path_factory):
    """Runs a case in a process of its own."""
    folder = tmp_path_factory.mktemp("emulator")
    program = unless_unavailable(build.build_program, build.HERE / "selftest.cu", folder)

    def run(case, *seeds, fake_stacks=False):
        options = build.options()
        options["ASAN_OPTIONS"] += f":detect_stack_use_after_return={int(fake_stacks)}"
        return subprocess.run(
            [program, case, *map(str, seeds or [1])],
            env=os.environ | options,
            capture_output=True,
            text=True,
        )

    return run


@pytest.mark.parametrize("fake_stacks", [False, True], ids=["", "fake_stacks"])
@pytest.mark.parametrize("case", RIGHT)
def test_right_kernels_pass_in_every_order(selftest, case, fake_stacks):
    run = selftest(case, *SEEDS, fake_stacks=fake_stacks)
    assert run.returncode == 0, run.stderr


def test_launches_are_checked_and_recorded(selftest):
    run = selftest("refusals")
    assert run.returncode == 0, run.stderr


def test_missing_barrier_shows(selftest):
    failures = [seed for seed in SEEDS if selftest("race", seed).returncode == 1]
    assert len(failures) > len(SEEDS) // 2


def test_unwritten_shared_memory_is_nan(selftest):
    assert selftest("unwritten").returncode == 0


def test_order_follows_from_the_seed(selftest):
    messages = {seed: selftest("divergent_barrier", seed).stderr.split("\n")[0] for seed in SEEDS}
    assert len(set(messages.values())) > 1
    assert selftest("divergent_barrier", 1).stderr.startswith(messages[1])


@pytest.mark.parametrize("case", CAUGHT)
def test_wrong_kernel_is_caught(selftest, case):
    run = selftest(case)
    assert run.returncode < 0, (run.stdout, run.stderr)  # by a signal
    assert re.search(CAUGHT[case], run.stderr), run.stderr


def test_cooperative_grid_that_does_not_fit_is_refused(selftest):
    run = selftest("too_large")
    assert run.returncode == 1
    assert "cudaErrorCooperativeLaunchTooLarge" in run.stderr


@pytest.mark.parametrize("words", ["__shared__ float x[32]", "extern __shared__ float x[]"])
def test_shared_variables_do_not_compile(tmp_path, words):
    source = tmp_path / "shared.cu"
    source.write_text(
        '#include "cuda/device.h"\n'
        "template <class T>\n"
        f"__global__ void kernel(T* out) {{ {words}; out[0] = x[0]; }}\n"
        "int main() {}\n"
    )
    with pytest.raises(RuntimeError, match=r"use shared_memory<T>\(\)"):
        unless_unavailable(build.build_program, source, tmp_path, False)
