"""The tree shows the architecture: imports go one way, an op has one name in every room."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

import fusedres
from fusedres import backends

SOURCE = Path(__file__).resolve().parent.parent
PACKAGE = Path(fusedres.__file__).resolve().parent

# a module may import what stands below it; a room imports torch, its own files, and the leaf
# _tensors
LEVELS = [
    {"_tensors", "_plans", "_version", "_C"},
    {"_checks", "_conv", "_norm", "_plan_table"},
    {"reference", "library", "native", "triton_kernels"},
    {"deferred", "backends"},
    {"ops"},
    {"functional"},
    {"nn"},
    {"models"},
    {"info", "testing"},
    {"training"},
    {"bench", "cli"},
    {"__init__", "__main__"},
]
ROOMS = LEVELS[2]
LEVEL = {name: i for i, names in enumerate(LEVELS) for name in names}


def files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def top(path: Path) -> str:
    """The part of the package a file belongs to: "ops" for ops/bn_act.py, "info" for info.py."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> list[str]:
    """Every module imported at the top level of a file."""
    names = []
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_one_way(path: Path) -> None:
    here = top(path)
    assert here in LEVEL, f"{here} has no level: say where it stands"
    for name in imported(path):
        if not name.startswith("fusedres."):
            continue
        there = name.split(".")[1]
        there = there if there in LEVEL else "__init__"
        same = there == here
        assert same or LEVEL[there] < LEVEL[here] or {here, there} <= LEVELS[-2], (
            f"{path.relative_to(PACKAGE)} imports {name} from above or beside it"
        )


@pytest.mark.parametrize("room", sorted(ROOMS))
def test_rooms_import_no_third_party_but_their_own(room: str) -> None:
    allowed = {"torch", "fusedres", *sys.stdlib_module_names}
    allowed |= {"triton"} if room == "triton_kernels" else set()
    for path in (PACKAGE / room).rglob("*.py"):
        for name in imported(path):
            assert name.split(".")[0] in allowed, f"{path.relative_to(PACKAGE)} imports {name}"


def public_stems(folder: Path, pattern: str = "*.py") -> set[str]:
    stems = {p.name.split(".")[0] for p in folder.glob(pattern)}
    stems = {re.sub("_(fwd|bwd|wgrad)$", "", s) for s in stems}
    return {s for s in stems if not s.startswith("_")}


def test_an_op_has_one_name_in_every_room() -> None:
    ops = public_stems(PACKAGE / "ops")
    assert ops == set(backends.OPS)
    assert public_stems(PACKAGE / "reference") == ops
    for room in ("library", "native", "triton_kernels"):
        assert public_stems(PACKAGE / room) <= ops
    # conv_bn's convolution is the library's; every other op is our own C++
    assert public_stems(PACKAGE / "library") | public_stems(PACKAGE / "native") == ops


@pytest.mark.skipif(not (SOURCE / "csrc").is_dir(), reason="needs the source tree")
def test_c_sources_and_tests_carry_the_names_of_ops() -> None:
    ops = set(backends.OPS)
    assert {f"test_{op}" for op in ops} <= public_stems(SOURCE / "tests")
    headers = public_stems(SOURCE / "csrc" / "include" / "fusedres", "*.h")
    for kind, pattern in (("cpu", "*.cpp"), ("cuda", "*.cu")):
        kernels = public_stems(SOURCE / "csrc" / kind, pattern) & ops
        assert kernels <= headers, kind
    assert public_stems(SOURCE / "csrc" / "cpu", "*.cpp") <= ops
    assert public_stems(PACKAGE / "native") <= headers
