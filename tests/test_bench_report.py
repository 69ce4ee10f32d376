"""Reports of results: every figure in its cell, nothing said that was not measured, nothing wrong
left unmarked; a page that parses and needs nothing beside itself.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from fusedres.bench import judging, report, roofline
from fusedres.bench.report import figures
from fusedres.bench.rows import Row
from fusedres.training.figures import new_figure

pytest.importorskip("matplotlib")

GPU = "NVIDIA H200"
EVIL = '<b>"x"|&'
VOID = {"meta", "br", "hr", "img", "link", "input"}


def row(section: str, name: str, **fields: Any) -> Row:
    """A row of a GPU, unless told otherwise."""
    where = {"device": GPU, "threads": 16, "driver": "570.86", "cuda": "12.8", "cudnn": 91002}
    where |= {"torch": "2.13.0", "triton": "3.6.0", "fusedres": "0.5.0", "commit": "ab" * 20}
    if fields.get("device") == "cpu":
        where |= {"threads": 2, "driver": None, "cuda": None, "cudnn": None}
    known = {"case": "", "shape": [], "backend": None, "plan": None, "batch": None}
    known |= {"dtype": "bfloat16", "time": "2025-11-20T10:00:00"}
    return known | where | {"section": section, "name": name} | fields


def against(ratio: float) -> Row:
    """The fields of a ratio over eager's time."""
    return {"against": "eager", "ratio": ratio, "ratio_p20": ratio * 0.8, "ratio_p80": ratio * 1.25}


def network(name: str, ratio: float, section: str = "train", **fields: Any) -> Row:
    """A row of the whole network; eager takes 80 ms."""
    batch = fields.get("batch", 256)
    known = {"case": "resnet50", "shape": [batch, 3, 224, 224], "batch": batch}
    known |= {"ms": 80 * ratio, "img_s": batch / 0.08 / ratio, "max_error": 2e-3, "peak_gib": 12.0}
    return row(section, name, **(known | against(ratio) | fields))


def layer(name: str, ms: float, case: str = "fwd", **fields: Any) -> Row:
    """A row of one convolution; eager takes 0.5 ms, and is 7.5 GFLOP per 50 MB."""
    known = {"case": case, "shape": [8, 56, 64, 256, 1, 1], "batch": 8, "count": 4, "ms": ms}
    known |= {"bytes": 5e7, "flops": 7.5e9, "gb_s": 50 / ms, "tflops": 7.5 / ms, "of_roofline": 0.4}
    return row("conv_bn", name, **(known | {"max_error": 1e-3} | against(ms / 0.5) | fields))


def on_gpu() -> list[Row]:
    return [
        row("ceilings", "copy", ms=1.0, gb_s=4000.0),
        row("ceilings", "matmul", ms=1.0, tflops=700.0),
        network("eager", 1.0, grad_error=0.31, wall_ms=80.5),
        network("compile", 0.8, grad_error=0.30),
        network("compile-max", 0.75, grad_error=0.30, note="max-autotune"),
        network("fusedres-cuda", 0.625, backend="cuda", grad_error=0.32, peak_gib=7.25),
        row("train", "graph", case="resnet50", shape=[256, 3, 224, 224], batch=256,
            error="OutOfMemoryError: tried to allocate 1.5 GiB"),
        network("eager", 1.0, "infer", batch=1), network("fusedres-cuda", 1.25, "infer", batch=1),
        layer("fusedres-cuda", 0.25, plan="fused", of_roofline=0.61),
        layer("fusedres-cuda", 0.4, plan="split"),
        layer("eager", 0.5, note="the usual"), layer("eager", 1.0, "wgrad"),
        layer("fusedres-triton", 0.3, "wgrad", error="no kernel for that"),
        row("light", "eager", case="add_relu", shape=[8, 64, 56, 56], ms=0.02, gb_s=2000.0,
            max_error=1e-3, how="graph", **against(1.0)),
        row("light", "fusedres-cuda", case="add_relu", shape=[8, 64, 56, 56], ms=0.0125,
            gb_s=3200.0, of_roofline=0.8, max_error=1e-3, how="graph", **against(0.625)),
        row("blocks", "eager", case="IdentityBlock 1", shape=[64, 256, 56, 56], batch=64, ms=4.0,
            max_error=1e-3, **against(1.0)),
        row("profile", "fwd", case="layer1.0.conv1", shape=[8, 3, 224, 224], batch=8, ms=0.75,
            share=0.3, backend="cuda", plan="fused", bytes=5e7, kernels=["conv_fwd", "finish"]),
        row("profile", "step", case="other", shape=[8, 3, 224, 224], batch=8, ms=1.75, share=0.7),
    ]  # fmt: skip


