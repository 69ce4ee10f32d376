"""The suites: each provider of an op computes it, wrong and slow kernels show, rows are whole."""

from __future__ import annotations

import math
import time
import types
from dataclasses import replace
from typing import Any

import pytest
import torch

from fusedres import backends
from fusedres.bench import networks, ops, profile, roofline
from fusedres.bench.convolutions import DIRECTIONS, Site, conv_cases
from fusedres.bench.judging import suspect
from fusedres.bench.light import PASSES, light_cases
from fusedres.bench.measure import Ceilings, Job, Setting, largest_error, run_job
from fusedres.bench.networks import measure_network
from fusedres.bench.ops import OpCase, measure_op, op_job
from fusedres.bench.profile import profile_step
from fusedres.bench.providers import Workload
from fusedres.bench.suites import SUITES, jobs_of, setting_for
from fusedres.bench.verdict import changes

CPU = torch.device("cpu")
WHERE = {"device": "cpu", "threads": 1, "time": "2026-01-01T00:00:00"}
CEILINGS = Ceilings(1e10, 1e11)
NEEDS_CPP = pytest.mark.skipif(
    backends.not_ready("cpp") is not None, reason=str(backends.not_ready("cpp"))
)


def setting(**changed: Any) -> Setting:
    given = {"rounds": 3, "budget": 5.0, "seconds": 1e-3, "cache": 2**16, "where": WHERE}
    given |= {"ceilings": dict.fromkeys((torch.float32, torch.float64), CEILINGS)}
    return Setting(**({"device": CPU} | given | changed))


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_every_provider_of_a_layer_computes_what_the_truth_says(direction: str) -> None:
    for case in conv_cases(CPU, torch.float64, (2,), (direction,), image=64):
        inputs = case.inputs(0)
        truth = case.truth(inputs)
        judged = [c for c in case.candidates if c.judged]
        assert {c.name for c in judged} >= {"eager"}
        for candidate in judged:
            results = candidate.run(case.inputs(0))
            assert results, (case.fields, candidate.label)
            error = largest_error(results, truth)
            assert error < 1e-9, (case.fields, candidate.label, error)


def test_the_layers_of_the_suite_are_those_of_the_network() -> None:
    cases = conv_cases(CPU, torch.bfloat16, (256,), ("fwd",))
    assert len(cases) == 23 and sum(case.fields["count"] for case in cases) == 53
    by_shape = {tuple(case.fields["shape"]): case for case in cases}
    inner = by_shape[256, 56, 64, 256, 1, 1]
    pixels = 256 * 56 * 56
    assert inner.bytes == pixels * (64 + 256) * 2 + 64 * 256 * 2
    assert inner.flops == 2 * pixels * 64 * 256
    joining = by_shape[256, 56, 256, 64, 1, 1]  # y, residual in; a, y out
    assert joining.bytes == pixels * (3 * 256 + 64) * 2 + 64 * 256 * 2
    strided = by_shape[256, 56, 256, 512, 1, 2]  # a quarter of the pixels
    assert strided.bytes == 256 * 28 * 28 * (256 + 512) * 2 + 256 * 512 * 2
    assert len(conv_cases(CPU, torch.bfloat16, (1,), ("dgrad",))) == 22  # not the image's


def test_bytes_of_a_layers_backward_count_every_tensor_once() -> None:
    layer = next(la for la in roofline.layers() if la.name == "layer1.1.conv3")
    site, pixels = Site(layer, 2, torch.bfloat16, CPU), 2 * 56 * 56
    weight = 64 * 256 * 2
    # g, y; x, for mask and sums; what leaves
    assert site.case("dgrad", 1).bytes == pixels * (2 * 256 + 2 * 64) * 2 + weight
    assert site.case("wgrad", 1).bytes == pixels * (2 * 256 + 64) * 2 + weight
    assert site.case("bwd", 1).bytes == pixels * (2 * 256 + 2 * 64) * 2 + 2 * weight
    assert site.case("bwd", 1).flops == 2 * site.case("dgrad", 1).flops


def test_every_light_pass_computes_what_the_truth_says() -> None:
    cases = light_cases(CPU, torch.float64, (2,), quick=True)
    assert {case.fields["case"] for case in cases} == {row.name for row in PASSES}
    for case in cases:
        truth = case.truth(case.inputs(0))
        for candidate in case.candidates:
            error = largest_error(candidate.run(case.inputs(0)), truth)
            # torch's statistics are in float32 here and there
            assert error < (1e-4 if candidate.name == "eager" else 1e-10), (case.fields, error)


