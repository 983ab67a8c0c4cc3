"""The page of a plan: each figure of plan.json, the charts, and hostile names."""
from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
from plan_example import TARGET, estimated_plan, example_plan, row
from report_page import SVG, Page, titles

from lrc_edge.report.plan_page import MOST_UNTRIED, render_plan, write_plan
from lrc_edge.report.svg import Level, Line, Point, point_chart

HOSTILE = "<script>alert(1)</script><img src=x onerror=y>\" ' & \x1b[31m\u202e{{ 7*7 }}"


def page_of(plan: dict[str, Any]) -> Page:
    return Page(render_plan(plan))  # type: ignore[arg-type]


def chart(plan: dict[str, Any], name: str) -> ET.Element:
    return next(svg for svg in page_of(plan).svgs() if svg.attrib["aria-label"] == name)


def dots(svg: ET.Element) -> dict[str, str]:
    """Rank -> class of the dot."""
    return {(mark[0].text or "").partition(":")[0]: mark.attrib["class"] for mark in svg.iterfind("s:circle", SVG)}


def test_the_choice_stands_next_to_the_teacher() -> None:
    page = page_of(example_plan())
    for text in ("A student of storyteller for raspberry-pi-5", "gguf:q4_0 in llama.cpp", "2,048 tokens of context",
                 "at least 80 tokens/s", "at most 95.0 MB of memory", "lrc-edge build storyteller --recipe plan/recipe",
                 "width 192, 4 layers, 512 neurons, 8 query and 4 key/value heads", "teacher: 31.7 · measured anchors"):
        assert text in page.words(""), text
    assert ["residual width", "256", "192", "÷ 1.33"] in page.rows["sizes"]
    assert ["layers", "8", "4", "÷ 2"] in page.rows["sizes"]
    assert [[" ".join(cell.split()) for cell in cells] for cells in page.rows["costs"][1:]] == [
        ["ms per token measured anchors", "31.5", "12.2≤ 12.5", "÷ 2.57"],
        ["tokens per second measured anchors", "31.7", "81.6≥ 80.0", "× 2.57"],
        ["seconds to the first token measured anchors", "9.00", "3.50", "÷ 2.57"],
        ["memory estimated", "240 MB", "90.0 MB≤ 95.0 MB", "÷ 2.67"],
        ["file size estimated", "63.0 MB", "21.0 MB", "÷ 3"]]


def test_how_each_figure_was_found() -> None:
    words = page_of(example_plan()).words("basis")
    for text in ("Speed measured anchors A model of the time per token, fitted to 14 timings on aarch64, 4 processors, "
                 "Cortex-A76 with llama-cpp-python 0.3.36 and 4 threads. Its largest error on them is 8.3 %.",
                 "The 7 timed files have random weights", f"lrc-edge check out --target '{TARGET}'",
                 "Memory estimated", "File size estimated", "Loss in 4 bits measured Each trial trained on 51,200 "):
        assert text in words, text


def test_estimates_are_not_called_measured() -> None:
    page = page_of(estimated_plan())
    words = " ".join(" ".join(text.split()) for text in page.text.values())
    assert "measured anchors" not in words and "≤ 81.6" in page.words("")
    for text in ("Nothing was timed", "No shape was tried", "reads 17.1 GB/s", "Speeds are upper bounds",
                 f"lrc-edge plan TEACHER/config.json --time-anchors --target '{TARGET}' --context 2048",
                 "Expected loss estimated", "+0.192", "Candidates"):
        assert text in words, text
    assert "Loss in 4 bits" not in words and "Tried" not in words
    assert [cells[1] for cells in page.rows["all-trials"][1:]] == ["192", "64", "64", "128", "256"], "chosen, then best"
    assert [" ".join(page.rows["costs"][3][0].split()), *page.rows["costs"][3][1:]] == [
        "seconds to the first token unknown", "–", "–", ""]


def test_every_trial_is_a_row_and_a_dot() -> None:
    page = page_of(example_plan())
    assert page.rows["all-trials"][1:] == [
        ["1", "192", "4", "512", "8/4", "768 k", "12.2", "90.0 MB", "21.0 MB", "0.812", "2.718",
         "speed, memory chosen"],
        ["2", "128", "8", "512", "8/4", "1.02 M", "8.50", "91.0 MB", "20.0 MB", "1.25", "2.900", "speed"],
        ["3", "256", "2", "512", "8/4", "512 k", "11.0", "80.0 MB", "22.0 MB", "3.00", "–", "–"]]
    assert page.html.count('<tr class="chosen">') == 1
    speed, memory = (chart(example_plan(), f"{name} against loss in 4 bits") for name in ("Ms per token", "Memory"))
    assert dots(speed) == {"1": "dot c2", "2": "dot c1"}  # the third has no loss
    assert dots(memory) == {"1": "dot c2", "2": "dot off"}
    assert "1: width 192, 4 layers, 512 neurons, heads 8/4: 12.2 ms per token, 90.0 MB of memory, loss 2.718" in titles(
        speed)
    words = [text.text for text in speed.iterfind("s:text", SVG)]
    assert "budget: 12.5 ms" in words and "teacher: 31.5 ms, off the chart" in words and "1 chosen" in words
    assert len(speed.findall("s:polyline", SVG)[0].attrib["points"].split()) == 3  # a corner between two points