def on_cpu() -> list[Row]:
    """The same, with the times of a CPU, which nobody is to see."""
    odd = {"ms": 7771.0, "wall_ms": 7772.0, "img_s": 7773.0, "gb_s": 7774.0, "tflops": 7775.0}
    return [
        r | {"device": "cpu", "dtype": "float32", "driver": None, "threads": 2}
        | {f: v for f, v in odd.items() if f in r and r["section"] != "conv_bn"}
        for r in on_gpu()
    ]  # fmt: skip


def cells(text: str, *of_line: str) -> dict[str, str]:
    """By the name of its column, the one line of a Markdown table that holds these cells."""
    head: list[str] = []
    found = []
    for line in text.splitlines():
        if not line.startswith("| "):
            head = []
            continue
        parts = [part.strip() for part in line[1:-1].split(" | ")]
        head = head or parts
        if all(any(part.strip("*") == cell for part in parts) for cell in of_line):
            found.append(dict(zip(head, parts, strict=True)))
    assert len(found) == 1, (of_line, found)
    return found[0]


def part(text: str, heading: str) -> str:
    """A Markdown text from a heading to the next of its level or above."""
    level = heading.split(" ")[0]
    start = text.index(heading + "\n")
    stop = re.search(rf"^#{{1,{len(level)}}} ", text[start + len(heading) :], re.MULTILINE)
    return text[start : start + len(heading) + stop.start()] if stop else text[start:]


# --- what the tables say ---


def test_every_figure_of_a_network_stands_in_its_cell() -> None:
    text = part(report.tables(on_gpu()), "#### Training, batch 256, bfloat16, 224x224")
    dash = "\N{EN DASH}"
    assert cells(text, "fusedres-cuda") == {
        "provider": "fusedres-cuda",
        "speed, eager = 1": "1.60x",
        f"p20{dash}p80": f"1.28{dash}2.00",
        "ms": "50.0",
        "host ms": "",
        "img/s": "5,120",
        "error": "2.0e-03",
        "gradient error": "3.2e-01",
        "peak GiB": "7.25",
        "note": "",
    }
    assert cells(text, "eager")["host ms"] == "80.5"
    assert cells(text, "compile-max")["note"] == "max-autotune"
    order = [line.split(" | ")[0][2:] for line in text.splitlines() if line.startswith("| ")]
    assert order[2:] == ["fusedres-cuda", "compile-max", "compile", "eager", "graph"]


def test_a_provider_that_failed_says_why() -> None:
    text = part(report.tables(on_gpu()), "#### Training, batch 256, bfloat16, 224x224")
    line = cells(text, "graph")
    assert line["speed, eager = 1"] == "failed" and line["ms"] == ""
    assert line["note"] == "failed: OutOfMemoryError: tried to allocate 1.5 GiB"


