"""The report: its page is parsed as a browser would, its charts as XML."""
from __future__ import annotations

import copy
import io
import json
import math
import re
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
from report_example import NAME, example_report, failed_report, many_artifacts
from rich.console import Console

import lrc_edge
from lrc_edge.charts import Bar, Point, Scale, bar_chart, point_chart
from lrc_edge.figures import figure, human_bytes, human_count, percent, prose, visible
from lrc_edge.report import gate_table, render_report, verdict, write_report
from lrc_edge.report_view import split_at_difference

SVG = {"s": "http://www.w3.org/2000/svg"}
HOSTILE = "<script>alert(1)</script><img src=x onerror=y>\" ' & \x1b[31m\u202e{{ 7*7 }}"
VOID = {"meta", "br", "link", "img", "hr", "input"}


class Page(HTMLParser):
    """Tags in order, text by section id, table rows by table id; complains about tags that do not nest."""

    def __init__(self, html: str):
        super().__init__(convert_charrefs=True)
        self.html, self.tags, self.open = html, list[tuple[str, dict[str, str | None]]](), list[tuple[str, str]]()
        self.text: dict[str, str] = {"": ""}
        self.rows: dict[str, list[list[str]]] = {}
        self.feed(html)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append((tag, dict(attrs).get("id") or ""))
        if tag == "tr":
            self.rows.setdefault(self._inside("table"), []).append([])
        if tag in ("td", "th"):
            self.rows[self._inside("table")][-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop()[0] == tag, tag

    def handle_data(self, data: str) -> None:
        if any(tag in ("style", "title") for tag, _ in self.open):
            return
        section = self._inside("section")
        self.text[section] = self.text.get(section, "") + data
        if any(tag in ("td", "th") for tag, _ in self.open):
            self.rows[self._inside("table")][-1][-1] += data

    def _inside(self, tag: str) -> str:
        return next((id_ for name, id_ in reversed(self.open) if name == tag), "")

    def svgs(self) -> list[ET.Element]:
        return [ET.fromstring(text) for text in re.findall(r"<svg.*?</svg>", self.html, re.DOTALL)]

    def words(self, section: str) -> str:
        return " ".join(self.text[section].split())


def titles(svg: ET.Element) -> list[str]:
    return [element.text or "" for element in svg.iterfind(".//s:title", SVG)]


def chart(report: dict[str, Any], name: str) -> ET.Element:
    return next(svg for svg in Page(render_report(report)).svgs() if svg.attrib["aria-label"] == name)


REPORTS = {"passed": example_report, "failed": failed_report, "many": many_artifacts}


@pytest.fixture(params=REPORTS)
def report(request: pytest.FixtureRequest) -> dict[str, Any]:
    return REPORTS[request.param]()


# -- verdict and gates -------------------------------------------------------------------------------------------------


def test_verdict() -> None:
    assert verdict(example_report()) == "All 18 gates passed"
    assert verdict(failed_report()) == (
        "3 of 18 gates FAILED: gguf:q4_0 prefill vs student: KL mean 0.31 > 0.15; gguf:q4_0 decode vs student: KL mean "
        "0.33 > 0.15; gguf:q4_0 token ids: mismatches 2 ≠ 0")
    assert verdict(many_artifacts()).endswith("; and 3 more")
    assert verdict({**example_report(), "gates": []}) == "No gate was judged: nothing is proved"


@pytest.mark.parametrize("passed", [None, False, 0, "yes"])
def test_only_an_explicit_pass_is_one(passed: Any) -> None:
    report = example_report()
    report["gates"][3]["passed"] = passed
    assert verdict(report).startswith("1 of 18 gates FAILED")
    assert Page(render_report(report)).rows["all-gates"][1][0] == "FAIL"


def test_failed_gates_come_first_and_twice() -> None:
    page = Page(render_report(failed_report()))
    marks = [row[0] for row in page.rows["all-gates"][1:]]
    assert marks == ["FAIL"] * 3 + ["pass"] * 15
    assert page.rows["failed-gates"][1:] == page.rows["all-gates"][1:4]
    assert page.rows["all-gates"][1][1:] == ["gguf:q4_0", "prefill vs student", "KL mean", "0.31", "≤ 0.15"]
    assert "3 of 18 gates FAILED" in page.text[""]
    assert page.html.index('id="failed"') < page.html.index('id="artifacts"')
    assert ("p", {"class": "verdict failed", "role": "status"}) in page.tags


def test_passed_page_has_no_failure() -> None:
    page = Page(render_report(example_report()))
    assert "failed" not in page.text and ("p", {"class": "verdict passed", "role": "status"}) in page.tags
    assert "All 18 gates passed" in page.text[""] and "FAIL" not in "".join(page.text.values())


def test_gate_without_a_value() -> None:
    report = example_report()
    report["gates"][5] |= {"value": None, "passed": False}
    assert "KL mean not a number" in verdict(report)
    assert Page(render_report(report)).rows["all-gates"][1][4] == "not a number"


def test_gate_table_on_a_terminal() -> None:
    file = io.StringIO()
    report = failed_report()
    report["gates"][0]["name"] = "[bold]x[/] folded"
    Console(file=file, width=80).print(gate_table(report))
    lines = file.getvalue().splitlines()
    assert len(lines) == 1 + 18 and all(len(line) <= 80 for line in lines)
    assert [line[:4] for line in lines[1:5]] == ["FAIL", "FAIL", "FAIL", "pass"]
    assert "[bold]x[/] folded" in file.getvalue()


# -- the page ----------------------------------------------------------------------------------------------------------


def test_page_is_well_formed_and_alone(report: dict[str, Any]) -> None:
    """Tags nest, charts are XML, and nothing is loaded from anywhere: no script, no link, no image, no url()."""
    page = Page(render_report(report))
    assert page.html.startswith("<!doctype html>")
    assert not {"script", "link", "img", "iframe", "object", "base"} & {tag for tag, _ in page.tags}
    assert not [value for _, attrs in page.tags for key, value in attrs.items() if key in ("src", "href", "srcset")]
    assert not [key for _, attrs in page.tags for key in attrs if key.startswith("on")]
    assert "url(" not in page.html and "@import" not in page.html
    assert page.svgs() and len(page.svgs()) == page.html.count("<svg")


def test_page_serves_both_colour_schemes_phone_and_paper() -> None:
    html = render_report(example_report())
    assert "prefers-color-scheme: dark" in html and "@media print" in html and "width=device-width" in html
    assert re.search(r"@media \(max-width: \d+px\)", html)


def hostile(value: Any, key: str = "") -> Any:
    """Every text of a report made hostile, but for those that choose how it is judged."""
    if isinstance(value, dict):
        return {k: hostile(v, k) for k, v in value.items()}
    if isinstance(value, list):
        return [hostile(item, key) for item in value]
    return value if not isinstance(value, str) or key in ("metric", "relation", "format") else value + HOSTILE


def test_hostile_names_stay_text(report: dict[str, Any]) -> None:
    page = Page(render_report(hostile(report)))
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "img"})
    assert not [key for _, attrs in page.tags for key in attrs if key.startswith("on")]
    assert "<script>alert(1)</script>" in "".join(page.text.values())
    assert "{{ 7*7 }}" in page.text[""]
    assert not {"\x1b", "\u202e"} & set(page.html)
    assert all(svg.tag.endswith("svg") for svg in page.svgs())


