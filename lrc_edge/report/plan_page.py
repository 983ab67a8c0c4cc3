"""plan.json and its page plan.html, which is made from plan.json's table alone."""
from __future__ import annotations

import json
import math
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from markupsafe import Markup

from lrc_edge.figures import NONE, figure, human_bytes, human_count, is_number, tick, visible
from lrc_edge.report.page import finite, style, template
from lrc_edge.report.plan_schema import PlanTable, ShapeRow
from lrc_edge.report.svg import Level, Line, Point, point_chart
from lrc_edge.report.view import compared, size_rows
from lrc_edge.workspace import write_atomically

PLAN_FILE, PAGE_FILE = "plan.json", "plan.html"
MOST_UNTRIED = 100  # rows of the page; plan.json has all
MOST_EXPECTED = 24  # shapes that are compared if none was tried
LARGEST_DOT = 7.0  # radius; areas are proportional to the memory


@dataclass(frozen=True)
class Cost:
    """One field of a price. axis: its name with the unit. write and mark: format it, and on an axis."""

    name: str
    axis: str
    unit: str  # that `write` leaves out
    write: Callable[[Any], str]
    mark: Callable[[float], str]


def _three(value: float | None) -> str:
    """Format with three significant digits, zeros too, so that a column's numbers are alike."""
    if not value:
        return figure(value)
    return f"{value:,.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


COSTS = {
    "token_ms": Cost("speed", "ms per token", " ms", _three, figure),
    "first_token_s": Cost("first token", "seconds to the first token", " s", _three, figure),
    "memory_bytes": Cost("memory", "memory", "", human_bytes, lambda n: tick(human_bytes(n))),
    "file_bytes": Cost("file size", "file size", "", human_bytes, lambda n: tick(human_bytes(n)))}


def write_plan(table: PlanTable, out: Path) -> None:
    """Write out/plan.json and out/plan.html, each atomically."""
    table = cast(PlanTable, finite(table))
    page = render_plan(table)
    write_atomically(out / PLAN_FILE, json.dumps(table, indent=1, allow_nan=False) + "\n")
    write_atomically(out / PAGE_FILE, page)


def render_plan(table: PlanTable) -> str:
    """Return one self-contained HTML page. Every text in it is escaped."""
    trials = compared_rows(table)
    untried = [row for row in table["shapes"] if row not in trials]
    largest = sorted(untried, key=lambda row: -row["n_params"])[:MOST_UNTRIED]
    tokens = table["search"]["tokens"]
    return template("plan.html.jinja").render(
        css=style("report.css", "plan.css"), plan=table, teacher=visible(table["teacher"]["name"]),
        budget=_budget_words(table), chosen=_cells(table, chosen_row(table)), tiles=_tiles(table),
        sizes=size_rows(chosen_row(table), table["teacher"]), costs=_cost_rows(table), fit=_fit(table),
        loss=loss_name(table), trained=f"{tokens:,}" if tokens else "", n_trials=len(trials), dots=_dot_words(trials),
        charts=[_chart(table, cost) for cost in charted(table) if len(trials) > 1],
        shows_first="first_token_s" in charted(table),
        trials=[_cells(table, row) | {"rank": i} for i, row in enumerate(trials, 1)],
        untried=[_cells(table, row) for row in largest], n_untried=f"{len(untried):,}", bases=_bases(table),
        facts=_facts(table))


def chosen_row(table: PlanTable) -> ShapeRow:
    return next(row for row in table["shapes"] if row["shape"] == table["chosen"])


def compared_rows(table: PlanTable) -> list[ShapeRow]:
    """Return the tried shapes, or if none was, those with the least expected loss; the chosen one first, then by their
    loss; those without a loss last."""
    def order(row: ShapeRow) -> tuple[bool, bool, float]:
        loss = _loss(row)
        return row["shape"] != table["chosen"], loss is None, loss or 0.0

    tried = [row for row in table["shapes"] if row["trial"]]
    return sorted(tried, key=order) or sorted(table["shapes"], key=order)[:MOST_EXPECTED]


def charted(table: PlanTable) -> list[str]:
    """Return the costs with a chart: the speed and what else the budget limits, the memory if that is nothing."""
    limited = [cost for cost in COSTS if cost != "token_ms" and _of(table["budget"], cost) is not None]
    return ["token_ms", *(limited or ["memory_bytes"])]


def loss_name(table: PlanTable) -> str:
    return "loss in 4 bits" if table["search"]["tokens"] else "expected loss"


def _of(prices: Any, cost: str) -> float | None:
    """Return one cost of a price or a budget, whose type does not accept a variable key."""
    value: float | None = prices[cost]
    return value


def _loss(row: ShapeRow) -> float | None:
    """Return the loss of the trial, or the one that is expected."""
    return row["trial"]["loss"] if row["trial"] else row["expected"]


# -- words and cells ---------------------------------------------------------------------------------------------------


def basis(table: PlanTable, cost: str) -> str:
    """Return how the figures of a cost were found."""
    if cost in ("memory_bytes", "file_bytes"):
        return "estimated"
    if table["timings"]:
        return "measured anchors"
    return "estimated" if cost == "token_ms" else "unknown"