def test_layers_light_passes_blocks_and_profile() -> None:
    text = report.tables(on_gpu())
    line = cells(part(text, "##### Forward"), "56x56, 64 -> 256, 1x1/1")
    ours = "fusedres-cuda, fused: "
    assert {name: line[ours + name] for name in ("ms", "speed", "GB/s", "% of roof", "error")} == {
        "ms": "0.250", "speed": "**2.00x**", "GB/s": "200", "% of roof": "61%", "error": "1.0e-03"
    }  # fmt: skip
    assert line["count"] == "4" and line["fusedres-cuda, split: speed"] == "1.25x"
    line = cells(part(text, "##### Gradient of the weight (wgrad)"), "56x56, 64 -> 256, 1x1/1")
    assert line["fusedres-triton: speed"] == "failed"
    assert line["note"] == "fusedres-triton: failed: no kernel for that"

    line = cells(part(text, "##### add_relu"), "8x64x56x56", "fusedres-cuda")
    assert (line["speed, eager = 1"], line["% of roofline"], line["GB/s"]) == (
        "1.60x",
        "80%",
        "3,200",
    )
    assert line["ms"] == "0.0125" and line["timed as"] == "graph"
    assert cells(part(text, "##### add_relu"), "eager")["% of roofline"] == "50% of copy"
    blocks = part(text, "#### Blocks, batch 64, bfloat16")
    assert cells(blocks, "IdentityBlock 1", "eager")["ms"] == "4.00"

    line = cells(part(text, "### Where the time goes"), "layer1.0.conv1")
    assert (line["kind"], line["backend"], line["plan"]) == ("fwd", "cuda", "fused")
    assert (line["% of the step"], line["ms"], line["MB"]) == ("30.0", "0.750", "50.0")
    assert line["kernels"] == "conv_fwd, finish"


def test_layers_are_summed_by_how_often_they_stand_in_the_network() -> None:
    other: Row = {"shape": [8, 28, 512, 128, 1, 1], "count": 3}
    rows = [
        layer("eager", 0.5), layer("fusedres-cuda", 0.25),
        layer("eager", 1.0, **other), layer("fusedres-cuda", 1.5, **other),
        layer("convolution", 0.4),
    ]  # fmt: skip
    line = cells(report.tables(rows), "all layers, by count")
    assert (
        line["count"] == "7" and line["eager: ms"] == "5.00" and line["fusedres-cuda: ms"] == "5.50"
    )
    assert line["fusedres-cuda: speed"] == "0.91x" and line["convolution: ms"] == ""


def test_where_it_was_measured() -> None:
    rows = [*on_gpu(), network("eager", 1.0, batch=8, time="2025-11-22T00:00:00")]
    text = part(report.tables(rows), f"## {GPU}")
    told = {"device": GPU, "threads": "16", "driver": "570.86", "CUDA": "12.8", "cuDNN": "91002"}
    told |= {"torch": "2.13.0", "Triton": "3.6.0", "fusedres": "0.5.0", "commit": "ab" * 6}
    told |= {"measured": "2025-11-20 to 2025-11-22", "ceiling: copy": "4,000 GB/s"}
    for name, value in told.items():
        assert f"| {name} | {value} |" in text


def test_in_short() -> None:
    text = part(report.tables(on_gpu()), "### In short")
    where = "Training, batch 256, bfloat16, 224x224: fusedres-cuda"
    assert f"{where} is 1.60x as fast as eager, and 1.20x as fast as compile-max, the fast" in text
    assert "Inference, batch 1, bfloat16, 224x224: fusedres-cuda is 0.80x as fast as eager." in text
    assert "2 of 19 rows failed: graph; fusedres-triton." in text


def test_devices_do_not_mix() -> None:
    text = report.tables([*on_cpu(), *on_gpu()])
    assert [line for line in text.splitlines() if line.startswith("## ")] == [
        f"## {GPU}", "## CPU", "## Where the bytes are"
    ]  # fmt: skip
    assert "float32" not in part(text, f"## {GPU}") and "bfloat16" not in part(text, "## CPU")


@pytest.mark.parametrize("made", [report.tables, report.page])
def test_of_a_cpu_only_ratios(made: Any) -> None:
    text = re.sub(r' (d|points|transform|x|y|width|height)="[^"]*"', "", made(on_cpu()))
    assert not re.search(r"777[1-5]|7,77[1-5]", text) and "1.60" in text
    assert not re.search(r"(>|\| |: )(ms|host ms|img/s|GB/s|TFLOP/s)( \||<)", text)