def test_what_was_made() -> None:
    page = Page(render_report(example_report()))
    rows = {row[0]: row[1:] for row in page.rows[""] if row}
    assert rows["residual width"] == ["512", "256", "÷ 2"]
    assert rows["layers"] == ["8", "8", ""]
    assert rows["parameters"] == ["27,300,000", "13,900,000", "÷ 1.96"]
    assert rows["held-out perplexity"] == ["6.699", "8.423", ""]
    for text in (NAME, "Fable-10M", "licence: apache-2.0", "9,830,400", "selection", "3 min"):
        assert text in page.words("made"), text
    assert "lrc-edge build examples/demo/teacher" in page.text[""] and "torch 2.13.0" in page.text[""]


def test_artifacts() -> None:
    report = example_report()
    page = Page(render_report(report))
    row = next(row for row in page.rows[""] if row and row[0].startswith("gguf:q8_0"))
    assert row[1:3] == ["5.74 MB", "8.51"]
    assert row[3:] == ["prefilldecode", "0.000430.000439", "+0.00172 ± 0.0023+0.00175 ± 0.0023", "99.3 %99.3 %",
                       "3 passed"]
    made = report["artifacts"][1]
    assert made["path"] in row[0] and "llama.cpp (llama-cpp-python 0.3.36)" in row[0] and made["sha256"][:12] in row[0]
    assert ("code", {"title": made["sha256"]}) in page.tags
    notes = [attrs.get("title") or "" for tag, attrs in page.tags if tag == "span"]
    assert any("2,048 positions" in note and "KL p99 0.00387" in note for note in notes)