def _budget_words(table: PlanTable) -> list[str]:
    words = []
    for cost, word in (("token_ms", "at least {} tokens/s"), ("first_token_s", "at most {} s to the first token"),
                       ("memory_bytes", "at most {} of memory"), ("file_bytes", "a file of at most {}")):
        limit = _of(table["budget"], cost)
        if limit is not None:
            words.append(word.format(figure(1000 / limit) if cost == "token_ms" else COSTS[cost].write(limit)))
    return words


def _cells(table: PlanTable, row: ShapeRow) -> dict[str, Any]:
    """Return a shape as the text of its cells."""
    shape, trial = row["shape"], row["trial"]
    sizes = {key: f"{shape[field]:,}" for key, field in (
        ("width", "hidden_size"), ("layers", "num_hidden_layers"), ("neurons", "intermediate_size"),
        ("queries", "num_attention_heads"), ("keys", "num_key_value_heads"))}
    fronts = [COSTS[cost].name for cost in charted(table) if cost in row["front"]]
    return sizes | {cost: COSTS[cost].write(_of(row["price"], cost)) for cost in COSTS} | {
        "params": human_count(row["n_params"]), "chosen": shape == table["chosen"],
        "kl": _three(trial["start_kl"]) if trial else NONE, "loss": _nats(_loss(row)), "front": ", ".join(fronts),
        "within": row["within"]}


def _nats(loss: float | None) -> str:
    return f"{loss:.3f}" if is_number(loss) else NONE


def _tiles(table: PlanTable) -> list[dict[str, str]]:
    """Return the most important figures of the chosen student: name, value, and what to compare it with."""
    student, teacher = chosen_row(table), table["teacher"]
    n_trials, tokens = len(compared_rows(table)), table["search"]["tokens"]
    speeds = [_three(1000 / who["price"]["token_ms"]) for who in (student, teacher)]
    most = "" if table["timings"] else "≤ "
    sizes = [human_bytes(who["price"]["memory_bytes"]) for who in (student, teacher)]
    return [
        {"name": "Parameters", "value": human_count(student["n_params"]),
         "note": f"teacher: {human_count(teacher['n_params'])}"},
        {"name": "Tokens per second", "value": most + speeds[0],
         "note": f"teacher: {most}{speeds[1]} · {basis(table, 'token_ms')}"},
        {"name": "Memory", "value": sizes[0], "note": f"teacher: {sizes[1]} · {basis(table, 'memory_bytes')}"},
        {"name": f"Held-out {loss_name(table)}", "value": _nats(_loss(student)),
         "note": f"nats per token after {tokens:,} tokens; trials: {n_trials}"} if tokens else
        {"name": "Expected loss", "value": f"+{_nats(_loss(student))}", "note": "nats per token, above the teacher's"}]


def _cost_rows(table: PlanTable) -> list[dict[str, str]]:
    """Return each cost of teacher and student, their ratio and the limit."""
    student, teacher, budget = chosen_row(table)["price"], table["teacher"]["price"], table["budget"]
    rows = []
    for cost, kind in COSTS.items():
        limit = _of(budget, cost)
        rows.append({**compared(kind.axis, _of(student, cost), _of(teacher, cost), kind.write),
                     "basis": basis(table, cost), "limit": f"≤ {kind.write(limit)}" if limit is not None else ""})
    faster, rate = (1000 / price["token_ms"] for price in (student, teacher))
    least = f"≥ {_three(1000 / budget['token_ms'])}" if budget["token_ms"] else ""
    rows.insert(1, {**compared("tokens per second", faster, rate, _three), "ratio": f"× {figure(faster / rate)}",
                    "basis": basis(table, "token_ms"), "limit": least})
    return rows


def _facts(table: PlanTable) -> list[tuple[str, str]]:
    timings, search = table["timings"], table["search"]
    facts = [("made", table["created"]), ("device", f"{table['device']}: {table['description']}"),
             ("search", f"{search['effort']}: {sum(row['trial'] is not None for row in table['shapes'])} of "
                        f"{len(table['shapes']):,} shapes tried")]
    if timings:
        facts.append(("timed on", f"{timings['machine']}; {timings['library']}; threads: {timings['threads']}"))
    return [(name, visible(value)) for name, value in facts]