def test_bytes_per_image_and_what_they_allow() -> None:
    text = part(report.tables(on_gpu()), "## Where the bytes are")
    for name, flow in roofline.DATAFLOWS.items():
        line = cells(text, flow.title, "training" if flow.training else "inference")
        assert line["MB per image"] == f"{roofline.megabytes(name):.1f}"
        most = roofline.images_per_second(name, 4e12, 7e14)
        assert line[f"img/s at most, {GPU}"] == f"{most:,.0f}"
    assert "img/s" not in part(report.tables(on_cpu()), "## Where the bytes are")


def test_the_newest_of_the_same_counts() -> None:
    old, new = (
        network("eager", r, time=f"2025-{m}-01T00:00:00") for r, m in ((9, "01"), (1, "02"))
    )
    for rows in ([old, new], [new, old]):
        assert (
            "9.00" not in report.tables(rows)
            and cells(report.tables(rows), "eager")["ms"] == "80.0"
        )
    steps = [
        row("profile", "fwd", case=c, backend="cuda", share=s, time=f"2025-{m}-01T00:00:00")
        for c, s, m in (("gone", 0.5, "01"), ("kept", 0.25, "02"))
    ]
    text = report.tables(steps)
    assert "gone" not in text and cells(text, "kept")["% of the step"] == "25.0"


def test_nothing_to_report() -> None:
    for made in (report.tables, report.page):
        with pytest.raises(ValueError, match="nothing to report"):
            made([])


# --- wrong results ---


@pytest.mark.parametrize(
    ("dtype", "field", "value", "reason"),
    [
        ("bfloat16", "max_error", 0.0139, ""),  # 2 * 2e-3 + 1e-2
        ("bfloat16", "max_error", 0.0141, "error 1.4e-02 (allowed: 1.4e-02)"),
        ("float32", "max_error", 0.0139, "error 1.4e-02 (allowed: 4.0e-03)"),
        ("bfloat16", "max_error", math.inf, "error inf"),
        ("bfloat16", "max_error", math.nan, "error nan"),
        ("bfloat16", "grad_error", 0.75, "gradient error 7.5e-01 (allowed: 7.0e-01)"),
        ("bfloat16", "grad_error", 0.6, ""),
    ],
)
def test_suspects(dtype: str, field: str, value: float, reason: str) -> None:
    base = network("eager", 1.0, grad_error=0.3, dtype=dtype)
    ours = network("fusedres-cuda", 0.5, dtype=dtype, **{field: value})
    elsewhere = base | {"device": "another", "max_error": 99.0, "grad_error": 99.0}
    assert judging.suspect(ours, [elsewhere, ours, base]) == reason


def test_a_suspect_without_another_to_be_held_against() -> None:
    ours = network("fusedres-cuda", 0.5, max_error=0.09)
    assert judging.suspect(ours, [ours]) == ""
    assert judging.suspect(ours | {"max_error": 0.11}, []) == "error 1.1e-01 (allowed: 1.0e-01)"
    assert judging.suspect(ours | {"max_error": None}, []) == ""
    assert judging.suspect({"section": "train", "name": "a", "dtype": "int8"}, []) == ""


def test_others_groups_are_no_measure() -> None:
    ours = network("fusedres-cuda", 0.5, max_error=0.09)
    other = network("eager", 1.0, "infer", batch=1, max_error=1e-9)
    assert judging.suspect(ours, [other, ours]) == ""


def test_suspects_are_marked_and_never_the_fastest() -> None:
    bad = network("fusedres-triton", 0.25, max_error=3.1, grad_error=0.33)
    rows = [*on_gpu(), bad, layer("fusedres-triton", 0.1, max_error=math.inf)]
    text = report.tables(rows)
    wrong = "wrong: error 3.1e+00 (allowed: 1.4e-02)"
    line = cells(part(text, "#### Training, batch 256, bfloat16, 224x224"), "fusedres-triton")
    assert (line["provider"], line["error"], line["note"]) == (
        "**fusedres-triton**", "**3.1e+00**", f"**{wrong}**"
    )  # fmt: skip
    assert line["gradient error"] == "3.3e-01"  # is not to blame
    head = text[: text.index("## ")]
    assert head.count("**wrong: ") == 2 and "error 3.1e+00" in head and "error inf" in head
    line = cells(part(text, "##### Forward"), "56x56, 64 -> 256, 1x1/1")
    assert line["fusedres-triton: error"] == "**wrong: error inf**"
    assert line["fusedres-cuda, fused: speed"] == "**2.00x**"
    assert "fusedres-cuda is 1.60x as fast as eager" in part(text, "### In short")
    assert "4.00x" not in report.readme_tables(rows)

    page = report.page(rows)
    assert f'<strong class="wrong">{wrong}</strong>' in page and "4.00x, wrong" in page
    assert 'class="wrong"' not in report.page(on_gpu())