def test_fallbacks_name_tensor_types_and_reason() -> None:
    page = Page(render_report(example_report()))
    words = page.words("fallbacks")
    assert "gguf:q4_k_m: 8 of 74 tensors" in words and "Q4_K → Q5_0" in words
    assert "rows of 160 are no multiple of 256" in words and "blk.7.attn_k.weight" in words
    assert "None: every tensor" in Page(render_report(many_artifacts())).words("fallbacks")


def test_token_and_template_mismatches_are_shown() -> None:
    words = Page(render_report(failed_report())).words("text")
    assert "gguf:q4_0 2 of 1,204 strings differ" in words and "all 1,204 strings equal" in words
    assert r"two spaces\tand\xa0one" in words and "1 220 220 811 93 7 44" in words and "(empty)" in words
    assert "gguf:q4_0 (llama.cpp) differs" in words and "<|user|> Hello!" in words
    assert "differ" not in Page(render_report(example_report())).words("text")


def test_samples_mark_the_first_difference() -> None:
    html = render_report(example_report())
    assert "and a <mark>little</mark> bird said" in html
    assert "Word for word the same: gguf:f16, gguf:q8_0, onnx:fp32, onnx:q4" in html
    page = Page(html)
    assert page.words("samples").count("named Lily") == 3 and "named Mia" in page.words("samples")
    assert page.html.count("<mark>") == 3  # the legend, one changed word, one early end


@pytest.mark.parametrize(("text", "reference", "expected"), [
    ("a b c", "a b c", ("a b c", "", "")),
    ("a box c", "a bat c", ("a ", "box", " c")),
    ("a b", "a b c", ("a b", "∎", "")),
    ("a b c", "a b", ("a b", " ", "c")),
    ("a  b", "a b", ("a ", " ", "b")),
    ("", "x", ("", "∎", "")),
    ("x", "", ("", "x", "")),
])
def test_split_at_difference(text: str, reference: str, expected: tuple[str, str, str]) -> None:
    assert split_at_difference(text, reference) == expected
    assert "".join(expected).replace("∎", "") == text


# -- charts ------------------------------------------------------------------------------------------------------------


def test_loss_charts_hold_the_curve() -> None:
    entropy = chart(example_report(), "Cross entropy over training")
    held_out = [t for t in titles(entropy) if t.startswith("held-out ")]
    assert len(held_out) == 9 and held_out[0] == "held-out 8.031 at 0"
    assert "teacher, held-out: 1.902" in titles(entropy)
    level = next(e for e in entropy.iterfind("s:line", SVG) if e.attrib["class"] == "line level" and len(e))
    assert level.attrib["y1"] == level.attrib["y2"]
    parts = chart(example_report(), "Parts of the training objective")
    assert len(parts.findall("s:polyline", SVG)) == 4
    assert {t.split()[0] for t in titles(parts)} == {"total", "LM", "KL", "clone"}


def test_long_curves_are_averaged_not_dropped() -> None:
    report = example_report()
    report["student"]["training"]["curve"] = [{"step": i, "tokens": i, "lm": 2.0 + i % 2} for i in range(10_000)]
    svg = chart(report, "Cross entropy over training")
    found = [t for t in titles(svg) if t.startswith("training")]
    assert 100 < len(found) <= 120 and all(" 2.5 at " in t for t in found)


def test_kl_chart() -> None:
    svg = bar_chart("KL", [Bar("a", (("prefill", 1e-3), ("decode", 1e-2)), 0.1, False),
                           Bar("b", (("prefill", 0.0), ("decode", 0.0)), 0.1, False),
                           Bar("c", (("prefill", 0.5), ("decode", None)), 0.1, True)], value_name="KL")
    root = ET.fromstring(svg)
    bars = [e for e in root.iterfind("s:rect", SVG)]
    widths = {title: float(bar.attrib["width"]) for bar, title in
              zip(bars, (e[0].text or "" for e in bars), strict=True)}
    assert widths["a prefill: 0.001, limit 0.1"] < widths["a decode: 0.01, limit 0.1"]
    assert widths["a decode: 0.01, limit 0.1"] < widths["c prefill: 0.5, limit 0.1"]
    assert widths["b prefill: exactly 0, limit 0.1"] == 2 and len(bars) == 5
    texts = [e.text for e in root.iterfind("s:text", SVG)]
    assert "exactly 0" in texts and texts.count("0.5") == 1
    limits = {float(e.attrib["x1"]) for e in root.iterfind("s:line", SVG) if "limit" in e.attrib["class"] and len(e)}
    assert len(limits) == 1
    a_decode, c_prefill = (next(b for b, t in zip(bars, widths, strict=True) if t.startswith(name))
                           for name in ("a decode", "c prefill"))
    assert float(a_decode.attrib["x"]) + float(a_decode.attrib["width"]) < limits.pop() < (
        float(c_prefill.attrib["x"]) + float(c_prefill.attrib["width"]))
    assert "bad" in c_prefill.attrib["class"] and "bad" not in a_decode.attrib["class"]


