"""The emulator that runs csrc/cuda on the CPU: it computes what a GPU would, and catches what a GPU
would fault on, hang at or get wrong now and then.

The kernels are those of cuda_emulator/*selftest.cu, right ones and wrong ones.
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
TENSOR_RIGHT = [
    "copying",
    "ring_64",
    "ring_128",
    "ring_256",
    "boxes",
    "descriptions",
    "capability",
    "parts",
]
TENSOR_CAUGHT = {  # for every seed
    "copy_misaligned": r"thread \(77, 0, 0\): misaligned: copy_async at .* a multiple of 16",
    "copy_outside": "copy_async at .* not within the block's shared memory",
    "row_misaligned": "misaligned: load_matrices at .* a multiple of 16",
    "missing_lane": "for lanes 0x00000200 of mask 0xffffffff, which never arrive",
    "no_init": "barrier_wait at .* of a barrier that is not initialised, at shared address 32",
    "no_init_fence": r"copy_box at .* no barrier_init_fence\(\) after barrier_init\(\)",
    "init_twice": "barrier_init at .* of a barrier that is initialised",
    "wrong_parity": "(?s)wait at .* for parity 0 of the barrier at shared address 24.*deadlock"
    "|copy_box at .* to where|where all 1 have arrived|is in flight",
    "two_arrivals": "barrier_arrive at .* where all 1 have arrived",
    "too_few_bytes": "(?s)256 threads, .* 0 of 1 arrivals .* 16 bytes are too many.*deadlock",
    "too_many_bytes": "(?s)256 threads, .* 0 of 1 arrivals .* 16 bytes are missing.*deadlock",
    "box_misaligned": "misaligned: copy_box at .* shared address 1536, .* a multiple of 1024",
    "box_outside": "copy_box at .* not within the block's shared memory",
    "no_map": r"copy_box at .* with a map that describe\(\) has not written",
    "copy_too_many": "leaves while the copy of .* is in flight",
    "overwritten_barrier": "copy_box at .* of a barrier that something has overwritten",
    "no_empty_wait": "where all 1 have arrived|to where the copy of .* is still to come",
    "no_product_wait": "leaves while the product of .* is in flight",
    "touch_fragment": "changes or drops a fragment of the product of .* before it has waited",
    "touch_accumulator": "changes or drops an accumulator of the product of .* before it has",
    "no_fence": r"wgmma at .* without wgmma_fence\(\) since the last wgmma_wait\(\)",
    "tile_misaligned": "misaligned: wgmma at .* shared address 17920 with strides 16 and 1024",
    "tile_outside": "wgmma at .* of a tile that ends at shared address .*, beyond the block's",
    "other_descriptor_of_lane": "wgmma at .* with other operands than another lane of its warp",
    "other_descriptor_of_warp": "with other operands than another warp of its warpgroup",
    "missing_warp": "another warp of its warpgroup wgmma(_commit)? at",
    "other_registers": "another warp of its warpgroup give_registers at",
    "small_group": "executes wgmma_fence at .* in a warpgroup that is not whole",
    "older_device": "barrier_init at .* which the device of compute capability 8.0 lacks",
    "part_of_other_size": "part_barrier 1 at .* threads, but others wait there for",
    "part_zero": "part_barrier 0 at .* of 64 threads in a block of 256",
    "part_not_all": "(?s)at part_barrier 2, with 32 of 64 threads there.*deadlock",
}
# Wrong results, for every seed; and these or a message, for many.
TENSOR_WRONG = ["no_copy_wait", "no_block_barrier", "early_read", "no_part_barrier"]
TENSOR_SHOWS = ["copy_wait_too_short", "early_release", "no_full_wait", "no_init_barrier"]


def unless_unavailable(make, *args):
    if not build.CSRC.is_dir():
        pytest.skip(f"no source checkout around {__file__}")
    try:
        return make(*args)
    except build.Unavailable as missing:
        pytest.skip(str(missing))


def cases_of(name, folder):
    """Runs a case in a process of its own."""
    program = unless_unavailable(build.build_program, build.HERE / name, folder)

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


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("emulator")  # where the engine is compiled once


@pytest.fixture(scope="module")
def selftest(folder):
    return cases_of("selftest.cu", folder)


@pytest.fixture(scope="module")
def tensor_selftest(folder):
    return cases_of("tensor_selftest.cu", folder)


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


@pytest.mark.parametrize("fake_stacks", [False, True], ids=["", "fake_stacks"])
@pytest.mark.parametrize("case", TENSOR_RIGHT)
def test_right_kernels_with_tensor_cores_pass_in_every_order(tensor_selftest, case, fake_stacks):
    run = tensor_selftest(case, *SEEDS[: 2 if fake_stacks else None], fake_stacks=fake_stacks)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("case", TENSOR_CAUGHT)
def test_fault_with_tensor_cores_is_caught(tensor_selftest, case):
    for seed in SEEDS[:3]:
        run = tensor_selftest(case, seed)
        assert run.returncode < 0, (seed, run.stdout, run.stderr)
        assert re.search(TENSOR_CAUGHT[case], run.stderr), (seed, run.stderr)


@pytest.mark.parametrize("case", TENSOR_WRONG)
def test_missing_wait_gives_wrong_results(tensor_selftest, case):
    for seed in SEEDS[:3]:
        run = tensor_selftest(case, seed)
        assert run.returncode == 1, (seed, run.stdout, run.stderr)


@pytest.mark.parametrize("case", TENSOR_SHOWS)
def test_missing_wait_shows_for_some_seed(tensor_selftest, case):
    failures = [seed for seed in SEEDS if tensor_selftest(case, seed).returncode != 0]
    assert len(failures) >= len(SEEDS) // 2


@pytest.mark.parametrize("what", ["layouts", "plans"])
def test_host_arithmetic(folder, what):
    program = unless_unavailable(build.build_program, build.HERE / f"{what}.cpp", folder)
    run = subprocess.run(
        [program], env=os.environ | build.options(), capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr


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
