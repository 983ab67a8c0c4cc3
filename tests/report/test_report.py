"""The report: its page, parsed as a browser would, its verdict and its files."""
from __future__ import annotations

import copy
import io
import json
import math
import random
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
from faults.mutate import json_value
from report_example import NAME, example_report, failed_report, many_artifacts
from report_page import Page
from rich.console import Console

import lrc_edge
from lrc_edge.errors import UserError
from lrc_edge.figures import figure, human_bytes, human_count, percent, prose, visible
from lrc_edge.report.report_file import gate_table, read_report, render_report, verdict, write_report
from lrc_edge.report.view import split_at_difference

HOSTILE = "<script>alert(1)</script><img src=x onerror=y>\" ' & \x1b[31m\u202e{{ 7*7 }}"
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
    assert verdict({**example_report(), "gates": []}) == "No gate was evaluated: nothing is verified"


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
    """Make every text of a report hostile, except those that select how it is evaluated."""
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


def test_vocabularies_are_compared_per_byte() -> None:
    """Losses per token of two vocabularies cannot be compared: the teacher's column has its loss with the student's."""
    report = example_report()
    report["teacher"]["full_vocabulary"] = {"loss": 1.5, "perplexity": math.exp(1.5), "bits_per_byte": 0.654}
    report["student"]["shape"]["vocab_size"], report["teacher"]["proof_perplexity"] = 2048, None
    page = Page(render_report(report))
    rows = {row[0]: row[1:] for row in page.rows[""] if row}
    assert rows["vocabulary"] == ["4,096", "2,048", "÷ 2"]
    assert rows["held-out loss, nats per token, student's vocabulary"] == ["1.902", "2.131", ""]
    assert rows["held-out bits per byte, student's vocabulary"] == ["0.731", "0.819", ""]
    assert rows["held-out bits per byte, teacher's vocabulary"] == ["0.654", "–", ""]
    header = page.text[""]
    assert "Held-out bits per byte" in header and "teacher, full vocabulary: 0.654" in header
    assert "Held-out perplexity" not in header and "4.48" not in "".join(page.text.values())


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
    assert "Identical text: gguf:f16, gguf:q8_0, onnx:fp32, onnx:q4" in html
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


# -- what may be missing -----------------------------------------------------------------------------------------------


def test_least_report() -> None:
    """Without any optional key."""
    report = example_report()
    least = {key: report[key] for key in ("lrc_edge", "created", "versions", "artifacts", "gates", "student")}
    least["student"] = {key: report["student"][key] for key in ("name", "path", "family", "shape", "n_params")}
    least["artifacts"] = [{k: v for k, v in made.items() if k not in ("runtime", "parity", "generation")}
                          for made in report["artifacts"]]
    page = Page(render_report(least))
    assert "training" not in page.text and "samples" not in page.text and "text" not in page.text
    assert page.svgs() == [] and "exported unmodified" in page.words("made")
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
    code = ("import sys, lrc_edge.report.report_file, lrc_edge.report.plan_page, lrc_edge.inspect.command\n"
            "print({'torch', 'transformers', 'onnx', 'gguf', 'matplotlib'} & {*sys.modules})")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


def test_template_and_style_are_packaged() -> None:
    root = Path(lrc_edge.__file__).parents[1]
    folder = root / "lrc_edge" / "report"
    table = tomllib.loads((root / "pyproject.toml").read_text())
    patterns = table["tool"]["setuptools"]["package-data"]["lrc_edge.report"]
    for name in ("report.css", "report.html.jinja", "plan.css", "plan.html.jinja"):
        assert (folder / name).exists() and any(fnmatch(name, pattern) for pattern in patterns), name


def test_figures() -> None:
    assert [figure(x) for x in (0, 1e-12, 0.0313, 8190, -0.02, 9.996, None, math.nan, True)] == [
        "0", "1e-12", "0.0313", "8,190", "-0.02", "10", "–", "–", "–"]
    assert [human_bytes(n) for n in (0, 999, 999_600, 12_900_000)] == ["0 B", "999 B", "1.00 MB", "12.9 MB"]
    assert [human_count(n) for n in (12, 135_000_000)] == ["12", "135 M"]
    assert [percent(x) for x in (1.0, 0.99999, 0.5, 0)] == ["100 %", "99.99 %", "50 %", "0 %"]
    assert visible("a\tb\u202e\ud800") == r"a\tb\u202e\ud800" and prose("a\nb \x07") == "a\nb \\x07"


def test_a_damaged_report_is_one_line_and_a_whole_one_is_read(tmp_path: Path) -> None:
    """A report with missing or mistyped values is either read as a report or refused."""
    whole = json.loads(json.dumps(many_artifacts()))
    refused = 0
    for damaged in _damaged(whole):
        (tmp_path / "report.json").write_text(json.dumps(damaged))
        try:
            report = read_report(tmp_path)
        except UserError as error:
            refused += 1
            assert "damaged" in str(error) and "\n" not in str(error)
        else:
            write_report(report, tmp_path)
            assert verdict(report)
    assert refused > 20
    for text in ("", "[]", "null", "{", "[" * 100_000):
        (tmp_path / "report.json").write_text(text)
        with pytest.raises(UserError, match="damaged"):
            read_report(tmp_path)
    (tmp_path / "report.json").write_text(json.dumps(whole))
    assert read_report(tmp_path) == whole


def _damaged(report: dict[str, Any]) -> Iterator[dict[str, Any]]:
    rng = random.Random(0)
    for _ in range(60):
        yield json.loads(json_value(rng, json.dumps(report).encode()))