def test_quantization_is_told() -> None:
    """Calibration, training on the grid and a mixed precision; none of it where there was none."""
    report = example_report()
    assert "quantization" not in Page(render_report(report)).text
    grid = next(a for a in report["artifacts"] if a["encoding"] == "q4_0")
    grid["identical_blocks"] = 1.0
    grid["parity"]["as trained"] = {**grid["parity"]["prefill"], "kl_mean": 1.5e-4}
    report["gates"] += [
        {"name": "as trained", "artifact": grid["path"], "metric": "identical_blocks", "value": 1.0, "limit": 0.99,
         "relation": ">=", "passed": True},
        {"name": "as trained", "artifact": grid["path"], "metric": "kl_mean", "value": 1.5e-4, "limit": 0.01,
         "relation": "<=", "passed": True}]
    report |= {
        "calibration": {"source": "training text", "sha256": "ab" * 32, "rows": 64, "tokens": 16384,
                        "rows_left_out": 3},
        "grid": {"tokens": 50_176, "seconds": 51.0, "first_held_out_loss": 1.65, "student_held_out_loss": 1.63,
                 "teacher_held_out_loss": 1.625},
        "allocation": {"bits_per_weight": 4.25, "predicted_kl": 0.0167, "measured_kl": 0.0175,
                       "measured_bits_per_weight": 4.249, "types": {"a": "Q3_K", "b": "Q5_K", "c": "Q3_K"}}}
    page = Page(render_report(report))
    words = page.words("quantization")
    for told in ("16,384 tokens of training text", "3 rows left out", "80 % of the loss won back",
                 "gguf:q4_0: 100 % of the blocks as trained", "2 × Q3_K, 1 × Q5_K",
                 "0.0167 predicted, 0.0175 measured"):
        assert told in words, told
    assert "identical blocks" in page.words("gates")
    # The chart is of the distance from the student: neither the figure nor the limit of the other comparison is in it.
    drawn = titles(chart(report, "Mean KL divergence of each artifact"))
    assert not any("as trained" in title or "limit 0.01" in title for title in drawn)


def test_kl_of_zero_everywhere() -> None:
    report = example_report()
    for made in report["artifacts"]:
        for metrics in made["parity"].values():
            metrics |= {"kl_mean": 0.0, "kl_p99": 0.0, "kl_max": 0.0}
    page = Page(render_report(report))
    assert any("exactly 0" in title for svg in page.svgs() for title in titles(svg))


def test_size_chart_has_a_labelled_point_for_each() -> None:
    report = many_artifacts()
    svg = chart(report, "Size against perplexity")
    dots = svg.findall("s:circle", SVG)
    assert len(dots) == 21
    labels = {e.text for e in svg.iterfind("s:text", SVG) if e.attrib["class"] == "label"}
    assert labels == {made["encoding"] for made in report["artifacts"]} | {"student"}
    passed = chart(example_report(), "Size against perplexity")
    assert {"teacher", "student", "q4_0", "q4"} <= {e.text for e in passed.iterfind("s:text", SVG)}


def test_labels_do_not_overlap() -> None:
    points = [Point(f"label{i}", f"label{i}", 1e6 * 1.02**i, 8 + 0.001 * i, "c1", "") for i in range(20)]
    root = ET.fromstring(point_chart("x", points, x_name="", y_name="", x_tick=str))
    boxes = [(float(e.attrib["x"]), float(e.attrib["y"])) for e in root.iterfind("s:text", SVG)
             if e.attrib["class"] == "label"]
    assert len(boxes) == 20
    for i, (x, y) in enumerate(boxes):
        assert 0 < x < 480 and all(abs(x - u) >= 6.6 * 6 or abs(y - v) >= 13 for u, v in boxes[:i])


@pytest.mark.parametrize(("values", "log"), [([5, 5], False), ([0, 1e-9], False), ([3, 7], True), ([1e-13, 1], True),
                                             ([8.41, 8.42], True), ([-2, 1e6], False), ([4.0, 4.0], True)])
