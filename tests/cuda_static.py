"""What the machine code of the built extension says without a GPU: a table of kernels, and gates.

    python tests/cuda_static.py [--archs sm_80 sm_90] [--out table.json]

Gates: no stack frame, so no spilled register; loads and stores of 128 bits in every kernel that
takes vectors; the extension smaller than a wheel may be. Needs cuobjdump, which CUDA's toolkit and
Triton's wheel have.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

NARROW = ("bn_relu_maxpool_bwd_stem_kernel",)  # 4 bytes a thread: its registers allow no more
READS_ONLY = ("batch_norm_stats_kernel",)
ALWAYS_WIDE = ("bn_relu_maxpool_fwd_stem_kernel", "pack_kernel")
Row = dict[str, Any]


def tool(name: str) -> str | None:
    """A binary tool of CUDA, from PATH or from Triton's wheel."""
    triton = importlib.util.find_spec("triton")
    folder = ""
    if triton and triton.origin:
        folder = str(Path(triton.origin).parent / "backends" / "nvidia" / "bin")
    return shutil.which(name) or shutil.which(name, path=folder)


def cuobjdump(*arguments: str) -> str:
    """What it prints."""
    path = tool("cuobjdump")
    if path is None:
        raise FileNotFoundError("cuobjdump is not installed")
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


def resources(path: str) -> dict[tuple[str, str], Row]:
    """By architecture and symbol: registers a thread, bytes of stack and local memory."""
    rows: dict[tuple[str, str], Row] = {}
    arch = symbol = ""
    for line in cuobjdump("-res-usage", path).splitlines():
        if found := re.match(r"arch = (\w+)", line):
            arch = found[1]
        elif found := re.match(r" Function (\w+):", line):
            symbol = found[1]
        elif found := re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", line):
            registers, stack, local = map(int, found.groups())
            rows[arch, symbol] = {"registers": registers, "stack": stack, "local": local}
    return rows


def accesses(path: str, arch: str) -> dict[str, Counter[str]]:
    """By symbol: instructions of global memory, and spills as the assembler names them."""
    found: dict[str, Counter[str]] = {}
    counter: Counter[str] = Counter()
    for line in cuobjdump("-sass", "-arch", arch, path).splitlines():
        if "Function :" in line:
            counter = found.setdefault(line.split(" : ")[1].strip(), Counter())
        elif match := re.search(r"\b(LDG|STG)\.E(?:\.\w+)*?(\.128)?\s", line):
            counter[match[1] + (match[2] or "")] += 1
        elif match := re.search(r"\b(LDL|STL)\b", line):
            counter[match[1]] += 1
    return found


def takes_vectors(symbol: str) -> bool:
    """Whether a kernel's accesses are of 16 bytes."""
    if any(name in symbol for name in NARROW):
        return False
    if any(name in symbol for name in ALWAYS_WIDE):
        return True
    width = re.search(r"(?:Float16E|NS_8BFloat16E|[fd])Li(\d+)E", symbol)
    return width is not None and int(width[1]) > 1


def table(path: str, archs: list[str]) -> list[Row]:
    """A row per kernel and architecture."""
    used = resources(path)
    rows = []
    for arch in archs:
        for symbol, count in sorted(accesses(path, arch).items()):
            row = {"arch": arch, "symbol": symbol, **used[arch, symbol]}
            names = ("LDG.128", "STG.128", "LDL", "STL")
            rows.append(row | {name: count[name] for name in names})
    return rows


def broken(rows: list[Row]) -> list[str]:
    """What breaks a gate."""
    found = []
    for row in rows:
        where = f"{row['arch']} {row['symbol']}"
        if row["stack"] or row["local"] or row["LDL"] or row["STL"]:
            found.append(f"{where}: {row['stack']} bytes of stack, {row['LDL']} local loads")
        stores = row["STG.128"] or any(name in row["symbol"] for name in READS_ONLY)
        if takes_vectors(row["symbol"]) and not (row["LDG.128"] and stores):
            found.append(f"{where}: {row['LDG.128']} loads, {row['STG.128']} stores of 128 bits")
    return found


def main() -> int:
    """Prints the table; 1 where a gate is broken. Without CUDA code there is none to break."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--archs", nargs="*")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    from fusedres import native

    extension = native.require()
    if not extension.cuda_built:
        print("nothing to look at: there was no nvcc when the extension was built")
        return 0
    path = str(extension.__file__)
    archs = args.archs or [f"sm_{arch}" for arch in extension.cuda_archs]
    rows = table(path, archs)
    for row in rows:
        print(
            f"{row['arch']:7}{row['registers']:4} registers {row['LDG.128']:3} x 128-bit loads  "
            f"{row['symbol']}"
        )
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(rows, indent=1) + "\n")
    problems = broken(rows)
    print(f"{len(rows)} kernels for {', '.join(archs)}: {len(problems)} gates broken")
    print(*problems, sep="\n")
    return 1 if problems or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
