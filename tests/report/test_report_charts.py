"""The report's charts: their curves, bars, points and labels, parsed as XML."""
from __future__ import annotations

from xml.etree import ElementTree as ET

import pytest
from report_example import example_report, many_artifacts
from report_page import SVG, Page, chart, titles

from lrc_edge.report.report_file import render_report
from lrc_edge.report.svg import Bar, Point, Scale, bar_chart, point_chart
from lrc_edge.report.view import training_facts


def test_loss_charts_hold_the_curve() -> None:
    entropy = chart(example_report(), "Cross entropy over training")
    held_out = [t for t in titles(entropy) if t.startswith("held-out ")]
    assert len(held_out) == 9 and held_out[0] == "held-out 8.031 at 0"
    assert "teacher, held-out: 1.902" in titles(entropy)
    level = next(e for e in entropy.iterfind("s:line", SVG) if e.attrib["class"] == "line level" and len(e))
    assert level.attrib["y1"] == level.attrib["y2"]
    parts = chart(example_report(), "Parts of the training loss")
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


def test_quantization_is_reported() -> None:
    """Calibration, quantization-aware training and mixed precision are shown if they happened, and only then."""
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
    for text in ("16,384 tokens of training text", "3 sequences left out", "80 % of the loss recovered",
                 "gguf:q4_0: 100 % of the blocks equal the trained ones", "2 × Q3_K, 1 × Q5_K",
                 "0.0167 predicted, 0.0175 measured"):
        assert text in words, text
    assert "identical blocks" in page.words("gates")
    # The chart shows the KL from the student: neither value nor limit of the other comparison is in it.
    drawn = titles(chart(report, "Mean KL divergence of each artifact"))
    assert not any("as trained" in title or "limit 0.01" in title for title in drawn)


def test_the_terms_of_the_loss_are_those_that_training_names() -> None:
    report = example_report()
    training = report["student"]["training"]
    training["terms"]["router"] = "router balance"
    training["curve"] = [{**row, "router": 0.5} if "loss" in row else row for row in training["curve"]]
    svg = chart(report, "Parts of the training loss")
    drawn = {element.text for element in svg.iterfind("s:text", SVG)}
    assert {"total", "LM", "KL", "clone", "router balance"} <= drawn


def test_training_shows_the_rates_and_the_loss_before_the_first_step() -> None:
    report = example_report()
    report["student"]["training"] |= {"first_held_out_loss": 1.7045, "student_held_out_loss": 1.6241,
                                      "phases": {"dense": {"steps": 1200, "warmup": 24, "learning_rate": 9.1e-4}}}
    facts = dict(training_facts(report))
    assert facts["peak learning rate, dense phase"] == "0.00091"
    assert facts["held-out loss"] == "1.7045 before the first step, 1.6241 after the last"


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
@pytest.mark.parametrize("pad", [0.0, 0.06])
def test_scale_has_ticks_inside(values: list[float], log: bool, pad: float) -> None:
    scale = Scale(values, (50, 450), log=log, pad=pad)
    ticks = scale.ticks()
    assert 1 <= len(ticks) <= 12 and ticks == sorted(ticks)
    assert all(50 <= scale.at(tick) <= 450 for tick in ticks)
    assert 50 <= scale.at(values[0]) <= scale.at(values[1]) <= 450