# --- the README's tables ---


def test_readme_tables() -> None:
    text = report.readme_tables([*on_gpu(), *on_cpu()])
    gpu, cpu = part(text, f"### GPU: {GPU}"), part(text, "### CPU")
    assert cells(gpu, "training, batch 256, bfloat16") == {
        "": "training, batch 256, bfloat16",
        "eager": "1.00x, 3,200 img/s",
        "graph": "failed",
        "best torch.compile": "1.33x, 4,267 img/s (compile-max)",
        "fusedres": "1.60x, 5,120 img/s (fusedres-cuda)",
    }
    assert cells(gpu, "inference, batch 1, bfloat16")["graph"] == "not measured"
    for what in ("training, batch 400", "inference, batch 32", "inference, batch 256"):
        assert [*cells(gpu, f"{what}, bfloat16").values()][1:] == ["not measured"] * 4
    assert f"{GPU}; torch 2.13.0; bfloat16; speed relative to eager" in gpu

    line = cells(cpu, "training, batch 256, float32, 224x224")
    assert line["fusedres-cuda"] == "1.60x" and line["graph"] == "failed"
    line = cells(cpu, "inference, batch 1, float32, 224x224")
    assert line["fusedres-cuda"] == "0.80x" and line["compile"] == "not measured"
    assert "CPU with 2 threads; torch 2.13.0; float32" in cpu
    for found in (cpu, gpu):
        assert "measured side by side in one run." in found


def test_a_row_of_another_dtype_fills_no_cell() -> None:
    rows = [network("eager", 1.0), network("fusedres-cuda", 0.1, dtype="float32")]
    line = cells(report.readme_tables(rows), "training, batch 256, bfloat16")
    assert line["fusedres"] == "not measured" and line["eager"].startswith("1.00x")


def test_what_figures_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    panels: list[Any] = []
    groups: list[Any] = []

    def roofline_figure(found: Any, *_: Any) -> Any:
        panels.append(found)
        return new_figure(1, 1)

    def bars(found: Any, *_: Any) -> Any:
        groups.extend(found)
        return new_figure(1, 1)

    monkeypatch.setattr(figures, "roofline", roofline_figure)
    monkeypatch.setattr(figures, "bars", bars)
    report.page(on_gpu())
    points = [point for found in panels for of in found.values() for point in of]
    assert points and all(point.intensity == pytest.approx(150) for point in points)
    memory = [bar for _, of in groups for bar in of if "GiB" in bar.text]
    assert {round(bar.value, 4) for bar in memory} == {1.0, round(7.25 / 12, 4)}


def test_readme_tables_before_anything_was_measured_on_a_gpu() -> None:
    text = part(report.readme_tables(on_cpu()), "### GPU")
    assert text.count("not measured") == 5 * 4 and "No GPU figure has been measured yet." in text
    assert "Nothing was measured on CPU." in report.readme_tables([])


def test_what_was_measured_alone_is_neither_failed_nor_unmeasured() -> None:
    alone = network("fusedres-cuda", 0.5) | {"ratio": None, "ratio_p20": None, "ratio_p80": None}
    base = {f: alone[f] for f in ("section", "case", "shape", "batch", "dtype", "device")}
    rows: list[Row] = [alone, base | {"name": "eager", "error": "OutOfMemoryError"}]
    text = report.tables(rows)
    assert cells(text, "fusedres-cuda")["ms"] == "40.0"
    assert "fusedres was measured alone." in part(text, "### In short")
    line = cells(report.readme_tables(rows), "training, batch 256, bfloat16")
    assert line["fusedres"] == "measured alone" and line["eager"] == "failed"
    assert "measured alone" in report.page(rows)


