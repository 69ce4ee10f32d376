"""The kernel ladder of benchmarks/ladder: every rung is right, by the emulator; and what nvcc makes
of it."""

import importlib.util
import json
import os
import re
import shutil
import subprocess

import cuda_static
import pytest
from cuda_emulator import build

LADDER = build.CSRC.parent / "benchmarks" / "ladder"
if not LADDER.is_dir():
    pytest.skip("needs the source tree", allow_module_level=True)
spec = importlib.util.spec_from_file_location("ladder_run", LADDER / "run.py")
ladder = importlib.util.module_from_spec(spec)
spec.loader.exec_module(ladder)

NAMES = ["naive", "tiled", "tma", "warp_specialised"]
NAMES += [f"library_{name}" for name in ("mma", "mma_stats", "wgmma", "wgmma_stats")]
# Rows alone, over a tile's end, and in a third tile; pieces of 64, 128 and 256 columns; rings that
# go round, within a tile and over several.
SIZES = [(1, 64, 64), (129, 320, 128), (300, 64, 256), (300, 128, 320), (128, 192, 64)]


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """Under sanitizers, but for the library's kernels, which have tests of their own."""
    plain = [*ladder.DEFINES, "-fno-sanitize=all"]
    others = {source: ladder.DEFINES for source in ladder.RUNGS}
    others |= {source: plain for source in ladder.LIBRARY}
    folder = tmp_path_factory.mktemp("ladder")
    try:
        return build.build_program(LADDER / "ladder.cu", folder, others=others)
    except build.Unavailable as missing:
        pytest.skip(str(missing))


def run(program, *arguments):
    return subprocess.run(
        [program, *map(str, arguments)],
        env=os.environ | build.options(),
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_rung_is_right(program, tmp_path, size):
    m, c, k = size
    rows = tmp_path / "rows.jsonl"
    seed = SIZES.index(size) + 1  # of the inputs, and of the order of threads
    sizes = ["--m", m, "--c", c, "--k", k]
    ran = run(program, *sizes, "--check-only", "--seed", seed, "--json", rows)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    found = [json.loads(line) for line in rows.read_text().splitlines()]
    assert [row["rung"] for row in found] == NAMES
    assert all(row["right"] and 0 < row["max_error"] < 0.005 for row in found)
    assert {(row["m"], row["c"], row["k"]) for row in found} == {size}


def test_a_rung_without_room_is_named_and_passed_over(program):
    wide = ["--m", 1, "--c", 4096, "--k", 256, "--check-only"]
    ran = run(program, *wide, "--rungs", "warp_specialised,tma")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert re.search(r"^warp_specialised +passed over: no room", ran.stdout, re.MULTILINE)
    assert re.search(r"^tma +\d", ran.stdout, re.MULTILINE)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--m", 5], "go together"),
        (["--m", 0, "--c", 64, "--k", 64], "not a number between 1 and"),
        (["--c", 65], "--c must be a multiple of 64"),
        (["--rungs", "naive,fast"], "no rung fast; there are: naive tiled tma"),
        (["--quick"], "unknown argument --quick"),
    ],
)
def test_misuse_is_named(program, arguments, message):
    ran = run(program, *arguments)
    assert ran.returncode == 2
    assert message in ran.stderr


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on PATH")
@pytest.mark.parametrize("source", ladder.RUNGS, ids=lambda source: source.stem)
def test_machine_code_of_a_rung(tmp_path, source):
    if cuda_static.tool("cuobjdump") is None:
        pytest.skip("no cuobjdump")
    out = tmp_path / "rung.o"
    command = ["nvcc", *ladder.flags(source, ["90a"]), "-Xptxas", "-v"]
    ran = subprocess.run([*command, "-c", source, "-o", out], capture_output=True, text=True)
    said = ran.stdout + ran.stderr
    assert ran.returncode == 0, said
    assert not re.search(r"warning|C75\d\d|Potential Performance Loss", said), said
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+)", said)
    assert all(found == ("0", "0", "0") for found in spills), said
    if source.stem == "5_library":
        assert spills == []  # its kernels are the library's: cuda_static.py
        return
    assert len(spills) == (3 if source.stem == "4_warp_specialised" else 1)
    code = cuda_static.cuobjdump("-sass", str(out))
    found = {name: len(re.findall(rf"\b{name}\b", code)) for name in ("HGMMA", "HMMA")}
    # Of 64 channels: 4 wgmma of 16 for each number of columns; 4 * 8 pieces by mma.sync.
    expected = {"2_tiled": (0, 32), "3_tma": (4, 0), "4_warp_specialised": (12, 0)}
    assert (found["HGMMA"], found["HMMA"]) == expected.get(source.stem, (0, 0)), source
