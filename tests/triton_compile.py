"""Compiles every launch of triton_launches.py's list for GPUs that are not there, and holds gates.

Needs Triton, no torch and no GPU, so that one list can be held against several versions of Triton:

    python tests/triton_compile.py launches.json --dtypes bf16 fp16 --out table.json

Gates: it compiles; no register spills; shared memory within the device's; tensor cores in the GEMMs
over half types (wgmma on sm_90, mma on sm_80, tcgen05 on sm_100); and where a GEMM is one or two
steps deep on sm_90, room for two programs on a multiprocessor.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import types
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

PACKAGE = Path(__file__).resolve().parents[1] / "fusedres"


class Device(NamedTuple):
    """What a program may take, and what its multiprocessor has."""

    backend: str
    arch: int | str
    warp_size: int
    shared_limit: int  # bytes a program
    shared: int  # bytes a multiprocessor
    registers: int  # a multiprocessor
    tensor_core: str  # its instruction in the machine code


DEVICES = {
    "sm_80": Device("cuda", 80, 32, 166912, 167936, 65536, r"\bHMMA"),
    "sm_90": Device("cuda", 90, 32, 232448, 233472, 65536, r"\bHG?MMA"),
    "sm_100": Device("cuda", 100, 32, 232448, 233472, 65536, r"\bUTC\w*MMA"),
    "sm_120": Device("cuda", 120, 32, 101376, 102400, 65536, r"\bHMMA"),
    "gfx942": Device("hip", "gfx942", 64, 65536, 65536, 0, r"v_mfma"),
}
GEMMS = (
    *(
        f"conv_bn_{name}_kernel"
        for name in (
            *("fwd", "dgrad", "wgrad", "bwd", "spatial_fwd", "spatial_dgrad", "spatial_wgrad"),
            *("stem_fwd", "stem_wgrad"),
        )
    ),
    "conv_act_kernel",
)


def load(module: str) -> types.ModuleType:
    """A module of fusedres.triton_kernels.device, without running fusedres (which needs torch)."""
    for name, path in (
        ("fusedres", PACKAGE),
        ("fusedres.triton_kernels", PACKAGE / "triton_kernels"),
    ):
        if name not in sys.modules:
            package = types.ModuleType(name)
            package.__path__ = [str(path)]
            sys.modules[name] = package
    return importlib.import_module(f"fusedres.triton_kernels.device.{module}")


def _constant(value: Any) -> Any:
    import triton.language as tl

    return {"fp32": tl.float32, "fp64": tl.float64}.get(value, value)


def compile_launch(launch: dict[str, Any], target: str, half: str) -> dict[str, Any]:
    """One row: registers, spills, shared memory, tensor-core instructions, programs on an SM."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    device = DEVICES[target]
    kernel = getattr(load(launch["module"]), launch["kernel"])
    signature, constants, attributes = {}, {}, {}
    for i, (name, kind, value) in enumerate(launch["arguments"]):
        if kind == "constexpr":
            signature[name] = "constexpr"
            constants[name] = _constant(value)
        else:
            signature[name] = f"*{half}" if kind == "*bf16" else kind
            if value:
                attributes[(i,)] = [["tt.divisibility", 16]]
    options = {
        "num_warps": launch["num_warps"],
        "num_stages": launch["num_stages"],
        "enable_fp_fusion": True,
    }
    dtype = next(k for _, k, _ in launch["arguments"] if k.startswith("*"))
    row: dict[str, Any] = {
        "kernel": launch["kernel"],
        "variant": variant(constants),
        "dtype": half if dtype == "*bf16" else dtype[1:],
        "target": target,
        "want": launch["want"],
        "triton": triton.__version__,
        **{k: options[k] for k in ("num_warps", "num_stages")},
    }
    try:
        compiled = triton.compile(
            ASTSource(kernel, signature, constants, attributes),
            target=GPUTarget(device.backend, device.arch, device.warp_size),
            options=options,
        )
    except Exception as error:  # the row reports it
        return row | {"error": f"{type(error).__name__}: {error}"[:500]}
    used = resources(compiled, device, triton)
    threads = launch["num_warps"] * device.warp_size
    row |= {"shared": compiled.metadata.shared, **used}
    if device.registers and used["registers"]:
        granted = -(-used["registers"] // 8) * 8
        row["programs"] = min(
            device.registers // (granted * threads),
            device.shared // (compiled.metadata.shared + 1024),
            2048 // threads,
        )
    return row


def variant(constants: dict[str, Any]) -> str:
    """The constants that tell one compilation of a kernel from another, in short."""
    parts = []
    for name, value in constants.items():
        if name in ("ACC", "PRECISION") or value is None or name.endswith("_ptr"):
            continue
        shown = int(value) if isinstance(value, bool) else value
        parts.append(f"{name}{shown}")
    return " ".join(parts)


def resources(compiled: Any, device: Device, triton: types.ModuleType) -> dict[str, Any]:
    """Registers, spilled bytes or slots, and tensor-core instructions of the machine code."""
    if device.backend == "hip":
        code = compiled.asm["amdgcn"]
        spilled = re.findall(r"vgpr_spill_count:\s*(\d+)", code)  # scalars spill to registers
        registers = re.search(r"\.vgpr_count:\s*(\d+)", code)
        return {
            "registers": int(registers.group(1)) if registers else None,
            "spills": sum(map(int, spilled)),
            "tensor_core": len(re.findall(device.tensor_core, code)),
        }
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        run = [str(tool), "-res-usage", "-sass", file.name]
        text = subprocess.run(run, capture_output=True, text=True, check=True).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert usage is not None, text[:500]
    return {
        "registers": int(usage.group(1)),
        "spills": int(usage.group(2)) + len(re.findall(r"\b(?:STL|LDL)\b", text)),
        "tensor_core": len(re.findall(device.tensor_core, text)),
        "wgmma": len(re.findall(r"\bHGMMA", text)),
    }


def faults(row: dict[str, Any]) -> Iterator[str]:
    """What a row breaks."""
    if "error" in row:
        yield row["error"]
        return
    device = DEVICES[row["target"]]
    if row["spills"]:
        yield f"spills {row['spills']}"
    if row["shared"] > device.shared_limit:
        yield f"shared memory {row['shared']} of {device.shared_limit}"
    half_gemm = row["kernel"] in GEMMS and row["dtype"] in ("bf16", "fp16")
    if half_gemm and not row["tensor_core"]:
        yield "no tensor-core instruction"
    # the rows of the left operand: wgmma takes 64 (bwd's are columns of C)
    sides = "BN" if row["kernel"] == "conv_bn_bwd_kernel" else "BM|BN"
    small = re.search(rf"\b({sides})(16|32)\b", row["variant"])
    if half_gemm and row["target"] == "sm_90" and not small and not row["wgmma"]:
        yield "no wgmma"
    if half_gemm and row["target"] == "sm_90" and row.get("programs", 2) < row.get("want", 1):
        yield f"{row['programs']} programs on a multiprocessor, {row['want']} wanted"


def job(item: tuple[dict[str, Any], str, str]) -> dict[str, Any]:
    """compile_launch for a pool."""
    return compile_launch(*item)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("launches", type=Path)
    parser.add_argument("--dtypes", nargs="+", choices=["bf16", "fp16"], default=["bf16"])
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, help="where to write the table as JSON")
    options = parser.parse_args()
    lists = json.loads(options.launches.read_text())
    items = [
        (launch, target, half)
        for target, listed in lists.items()
        for half in options.dtypes
        for launch in listed
        if half == "bf16" or any(kind == "*bf16" for _, kind, _ in launch["arguments"])
    ]
    with ProcessPoolExecutor(options.jobs) as pool:
        rows = list(pool.map(job, items, chunksize=4))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(rows, indent=1))
    broken = [(row, list(faults(row))) for row in rows]
    for row, why in broken:
        if why:
            print(row["target"], row["dtype"], row["kernel"], row["variant"], *why, sep=" | ")
    red = sum(bool(why) for _, why in broken)
    print(f"{len(rows)} compilations, {red} break a gate")
    return 1 if red else 0


if __name__ == "__main__":
    sys.exit(main())