# --- rows of an older script ---


def older(section: str, name: str, **fields: Any) -> Row:
    where = {"device": GPU, "torch": "2.9.1", "cuda": "12.8", "cudnn": 91002, "dtype": "float16"}
    return {"section": section, "name": name, "time": "2025-09-01T09:00:00"} | where | fields


def test_rows_of_an_older_script() -> None:
    times = {"p20": 1.0, "p80": 1.2, "runs": 9}
    rows = [
        older("ceilings", "copy", gb_s=4000.0, ms=1.0, **times),
        older("ceilings", "matmul", tflops=690.0, ms=1.0, **times),
        older("convs", "fprop", shape=[256, 56, 64, 256, 1, 1], count=4, tflops=120.0, gb_s=3000.0,
              ms=0.25, **times),
        older("train", "eager", batch=256, ms=80.0, img_s=3200.0, peak_gib=22.0, **times),
        older("train", "compile", batch=256, ms=64.0, img_s=4000.0, total_s=99.0, **times),
        older("train", "compile-max", batch=256, error="BackendCompilerFailed: x"),
        older("infer", "cudnn-fused", batch=256, ms=10.0, img_s=25600.0, **times),
    ]  # fmt: skip
    text = report.tables(rows)
    line = cells(part(text, "#### Training, batch 256, float16"), "compile")
    assert (line["speed, eager = 1"], line["img/s"]) == ("~1.25x", "4,000")
    assert cells(text, "compile-max")["note"] == "failed: BackendCompilerFailed: x"
    line = cells(part(text, "### Other measurements: convs"), "fprop")
    assert (line["shape"], line["TFLOP/s"], line["GB/s"], line["ms"]) == (
        "56x56, 64 -> 256, 1x1/1", "120", "3,000", "0.250"
    )  # fmt: skip
    assert "cudnn-fused" in text and "<svg" in report.page(rows)
    wanted = [("train", 256, "float16", "")]
    table = report.model_table(rows, GPU, wanted)
    assert cells(table, "training, batch 256, float16")["compile"] == "~1.25x, 4,000 img/s"
    assert "but those marked ~ one after the other." in table


# --- the page ---


class Reader(HTMLParser):
    """Checks that tags are balanced and collects what they carry."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    reader.close()
    assert not reader.open
    return reader


def test_the_page_needs_nothing_beside_itself() -> None:
    bad = layer("fusedres-triton", 0.1, max_error=math.inf)
    page = report.page([*on_gpu(), bad, *on_cpu()])
    reader = read(page)
    ids = Counter(value for name, value in reader.attributes if name == "id")
    assert max(ids.values()) == 1
    targets = [value for name, value in reader.attributes if name in ("href", "xlink:href", "src")]
    assert targets and all(target[0] == "#" and target[1:] in ids for target in targets)
    assert all(name in ids for name in re.findall(r"url\(#([^)]*)\)", page))
    assert not re.search(r"@import|url\((?!#)", page)
    assert not {"script", "link", "img", "iframe"} & set(reader.tags)
    assert reader.tags.count("style") == 1 and reader.tags.count("svg") >= 10
    assert all(text in reader.text for text in ("1.60x", "5,120", "7.25", "FLOP per byte"))


def test_text_is_taken_literally() -> None:
    rows = [network("eager", 1.0), network(EVIL, 0.5, note=EVIL, torch=EVIL)]
    rows.append(row(EVIL, "a", device=EVIL, case=EVIL, error=EVIL))
    reader = read(report.page(rows, title=EVIL))
    assert "b" not in reader.tags and reader.text.count(EVIL) > 5
    line = cells(report.tables(rows), '&lt;b>"x"\\|&amp;', "2.00x")
    assert line["ms"] == "40.0"


def test_page_and_tables_are_written(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    page, tables = report.write(on_cpu(), folder)
    assert sorted(folder.iterdir()) == [page, tables]
    assert (page.name, tables.name) == ("report.html", "report.md")
    assert page.read_text() == report.page(on_cpu()) and tables.read_text() == report.tables(
        on_cpu()
    )
