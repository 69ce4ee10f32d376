"""The extension as built: what it includes and links to, what it says of itself, that it loads.

Tests of the sources skip where the tests run without their checkout, tests of CUDA code where the
extension was built without it.
"""

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fusedres import native
from fusedres.native.add_relu import add_relu_bwd, add_relu_fwd
from fusedres.native.batch_norm import batch_norm_bwd, batch_norm_fwd
from fusedres.native.bn_act import bn_act_bwd, bn_act_fwd
from fusedres.native.bn_relu_maxpool import bn_relu_maxpool_bwd, bn_relu_maxpool_fwd

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
INCLUDE = re.compile(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', re.MULTILINE)


@pytest.fixture
def extension():
    module = native.load()
    if module is None:
        pytest.skip(native.unavailable_reason())
    return module


@pytest.fixture
def cuda_extension(extension):
    if not extension.cuda_built:
        pytest.skip("the extension was built without CUDA kernels")
    return extension


@pytest.fixture
def includes():
    if not (ROOT / "setup.py").is_file() or not CSRC.is_dir():
        pytest.skip(f"no source checkout around {__file__}")
    sources = [p for p in CSRC.rglob("*") if p.suffix in (".h", ".cpp", ".cu", ".cuh")]
    assert len(sources) > 10
    return {p.relative_to(CSRC).as_posix(): INCLUDE.findall(p.read_text()) for p in sources}


def tool_output(tool, *args):
    path = shutil.which(tool)
    triton = importlib.util.find_spec("triton")  # its wheel brings CUDA's binary tools along
    if path is None and triton and triton.origin:
        folder = Path(triton.origin).parent / "backends" / "nvidia" / "bin"
        path = shutil.which(tool, path=str(folder))
    if path is None:
        pytest.skip(f"{tool} is not installed")
    return subprocess.run([path, *args], capture_output=True, text=True, check=True).stdout


# --- sources --------------------------------------------------------------------------------------


def test_no_source_includes_torch(includes):
    framework = re.compile(r"^(torch|ATen|c10|caffe2)/|^torch\.h$")
    found = {f: h for f, headers in includes.items() for h in headers if framework.search(h)}
    assert not found


def test_only_the_bindings_know_python(includes):
    python = re.compile(r"pybind11|Python\.h")
    assert {f for f, hs in includes.items() if any(map(python.search, hs))} == {"bindings.cpp"}


def test_a_contract_header_has_a_kernel_file_of_its_name(includes):
    headers = {Path(f).stem for f in includes if f.startswith("include/")}
    kernels = {Path(f) for f in includes if f.startswith(("cpu/", "cuda/"))}
    kernels = {f.stem for f in kernels if f.suffix in (".cpp", ".cu")}
    kernels = {re.sub("(_(fwd|bwd|dgrad|wgrad))?(_(mma|wgmma))?$", "", stem) for stem in kernels}
    # beside them: a second stage that two ops share, and batch_norm's kernel that ends in bn_act
    others = {"driver", "finish_sums", "batch_norm_act"}
    assert headers - {"types", "cuda_launch", "cpu_levels"} == kernels - others


def test_no_level_leaves_the_linker_a_choice(includes):
    """A function that levels share must not exist as code compiled for one of them: the linker
    keeps one copy of such, which may not run on an older machine.
    """
    folders = [f for f in (ROOT / "build").glob("ninja-*/cpu/*") if f.is_dir()]
    if not folders:
        pytest.skip("no objects of a build in build/")
    for folder in folders:
        for obj in sorted(folder.glob("*.o")):
            symbols = re.findall(r" [WVu] (\S+)", tool_output("nm", str(obj)))
            own = f"{len(folder.name)}{folder.name}"
            # exception tables' reference to the personality routine is data
            shared = [s for s in symbols if own not in s and not s.startswith("DW.ref.")]
            assert not shared, f"{obj.relative_to(ROOT)}: {shared}"


# --- the module -----------------------------------------------------------------------------------


def test_module_describes_itself(extension):
    assert extension.compiler
    if extension.cuda_built:
        assert re.fullmatch(r"\d+\.\d+", extension.cuda_version)
        assert extension.cuda_archs
    else:
        assert extension.cuda_version is None
        assert extension.cuda_archs == []
        assert "without CUDA" in extension.cuda_driver_status()


def test_driver_status_tells_whether_kernels_can_run(extension):
    status = extension.cuda_driver_status()
    if status is None:
        assert extension.cuda_built
    else:
        assert status.strip()


def test_reason_goes_with_absence():
    assert (native.load() is None) == (native.unavailable_reason() is not None)


def test_module_has_no_torch_symbol(extension):
    symbols = tool_output("nm", "-D", "--demangle", extension.__file__)
    assert "PyInit__C" in symbols
    assert not re.findall(r".*\b(?:at|c10|torch|caffe2)::.*", symbols)
    libraries = tool_output("ldd", extension.__file__)
    assert not re.findall(r".*(?:libtorch|libc10|libcudart|libcuda\b).*", libraries)


def test_module_exports_nothing_but_its_entry(extension):
    # A cudart or libstdc++ symbol that leaks out would meet torch's own copy in the same process.
    lines = tool_output("nm", "-D", "--defined-only", extension.__file__).splitlines()
    exported = {name for *_, kind, name in map(str.split, lines) if kind in "TDB"}
    assert exported <= {"PyInit__C", "_init", "_fini"}, sorted(exported)


def test_module_holds_code_for_each_architecture(cuda_extension):
    listing = tool_output("cuobjdump", "--list-elf", cuda_extension.__file__)
    built = set(re.findall(r"sm_(\w+)\.cubin", listing))
    hopper = {"90a"} if cuda_extension.wgmma_built else set()
    assert built == set(cuda_extension.cuda_archs) | hopper


def test_module_loads_alone(extension, tmp_path):
    # Beside torch but without its CUDA, in a process that has not loaded the package.
    code = (
        "import importlib.machinery as m, importlib.util as u, sys\n"
        "loader = m.ExtensionFileLoader('fusedres._C', sys.argv[1])\n"
        "module = u.module_from_spec(u.spec_from_loader('fusedres._C', loader))\n"
        "loader.exec_module(module)\n"
        "assert 'torch' not in sys.modules\n"
        "print(module.cuda_built)\n"
    )
    run = subprocess.run(
        [sys.executable, "-I", "-c", code, extension.__file__],
        cwd=tmp_path,
        env={"CUDA_VISIBLE_DEVICES": "", "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == str(extension.cuda_built)


# --- errors of the binding ------------------------------------------------------------------------


def test_half_is_refused_on_the_cpu(extension):
    x = torch.zeros(4, dtype=torch.float16)
    with pytest.raises(ValueError, match="float16 has no CPU kernels"):
        add_relu_fwd(x, x)


def test_pool_window_is_checked(extension):
    y, v = torch.zeros(1, 1, 40, 40), torch.zeros(1)
    with pytest.raises(ValueError, match="no window of kernel_size"):
        bn_relu_maxpool_fwd(y, v, v, v, 17, 1, 0)


def test_failed_launch_names_the_op_and_its_launch(cuda_extension):
    if cuda_extension.cuda_driver_status() is None:
        pytest.skip("a launch on a machine with a GPU does not fail")
    with pytest.raises(RuntimeError, match=r"add_relu_fwd: .* on device 0, last launch: .*blocks"):
        cuda_extension.add_relu_fwd((0, (1, 1, 1, 1024), 1, 0, 0), (16, 16, 16))


@pytest.mark.parametrize("device", [-1, 0])
def test_null_pointers_and_unknown_codes_are_refused(cuda_extension, device):
    y, window = (0, (2, 8, 4, 4), 0, device, 0), (3, 2, 1)
    calls = {
        "bn_act_fwd": (y, True, (0,) * 9),
        "bn_act_bwd": (y, (0,) * 13),
        "batch_norm_bwd": (y, True, (0,) * 9, (0, 0), (0, 0)),
        "bn_relu_maxpool_fwd": (y, window, (0,) * 5),
        "bn_relu_maxpool_bwd": (y, window, (0,) * 9),
        "add_relu_fwd": (y, (0,) * 3),
        "add_relu_bwd": (y, (0,) * 3),
    }
    wrong = [(4, *y[1:]), (0, (2, 8, -4, 4), *y[2:]), (*y[:2], 2, *y[3:])]
    for name, (_, *rest) in calls.items():
        for head in wrong:
            with pytest.raises(ValueError):
                getattr(cuda_extension, name)(head, *rest)
        if device >= 0:
            with pytest.raises(RuntimeError, match=f"{name}: invalid argument"):
                getattr(cuda_extension, name)(y, *rest)


def test_empty_launch_is_no_launch(cuda_extension):
    nothing = (0, (1, 1, 1, 0), 1, 0, 0)
    cuda_extension.add_relu_fwd(nothing, (0, 0, 0))
    cuda_extension.add_relu_bwd(nothing, (0, 0, 0))


# --- levels ---------------------------------------------------------------------------------------


@pytest.fixture
def each_level(extension):
    """Calls a function at every level of CPU kernels that runs here."""

    def call(function):
        best = extension.cpu_level()
        try:
            for level in extension.cpu_levels():
                extension.set_cpu_level(level)
                yield level, function()
        finally:
            extension.set_cpu_level(best)

    return call


def test_the_best_level_is_in_force(extension):
    assert extension.cpu_levels()[0] == "baseline"
    assert extension.cpu_level() == extension.cpu_levels()[-1]
    with pytest.raises(ValueError, match="no CPU kernels of level avx1024 here"):
        extension.set_cpu_level("avx1024")
    assert extension.cpu_level() == extension.cpu_levels()[-1]


@pytest.mark.parametrize("shape", [(3, 64, 29, 31), (2, 37, 9, 7), (5, 3, 17, 65)], ids=str)
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_levels_agree(each_level, dtype, memory_format, shape):
    """In NHWC all levels above the baseline give the same bits; the rest agrees to rounding."""
    generator = torch.Generator().manual_seed(0)
    y, residual = (
        torch.randn(shape, generator=generator).to(dtype).contiguous(memory_format=memory_format)
        for _ in range(2)
    )
    y[0, :, 0, 0] = float("nan")
    stat = torch.float64 if dtype == torch.float64 else torch.float32
    vectors = torch.rand(4, shape[1], generator=generator).to(stat).unbind()
    finite = y.nan_to_num()
    runs = {
        level: made
        for level, made in each_level(
            lambda: [
                *light_passes(finite, residual, vectors),
                bn_act_fwd(y, *vectors[:3], residual, None, None, None, True),
                bn_relu_maxpool_fwd(y, *vectors[:3], 3, 2, 1),
            ]
        )
    }
    size = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float64: 1e-13}[dtype]
    baseline = runs.pop("baseline")
    for level, made in runs.items():
        for ours, theirs in zip(made, baseline, strict=True):
            scale = theirs.nan_to_num().abs().max().item()
            torch.testing.assert_close(
                ours, theirs, rtol=size, atol=size * scale, equal_nan=True, msg=level
            )
    if memory_format == torch.channels_last:
        first, *others = runs.values() or [[]]
        for one, *rest in zip(first, *others, strict=True):
            assert all(torch.equal(one.nan_to_num(7), r.nan_to_num(7)) for r in rest)


# --- determinism ----------------------------------------------------------------------------------

# Above the size from which work is shared out: channels in one tile and in two, an odd number of
# pixels for the blocks, maps of one pixel, and images for the NCHW partition.
SHAPES = [(3, 64, 29, 31), (2, 1030, 7, 7), (700, 65, 1, 1), (5, 3, 64, 65)]


def light_passes(y, residual, vectors):
    """Every output of every CPU kernel on one input."""
    mean, scale, bias, rstd = vectors
    yield from batch_norm_fwd(y, None, None, None, None, True, 0.1, 1e-5)[:2]
    a = bn_act_fwd(y, mean, scale, bias, residual, mean, rstd, bias, True)
    yield a
    g, sums, res_sums = bn_act_bwd(y, residual, a, y, mean, residual, rstd)
    dtype = sums.dtype
    yield from (g, sums, res_sums)
    yield from batch_norm_bwd(g, y, mean, scale, rstd, sums, True, dtype, dtype)
    if min(y.shape[2:]) > 1:
        p = bn_relu_maxpool_fwd(y, mean, scale, bias, 3, 2, 1)
        yield p
        yield from bn_relu_maxpool_bwd(p, y, mean, scale, bias, 3, 2, 1)
    out = add_relu_fwd(y, residual)
    yield from (out, add_relu_bwd(residual, out))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_bits_do_not_depend_on_the_thread_count(extension, dtype, memory_format, shape):
    generator = torch.Generator().manual_seed(0)
    y, residual = (
        torch.randn(shape, generator=generator).to(dtype).contiguous(memory_format=memory_format)
        for _ in range(2)
    )
    stat = torch.float64 if dtype == torch.float64 else torch.float32
    vectors = torch.rand(4, shape[1], generator=generator).to(stat).unbind()
    threads = torch.get_num_threads()
    runs = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            runs.append(list(light_passes(y, residual, vectors)))
    finally:
        torch.set_num_threads(threads)
    for once, *others in zip(*runs, strict=True):
        assert once.isfinite().all()
        assert all(torch.equal(once, other) for other in others)
