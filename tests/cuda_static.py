"""What the machine code of the built extension says without a GPU: a table of kernels, and gates.

    python tests/cuda_static.py [--archs sm_80 sm_90] [--out table.json]

Gates: no stack frame, so no spilled register; loads and stores of 128 bits in every kernel that
takes vectors. Of kernels on tensor cores: their own instructions; blocks a multiprocessor as they
were planned for; on Hopper products fed from registers and not waited for one by one, bulk copies,
and registers that move to those who multiply. Needs cuobjdump, which CUDA's toolkit and Triton's
wheel have.
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
# kernels on tensor cores: the instructions that each must have, by how they begin
TENSOR_CORES = {
    "conv_bn_mma_kernel": ("HMMA.16816.F32", "LDGSTS.E.BYPASS.128", "LDSM", "STG.E.128"),
    "conv_bn_wgmma_kernel": ("HGMMA.64x", "UTMALDG.2D", "LDSM", "STG.E.128"),
}
REGISTERS = 65536  # of a multiprocessor
MULTIPLIERS = 256  # threads of a block that multiply; kWgmmaThreads has 128 more
# kCopierRegisters and kMultiplierRegisters, as the machine code writes them
MOVED = ("USETMAXREG.DEALLOC.CTAPOOL 0x18", "USETMAXREG.TRY_ALLOC.CTAPOOL UP0, 0xf0")
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


def instructions(path: str, arch: str) -> dict[str, list[str]]:
    """By symbol: the machine code, an instruction a line."""
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in cuobjdump("-sass", "-arch", arch, path).splitlines():
        if match := re.match(r"\s*code for (\w+)", line):  # it takes sm_90a for sm_90 too
            mine = match[1] == arch
        elif "Function :" in line:
            lines = found.setdefault(line.split(" : ")[1].strip(), []) if mine else []
        elif match := re.match(r"\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z].*?)\s*;", line):
            lines.append(match[1])
    return found


def accesses(lines: list[str]) -> Counter[str]:
    """Instructions of global memory, and spills as the assembler names them."""
    counter: Counter[str] = Counter()
    for line in lines:
        if match := re.match(r"(LDG|STG)\.E(?:\.\w+)*?(\.128)?\s", line):
            counter[match[1] + (match[2] or "")] += 1
        elif match := re.match(r"(LDL|STL)\b", line):
            counter[match[1]] += 1
    return counter


def kind_of(symbol: str) -> str | None:
    """Which of TENSOR_CORES a kernel is."""
    return next((name for name in TENSOR_CORES if name in symbol), None)


def missing(symbol: str, registers: int, lines: list[str]) -> list[str]:
    """What a kernel on tensor cores lacks."""
    kind = kind_of(symbol)
    if kind is None:
        return []
    found = [f"no {i}" for i in TENSOR_CORES[kind] if not any(x.startswith(i) for x in lines)]
    columns = int(re.search(r"(?:Float16E|NS_8BFloat16E)Li(\d+)E", symbol)[1])  # type: ignore[index]
    if kind == "conv_bn_mma_kernel":
        residents = 2 if columns <= 64 and "Statistics" in symbol else 1  # kResidents
        if registers * MULTIPLIERS * residents > REGISTERS:
            found.append(f"{registers} registers leave no room for {residents} blocks")
        return found
    products = [x for x in lines if x.startswith("HGMMA")]
    if not all(re.match(rf"HGMMA\.64x{columns}x16\S* R\d+, R\d+, gdesc", x) for x in products):
        found.append("a product whose first operand is not in registers")
    waits = sum(x.startswith("WARPGROUP.DEPBAR") for x in lines)
    if waits >= len(products):
        found.append(f"{waits} waits for {len(products)} products: one for each")
    found += [f"no {x}" for x in MOVED if x not in lines]
    used = 1 + max(int(r) for x in lines for r in re.findall(r"\bR(\d+)\b", x))
    if columns == 256 and not registers < used <= 240:
        found.append(f"{used} registers in use, {registers} at launch: none have moved")
    return found


def takes_vectors(symbol: str) -> bool:
    """Whether a kernel's accesses are of 16 bytes."""
    if kind_of(symbol) is not None:
        return False  # its loads are copies
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
        for symbol, lines in sorted(instructions(path, arch).items()):
            row = {"arch": arch, "symbol": symbol, **used[arch, symbol]}
            count, names = accesses(lines), ("LDG.128", "STG.128", "LDL", "STL")
            lacks = missing(symbol, row["registers"], lines)
            rows.append(row | {name: count[name] for name in names} | {"lacks": lacks})
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
        found += [f"{where}: {what}" for what in row["lacks"]]
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
    if extension.wgmma_built and "sm_90a" not in archs and not args.archs:
        archs.append("sm_90a")
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