def _bases(table: PlanTable) -> list[dict[str, str]]:
    """Return, for each figure, how it was found, and how to measure it."""
    format_, context, tokens = table["format"], f"{table['context']:,}", table["search"]["tokens"]
    check = f"lrc-edge check out --target {shlex.quote(table['target'])}"
    losses, wanted = (
        f"Each trial trained on {tokens:,} tokens of the given text, from the teacher. Its weights were then rounded "
        "to 4 bits, and its loss computed on held-out text. So short a training only compares shapes: the finished "
        "student will have a lower loss. The teacher's loss was not measured.",
        "The build's report has the loss after the whole training.") if tokens else (
        "No shape was tried. The loss above the teacher's is reckoned from what a cut of each axis cost other "
        "teachers: so many nats for each halving.", "Plan with --search short or full, or build it.")
    rows = [
        {"figure": "Memory", "basis": basis(table, "memory_bytes"), "command": check,
         "how": f"Computed from the shape, as by lrc-edge targets fit: weights in {format_}, {context} tokens of KV "
                f"cache, and working memory of {table['runtime']}.",
         "wanted": "After the build, run this on the device. It measures the peak memory of each file."},
        {"figure": "File size", "basis": basis(table, "file_bytes"), "command": "",
         "how": f"Computed from the shape: the bytes of all weights in {format_}, and about those of the vocabulary.",
         "wanted": "The build's report has the size of each file."},
        {"figure": loss_name(table).capitalize(), "basis": "measured" if tokens else "estimated", "how": losses,
         "command": "", "wanted": wanted}]
    return [_speed_basis(table, check), *rows]


def _fit(table: PlanTable) -> str:
    """Return what the model of the speed was fitted to, in a sentence; empty without timings."""
    found = table["timings"]
    return "" if found is None else (
        f"fitted to {found['n_timings']} timings on {found['machine']} with {found['library']} and {found['threads']} "
        f"{'thread' if found['threads'] == 1 else 'threads'}. Its largest error on them is "
        f"{figure(100 * found['worst'], 2)} %.")


def _speed_basis(table: PlanTable, check: str) -> dict[str, str]:
    timings = table["timings"]
    if timings is None:
        return {
            "figure": "Speed", "basis": basis(table, "token_ms"),
            "how": f"An upper bound: the device's memory reads {figure(table['bandwidth_gb_s'])} GB/s, and each token "
                   "reads all weights and the KV cache. The time to the first token is unknown.",
            "wanted": "Run this on the device, and plan again with --timings anchors/timings.json.",
            "command": f"lrc-edge plan TEACHER/config.json --time-anchors --target {shlex.quote(table['target'])} "
                       f"--context {table['context']} --out anchors"}
    return {
        "figure": "Speed", "basis": basis(table, "token_ms"), "command": check,
        "how": f"A model of the time per token, {_fit(table)} The {timings['n_shapes']} timed files have random "
               "weights and other shapes. The student itself was not timed. The figures hold for that machine.",
        "wanted": "After the build, run this on the device. It times the student's own files."}


# -- charts ------------------------------------------------------------------------------------------------------------


def _chart(table: PlanTable, cost: str) -> dict[str, Any]:
    """Return the chart of a cost against the loss: tried shapes, their front, the limit, the teacher's cost."""
    kind, trials = COSTS[cost], compared_rows(table)
    most = max(row["price"]["memory_bytes"] for row in trials)
    drawn = [(_point(table, row, loss, cost, rank, most), cost in row["front"])
             for rank, row in enumerate(trials, 1) if (loss := _loss(row)) is not None]
    prices: tuple[tuple[str, Any, str], ...] = (
        ("budget", table["budget"], "limit"), ("teacher", table["teacher"]["price"], "level"))
    levels = [Level(f"{who}: {kind.write(value)}{kind.unit}", value, css)
              for who, of, css in prices if (value := _of(of, cost)) is not None]
    corners = _stairs(sorted((point.x, point.y) for point, on_front in drawn if on_front))
    line = Line("Pareto front", "front", corners) if len(corners) > 1 else None
    svg = point_chart(f"{kind.axis.capitalize()} against {loss_name(table)}", [point for point, _ in drawn],
                      x_name=kind.axis, y_name=f"{loss_name(table)}, nats per token", x_tick=kind.mark, levels=levels,
                      line=line) if drawn else ""
    return {"title": f"{kind.name.capitalize()} against loss", "basis": basis(table, cost), "svg": Markup(svg)}


def _dot_words(trials: list[ShapeRow]) -> str:
    memory = [row["price"]["memory_bytes"] for row in trials]
    return " to ".join(dict.fromkeys(human_bytes(n) for n in (min(memory), max(memory))))


def _point(table: PlanTable, row: ShapeRow, loss: float, cost: str, rank: int, most: float) -> Point:
    """Return the dot of a shape. most: the memory of the largest dot, in bytes."""
    cells, x = _cells(table, row), _of(row["price"], cost)
    assert x is not None
    name = (f"{rank}: width {cells['width']}, {cells['layers']} layers, {cells['neurons']} neurons, heads "
            f"{cells['queries']}/{cells['keys']}")
    note = f"{cells['token_ms']} ms per token, {cells['memory_bytes']} of memory, loss {cells['loss']}"
    css = "c2" if cells["chosen"] else "c1" if cost in row["front"] else "off"
    return Point(f"{rank} chosen" if cells["chosen"] else str(rank), name, x, loss, css, note,
                 radius=LARGEST_DOT * math.sqrt(row["price"]["memory_bytes"] / most))


def _stairs(front: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the corners of the line below which no tried shape is: at each cost, the least loss up to it."""
    corners: list[tuple[float, float]] = []
    for x, y in front:
        corners += [(x, corners[-1][1]), (x, y)] if corners else [(x, y)]
    return corners