def test_a_shape_over_the_budget_is_marked() -> None:
    """A full search also tries larger ones, to show what they would give."""
    plan = example_plan()
    assert "over the budget" not in page_of(plan).html
    plan["shapes"].append(row(256, 4, (14.0, 4.0, 99e6, 23e6), (0.5, 2.6, ["token_ms"]), within=False))
    page = page_of(plan)
    assert page.rows["all-trials"][2][-1] == "speed over the budget" and page.rows["all-trials"][1][1] == "192"


def test_a_single_trial_has_no_chart() -> None:
    plan = example_plan()
    plan["shapes"] = plan["shapes"][:1]
    page = page_of(plan)
    assert not page.svgs() and len(page.rows["all-trials"]) == 2 and "Tried 1 of 1 shapes" in page.words("trials")


def test_charts_are_of_the_speed_and_of_what_is_limited() -> None:
    for limits, names in (({}, ["Speed", "Memory"]), ({"file_bytes": 3e7}, ["Speed", "File size"]),
                          ({"first_token_s": 4.0, "memory_bytes": 1e8}, ["Speed", "First token", "Memory"])):
        plan = example_plan()
        plan["budget"] = dict.fromkeys(plan["budget"]) | limits
        html = page_of(plan).html
        assert [name for name in ("Speed", "First token", "Memory", "File size")
                if f"<b>{name} against loss</b>" in html] == names
        assert ("First token, s" in html) == ("First token" in names)


def test_the_untried_are_folded_away_and_counted() -> None:
    page = page_of(example_plan())
    assert "2 more shapes" in page.words("untried") and "most parameters" not in page.words("untried")
    assert [cells[:2] for cells in page.rows["all-untried"][1:]] == [["64", "8"], ["64", "7"]]
    plan = example_plan()
    plan["shapes"] += [row(64, 1 + i, (5.0, 1.0, 5e7, 1e7)) for i in range(1000)]
    page = page_of(plan)
    assert f"1,002 more shapes; the {MOST_UNTRIED} with the most" in page.words("untried")
    assert len(page.rows["all-untried"]) == 1 + MOST_UNTRIED and page.rows["all-untried"][1][1] == "1,000"
    plan["shapes"] = [shape for shape in plan["shapes"] if shape["trial"]]
    assert "None." in page_of(plan).words("untried")


@pytest.mark.parametrize("plan", [example_plan(), estimated_plan()])
def test_hostile_names_stay_text(plan: dict[str, Any]) -> None:
    plan |= {key: HOSTILE for key, value in plan.items() if isinstance(value, str)}
    plan["teacher"]["name"] = plan["search"]["effort"] = HOSTILE
    if plan["timings"]:
        plan["timings"] |= {"machine": HOSTILE, "library": HOSTILE}
    page = page_of(plan)
    assert not {"script", "img", "iframe", "link"} & {tag for tag, _ in page.tags}
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert "\x1b" not in page.html and "\u202e" not in page.html and "{{ 7*7 }}" in page.text[""]
    assert "A student of <script>alert(1)</script>" in page.words("")


@pytest.mark.parametrize("plan", [example_plan(), estimated_plan()])
def test_the_page_needs_nothing_else(plan: dict[str, Any]) -> None:
    page = page_of(plan)
    for _, attributes in page.tags:
        assert "src" not in attributes and (attributes.get("href") or "#").startswith("#"), attributes
    assert "url(" not in page.html and "@import" not in page.html
    assert all(svg.attrib["role"] == "img" and svg.attrib["aria-label"] for svg in page.svgs())
    boxes = [attributes for tag, attributes in page.tags if attributes.get("class") == "scroll"]
    assert len(boxes) == (4 if plan["search"]["tokens"] else 3)
    assert all(box["tabindex"] == "0" and box["aria-label"] for box in boxes)


def test_files(tmp_path: Path) -> None:
    plan = example_plan()
    plan["shapes"][2]["trial"]["loss"] = math.nan
    write_plan(plan, tmp_path)  # type: ignore[arg-type]
    found = json.loads((tmp_path / "plan.json").read_text(), parse_constant=pytest.fail)
    assert found == example_plan() and sorted(file.name for file in tmp_path.iterdir()) == ["plan.html", "plan.json"]
    assert (tmp_path / "plan.html").read_text(encoding="utf-8") == page_of(found).html
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(KeyError):
        write_plan({**plan, "shapes": [{}]}, tmp_path)  # type: ignore[arg-type]
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_level_far_from_all_points_is_only_named() -> None:
    points = [Point(str(i), f"point {i}", x, 1.0 + i, "c1", "") for i, x in enumerate((10.0, 20.0))]
    svg = ET.fromstring(point_chart("levels", points, x_name="x", y_name="y", x_tick=str, levels=(
        Level("near", 25.0, "limit"), Level("far", 1000.0, "level")), line=Line("front", "front", [(10, 2), (20, 1)])))
    lines = {line.attrib["class"]: line for line in svg.iterfind("s:line", SVG) if len(line)}
    assert list(lines) == ["line limit"]
    right = {mark[0].text: float(mark.attrib["cx"]) for mark in svg.iterfind("s:circle", SVG)}["point 1: "]
    assert right < float(lines["line limit"].attrib["x1"]) < 480
    assert {"near", "far, off the chart", "front"} <= {text.text for text in svg.iterfind("s:text", SVG)}