# --- what an op's rows hold -----------------------------------------------------------------------


def small_pass(name: str) -> OpCase:
    cases = light_cases(CPU, torch.float32, (2,), quick=True)
    return next(case for case in cases if case.fields["case"] == name)


@NEEDS_CPP
def test_rows_of_an_op_are_whole() -> None:
    case = small_pass("bn_act_fwd, residual")
    measured = measure_op(case, setting())
    job = op_job(case, setting())
    assert tuple(m.row["name"] for m in measured) == job.names
    assert all(measured[0].row[field] == value for field, value in job.about.items())
    assert [m.row["name"] for m in measured] == ["fusedres-cpp", "eager", "copy"]
    for m in measured:
        row = m.row
        assert len(m.seconds) == 3 and row["runs"] >= 3 and row["how"] == "launches"
        assert row["section"] == "light" and row["shape"] == [2, 64, 112, 112]
        assert row["bytes"] == 3 * 2 * 64 * 112 * 112 * 4
        assert 0 < row["p20"] <= row["ms"] <= row["p80"]
        assert row["gb_s"] == pytest.approx(row["bytes"] / row["ms"] / 1e6)
        assert row["of_roofline"] == pytest.approx(row["gb_s"] / 10)
        assert row["against"] == "eager" and row["device"] == "cpu"
    errors = {m.row["name"]: m.row.get("max_error") for m in measured}
    assert errors["copy"] is None and 0 < errors["fusedres-cpp"] < 1e-5