def test_scale_has_ticks_inside(values: list[float], log: bool) -> None:
    scale = Scale(values, (50, 450), log=log)
    ticks = scale.ticks()
    assert 1 <= len(ticks) <= 12 and ticks == sorted(ticks)
    assert all(50 <= scale.at(tick) <= 450 for tick in ticks)
    assert 50 <= scale.at(values[0]) <= scale.at(values[1]) <= 450


# -- what may be missing -----------------------------------------------------------------------------------------------


def test_least_report() -> None:
    """Every optional key away."""
    report = example_report()
    least = {key: report[key] for key in ("lrc_edge", "created", "versions", "artifacts", "gates", "student")}
    least["student"] = {key: report["student"][key] for key in ("name", "path", "family", "shape", "n_params")}
    least["artifacts"] = [{k: v for k, v in made.items() if k not in ("runtime", "parity", "generation")}
                          for made in report["artifacts"]]
    page = Page(render_report(least))
    assert "training" not in page.text and "samples" not in page.text and "text" not in page.text
    assert page.svgs() == [] and "exported as it came" in page.words("made")
    assert render_report({**least, "artifacts": [], "gates": []})


@pytest.mark.parametrize("key", ["command", "machine", "teacher", "tokenizer", "chat_template", "samples"])
def test_null_is_missing(key: str) -> None:
    with_null, without = example_report(), example_report()
    with_null[key] = None
    del without[key]
    assert render_report(with_null) == render_report(without)


@pytest.mark.parametrize("key", list(example_report()["artifacts"][0]["parity"]["prefill"]))
def test_any_metric_may_be_null(key: str) -> None:
    report = example_report()
    for made in report["artifacts"]:
        for metrics in made["parity"].values():
            if key not in ("positions", "near_ties"):
                metrics[key] = None
    Page(render_report(report))


def test_two_artifacts_of_one_kind_go_by_their_paths() -> None:
    report = example_report()
    twin = copy.deepcopy(report["artifacts"][1])
    twin["path"] = "gguf/other-Q8_0.gguf"
    report["artifacts"].append(twin)
    names = [row[0] for row in Page(render_report(report)).rows[""] if row and "sha256" in row[0]]
    assert names[-1].startswith("gguf/other-Q8_0.gguf") and not any(n.startswith("gguf:q8_0") for n in names)


# -- files and figures -------------------------------------------------------------------------------------------------


def test_write_report(tmp_path: Path) -> None:
    report = example_report()
    report["artifacts"][0]["parity"]["prefill"]["kl_max"] = math.inf
    write_report(report, tmp_path)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["report.html", "report.json"]
    found = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    assert found["artifacts"][0]["parity"]["prefill"]["kl_max"] is None
    assert found["gates"] == report["gates"] and NAME in (tmp_path / "report.html").read_text(encoding="utf-8")
    write_report(found, tmp_path)  # what `lrc-edge report` does


def test_a_report_that_cannot_be_rendered_leaves_the_old_one(tmp_path: Path) -> None:
    write_report(example_report(), tmp_path)
    before = {f.name: f.read_bytes() for f in tmp_path.iterdir()}
    with pytest.raises(KeyError):
        write_report({**example_report(), "artifacts": [{}]}, tmp_path)
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir()} == before


def test_report_needs_no_heavy_library() -> None:
    code = ("import sys, lrc_edge.report, lrc_edge.inspect_path\n"
            "print({'torch', 'transformers', 'onnx', 'gguf', 'matplotlib'} & {*sys.modules})")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


def test_template_and_style_are_packaged() -> None:
    folder = Path(lrc_edge.__file__).parent
    table = tomllib.loads((folder.parent / "pyproject.toml").read_text())
    patterns = table["tool"]["setuptools"]["package-data"]["lrc_edge"]
    for name in ("report.css", "report.html.jinja"):
        assert (folder / name).exists() and any(fnmatch(name, pattern) for pattern in patterns), name


def test_figures() -> None:
    assert [figure(x) for x in (0, 1e-12, 0.0313, 8190, -0.02, 9.996, None, math.nan, True)] == [
        "0", "1e-12", "0.0313", "8,190", "-0.02", "10", "–", "–", "–"]
    assert [human_bytes(n) for n in (0, 999, 999_600, 12_900_000)] == ["0 B", "999 B", "1.00 MB", "12.9 MB"]
    assert [human_count(n) for n in (12, 135_000_000)] == ["12", "135 M"]
    assert [percent(x) for x in (1.0, 0.99999, 0.5, 0)] == ["100 %", "99.99 %", "50 %", "0 %"]
    assert visible("a\tb\u202e\ud800") == r"a\tb\u202e\ud800" and prose("a\nb \x07") == "a\nb \\x07"