@NEEDS_CPP
def test_a_wrong_kernel_shows_in_the_error_column(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = backends.kernels("cpp", "bn_act")
    right = kernels.bn_act_fwd
    monkeypatch.setattr(kernels, "bn_act_fwd", lambda *args: right(*args[:-1], False))  # no ReLU
    rows = [m.row for m in measure_op(small_pass("bn_act_fwd"), setting())]
    by_name = {row["name"]: row for row in rows}
    assert by_name["fusedres-cpp"]["max_error"] > 0.1 > by_name["eager"]["max_error"]
    assert suspect(by_name["fusedres-cpp"], rows) and not suspect(by_name["eager"], rows)


@NEEDS_CPP
def test_a_wrong_backward_shows_in_a_blocks_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = backends.kernels("cpp", "batch_norm")
    right = kernels.batch_norm_bwd

    def wrong(g: Any, y: Any, mean: Any, scale: Any, rstd: Any, sums: Any, *rest: Any) -> Any:
        return right(g, y, mean, scale, rstd, sums * 0, *rest)  # as if statistics were constants

    work = Workload(2, 8, torch.float32, block="IdentityBlock 1")
    names = ["eager", "fusedres-cpp"]
    for fault in (False, True):
        if fault:
            monkeypatch.setattr(kernels, "batch_norm_bwd", wrong)
        rows = [m.row for m in measure_network(work, names, setting())]
        ours = next(row for row in rows if row["name"] == "fusedres-cpp")
        assert ours["max_error"] < 1e-4
        assert bool(suspect(ours, rows)) is fault, ours["grad_error"]


@NEEDS_CPP
def test_a_slow_kernel_is_caught_by_compare(monkeypatch: pytest.MonkeyPatch) -> None:
    case = small_pass("bn_act_fwd, residual")
    calm = setting(rounds=5, seconds=5e-3)
    before = [m.row for m in measure_op(case, calm)]
    kernels = backends.kernels("cpp", "bn_act")
    right = kernels.bn_act_fwd

    def slow(*args: Any) -> Any:
        time.sleep(0.02)  # far beyond any mood of the machine
        return right(*args)

    monkeypatch.setattr(kernels, "bn_act_fwd", slow)
    after = [m.row for m in measure_op(case, calm)]
    found = {c.what: c for c in changes(before, after)}
    verdicts = {what.split(", ")[-1]: c.verdict for what, c in found.items()}
    assert verdicts["fusedres-cpp"] == "slower"
    assert found["light, bn_act_fwd, residual, 2x64x112x112, float32, fusedres-cpp"].by > 2


def test_one_that_fails_costs_the_others_nothing() -> None:
    case = small_pass("add_relu_fwd")

    calls = []

    def fails(_: Any) -> Any:
        raise ValueError("no such kernel\nwith details")

    def fails_later(t: Any) -> Any:
        calls.append(t)
        if len(calls) > 1:
            raise RuntimeError("out of registers")
        return case.candidates[-1].run(t)

    first = replace(case.candidates[0], name="fusedres-broken", run=fails)
    later = replace(case.candidates[0], name="fusedres-later", run=fails_later)
    case_with = replace(case, candidates=(first, later, *case.candidates))
    rows = {m.row["name"]: m.row for m in measure_op(case_with, setting())}
    assert rows["fusedres-broken"]["error"] == "ValueError: no such kernel"
    assert rows["fusedres-later"]["error"] == "RuntimeError: out of registers"
    assert "ms" not in rows["fusedres-broken"] and rows["eager"]["ms"] > 0


def test_a_job_that_fails_as_a_whole_names_everyone() -> None:
    def fails(_: Setting) -> list[Any]:
        raise OSError("no memory")

    job = Job({"section": "conv_bn"}, "", ("fusedres-triton, split", "eager"), fails)
    ours, eager = (m.row for m in run_job(job, setting()))
    assert (ours["name"], ours["plan"]) == ("fusedres-triton", "split")
    assert (eager["name"], eager["plan"], eager["error"]) == ("eager", None, "OSError: no memory")


@NEEDS_CPP
def test_what_torch_has_not_is_held_to_a_copy() -> None:
    rows = [m.row for m in measure_op(small_pass("bn_act_bwd"), setting())]
    assert [row["name"] for row in rows] == ["fusedres-cpp", "copy"]
    assert {row["against"] for row in rows} == {"copy"}


def test_a_copy_moves_as_many_bytes_and_inputs_exceed_the_cache() -> None:
    case = small_pass("add_relu_fwd")
    (pair,) = ops._pairs(case, 1, CPU)
    assert sum(t.numel() for t in pair.values()) == case.bytes
    made = []

    def inputs(seed: int) -> Any:
        made.append(seed)
        return case.inputs(seed)

    # two of the three tensors that count are inputs: 2/3 of the bytes a set
    measure_op(replace(case, inputs=inputs), setting(cache=int(case.bytes)))
    assert made == [0, 1, 2, 3, 4]


def test_bytes_of_light_passes() -> None:
    found = light_cases(CPU, torch.float32, (2,), quick=True)
    cases = {c.fields["case"]: c.bytes for c in found if c.fields["shape"][1] == 64}
    full = 2 * 64 * 112 * 112 * 4
    assert cases["bn_act_bwd + batch_norm_bwd"] == 7 * full
    assert cases["bn_relu_maxpool_fwd"] == full + full // 4
    assert cases["bn_relu_maxpool_bwd"] == 2 * full + full // 4


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_truth_of_a_layer_is_in_fp64(direction: str) -> None:
    case = conv_cases(CPU, torch.float32, (1,), (direction,), image=32)[1]
    assert {t.dtype for t in case.truth(case.inputs(0))} == {torch.float64}


@pytest.mark.parametrize(
    ("direction", "needs"),
    [("dgrad", (True, False)), ("wgrad", (False, True)), ("bwd", (True, True))],
)
def test_the_librarys_convolution_does_the_same_direction(
    direction: str, needs: tuple[bool, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(
        Site, "_convolution_backward", lambda s, dy, a, t, *needs: asked.append(needs)
    )
    case = conv_cases(CPU, torch.float32, (1,), (direction,), image=32)[1]
    next(c for c in case.candidates if c.name == "convolution").run(case.inputs(0))
    assert asked == [needs]


def test_bytes_of_a_joining_layers_backward() -> None:
    layer = next(la for la in roofline.layers() if la.name == "layer1.1.conv1")
    found = Site(layer, 2, torch.bfloat16, CPU).case("dgrad", 1).bytes
    read_and_written = 2 * 64 + 4 * 256  # g, y; x, a, the shortcut's gradient, what leaves
    assert found == 2 * 56 * 56 * read_and_written * 2 + 64 * 256 * 2


def test_only_wanted_providers_are_measured_beside_eager() -> None:
    rows = measure_op(small_pass("add_relu_fwd"), setting(wanted=("nobody",)))
    assert [m.row["name"] for m in rows] == ["eager", "copy"]


# --- networks -------------------------------------------------------------------------------------


def test_rows_of_a_network_are_whole() -> None:
    work = Workload(2, 64, torch.float32, num_classes=10)
    names = ["eager", "fusedres", "cudnn-fused"]
    measured = measure_network(work, names, setting(rounds=1))
    rows = {m.row["name"]: m.row for m in measured}
    assert list(rows) == names
    assert rows["cudnn-fused"]["error"].startswith("RuntimeError: cudnn-fused needs a GPU")
    for name in names[:2]:
        row = rows[name]
        assert (row["section"], row["case"], row["batch"]) == ("train", "resnet50", 2)
        assert row["shape"] == [2, 3, 64, 64] and row["img_s"] == pytest.approx(2e3 / row["ms"])
        assert 0 < row["max_error"] < 1e-2 and 0 < row["grad_error"] < 1
        # parameters, gradients and momentum alone are 0.26 GiB; the momentum is in no run's peak
        assert 0.15 < row["peak_gib"] < 1
        assert row["against"] == "eager" and row["of_roofline"] > 0
    moved = 2 * sum(k.bytes for k in roofline.kernels("ideal", 64, 4))
    assert rows["eager"]["bytes"] == pytest.approx(moved)
    share = rows["eager"]["of_roofline"]  # kernel by kernel, as the model of the whole has it
    ideal = roofline.images_per_second("ideal", *CEILINGS, 64, 4)
    assert share == pytest.approx(rows["eager"]["img_s"] / ideal)


def test_a_blocks_work_is_of_its_place() -> None:
    work = Workload(2, 56, torch.float32, block="IdentityBlock 1")
    (eager,) = (m.row for m in measure_network(work, ["eager"], setting(rounds=1)))
    pixels = 2 * 56 * 56
    assert eager["flops"] == 3 * 2 * pixels * (256 * 64 + 9 * 64 * 64 + 64 * 256)
    assert eager["case"] == "IdentityBlock 1" and eager["shape"] == [2, 256, 56, 56]
    forward = (256 + 64) + (64 + 64) + (64 + 256) + 3 * 256  # conv1, conv2, conv3, the join
    dgrad = (2 * 64 + 2 * 256) + (2 * 64 + 2 * 64) + (2 * 256 + 2 * 64)
    wgrad = (2 * 64 + 256) + (2 * 64 + 64) + (2 * 256 + 64)
    assert eager["bytes"] == 4 * pixels * (forward + dgrad + wgrad + 4 * 256)


def test_distances_are_norms_and_what_is_missing_is_infinitely_far() -> None:
    one = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert networks._distance([one * 1.1], [one]) == pytest.approx(0.1)
    assert networks._distance([one, one * 1.1], [one, one]) == pytest.approx(0.1 / 2**0.5)
    assert networks._distance([], [one]) == networks._distance([None], [one]) == math.inf
    assert networks._distance([one * math.nan], [one]) == math.inf


def test_parameters_are_put_back_before_a_provider_is_judged(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    work = Workload(2, 32, torch.float64, num_classes=10)
    truth = networks._truth(work)
    build = networks.build

    def stepped(*args: Any) -> Any:
        provider = build(*args)
        provider.run()  # as one in a CUDA graph has
        return provider

    monkeypatch.setattr(networks, "build", stepped)
    _, found = networks._judged("eager", work, None, truth, setting())
    assert found["max_error"] < 1e-12 and found["grad_error"] < 1e-9


def test_inference_has_no_gradients() -> None:
    work = Workload(1, 32, torch.bfloat16, num_classes=10, training=False)
    (eager,) = (m.row for m in measure_network(work, ["eager"], setting(rounds=1)))
    assert eager["section"] == "infer" and "grad_error" not in eager
    assert 1e-4 < eager["max_error"] < 0.2


# --- suites and profile ---------------------------------------------------------------------------


@pytest.mark.parametrize("suite", SUITES)
def test_jobs_say_what_they_measure(suite: str) -> None:
    here = setting_for(CPU, quick=True)
    jobs = jobs_of(suite, here, torch.float32, quick=True)
    whole = jobs_of(suite, here, torch.float32)
    assert 0 < len(jobs) <= len(whole)
    titles = [(job.about["section"], job.title) for job in jobs]
    assert len(titles) == len(set(titles))
    assert all("eager" in job.names or suite == "ops" for job in jobs)
    one = jobs[0].title
    assert [job.title for job in jobs_of(suite, here, torch.float32, quick=True, only=one)] == [one]


def test_the_models_batches() -> None:
    def batches(job: Job) -> str:
        return f"{job.about['section']} {job.about['batch']}"

    here = setting_for(CPU)
    assert [batches(j) for j in jobs_of("model", here, torch.float32)] == [
        "train 1",
        "train 16",
        "infer 1",
        "infer 16",
    ]
    on_gpu = replace(here, device=torch.device("cuda"))
    found = [batches(j) for j in jobs_of("model", on_gpu, torch.bfloat16)]
    assert (
        found
        == [
            *(f"train {n}" for n in (256, 400, 32)),
            *(f"infer {n}" for n in (256, 1, 32, 400)),
        ]
        * 2
    )  # again, with what takes minutes to compile
    slow = jobs_of("model", on_gpu, torch.bfloat16)[7]
    assert slow.names == ("eager", "compile-max", "compile-max-nograph")
    assert [batches(j) for j in jobs_of("model", here, torch.float32, (3,))] == [
        "train 3",
        "infer 3",
    ]


def test_tune_measures_layers_at_all_batches() -> None:
    jobs = jobs_of("ops", setting_for(CPU), torch.float32, (32, 256))
    layers = [job.about["batch"] for job in jobs if job.about["section"] == "conv_bn"]
    assert layers.count(32) == layers.count(256) > 80


@pytest.mark.gpu
@pytest.mark.parametrize("training", [True, False])
def test_graphs_of_ours_and_of_torch_compile_take_turns(training: bool) -> None:
    device = torch.device("cuda")
    work = Workload(4, 64, torch.bfloat16, "cuda", 10, training=training)
    names = ["eager", "graph", "compile-graph", "compile-max", "fusedres-auto-graph"]
    rows = [m.row for m in measure_network(work, names, setting(device=device))]
    assert [row.get("error") for row in rows] == [None] * len(names)
    for row in rows:
        assert not suspect(row, rows), row["name"]


def test_the_setting_keeps_who_is_wanted() -> None:
    assert setting_for(CPU, wanted=("x",)).wanted == ("x",)
    assert setting_for(CPU, wanted=("x",)).chosen(["eager", "x", "y"]) == ["eager", "x"]


def test_an_unknown_suite() -> None:
    with pytest.raises(ValueError, match="'speed', accepted: ops, blocks, model"):
        jobs_of("speed", setting_for(CPU), torch.float32)


def test_kernels_are_named_the_longest_first() -> None:
    def event(name: str, own: float, *children: Any) -> Any:
        return types.SimpleNamespace(name=name, self_cpu_time_total=own, cpu_children=children)

    inner = event("b", 5.0, event("a", 1.0), event("c", 9.0))
    assert profile._kernels(event("label", 99.0, inner, event("a", 6.0)), False) == ("c", "a", "b")


def test_a_weight_counts_in_the_type_it_is_read_in() -> None:
    weight = torch.ones(2, 2, 1, 1)
    assert profile._moved({"weight": weight, "packed": weight.bfloat16()}, ()) == 8
    assert profile._moved({"weight": weight, "packed": None}, (weight, torch.ones(3))) == 16


@NEEDS_CPP
def test_a_profile_names_every_layer_both_ways() -> None:
    work = Workload(2, 64, torch.float32, num_classes=10)
    rows = profile_step(work, setting(), "fusedres-cpp")
    layers = [layer.name for layer in roofline.layers()]
    parts = {(row["case"], row["name"]): row for row in rows}
    assert len(parts) == len(rows)
    for name in layers:
        assert (name, "fwd") in parts and (name, "bwd") in parts, name
        assert parts[name, "fwd"]["backend"] == "cpp"
        strided = name.endswith("downsample.0") and not name.startswith("layer1")
        pointwise = name.rpartition(".")[2] in ("conv1", "conv3", "0") and name != "conv1"
        plan = "fused+compact" if strided else "fused" if pointwise else "split"
        assert parts[name, "fwd"]["plan"] == plan, name
    assert rows[-1]["case"] == "other" and all(row["ms"] >= 0 for row in rows)
    assert sum(row["share"] for row in rows) == pytest.approx(1)
    assert 0 < rows[-1]["share"] < 0.9
    inner = parts["layer1.1.conv3", "fwd"]  # 16x16 maps; y, what it reads and the weight
    assert inner["bytes"] == 2 * 256 * (64 + 256) * 4 + 64 * 256 * 4
    assert inner["flops"] == 2 * 2 * 256 * 64 * 256
    assert parts["layer1.1.conv3", "bwd"]["flops"] == 2 * inner["flops"]
    assert parts["conv1", "bwd"]["flops"] == parts["conv1", "fwd"]["flops"]  # no dgrad
    assert any("convolution" in kernel for row in rows for kernel in row["kernels"])
    least = roofline.seconds(inner["flops"], inner["bytes"], *CEILINGS)
    assert inner["of_roofline"] == pytest.approx(least / inner["ms"] * 1e3)
    assert math.isfinite(inner["of_roofline"])
