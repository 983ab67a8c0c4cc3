"""The report of a build: report.json for programs, report.html for people, a table of gates for the terminal."""
from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jinja2 import TemplateError
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lrc_edge.errors import UserError
from lrc_edge.figures import visible
from lrc_edge.report import charts, view
from lrc_edge.report.devices import target_tables
from lrc_edge.report.page import finite, style, template
from lrc_edge.report.quantization import quantization_facts
from lrc_edge.report.schema import Report
from lrc_edge.report.view import Names, gate_cells, ordered_gates
from lrc_edge.stored_reference import TOP
from lrc_edge.workspace import write_atomically

REPORT = "report.json"
NAMED_IN_VERDICT = 3  # failed gates, and unchecked rows; the tables have the others


def verdict(report: Report) -> str:
    """Return one line: "All 23 gates passed", or how many failed and which."""
    gates, names = report["gates"], Names(report["artifacts"])
    failed = [gate_cells(gate, names) for gate in gates if gate.get("passed") is not True]
    if not gates:
        return "No gate was evaluated: nothing is verified"
    unchecked = [f"{target['target']} {names(row['artifact'])} in {visible(row['runtime'])}"
                 for target in report.get("targets") or [] for row in target["rows"] if row["state"] == "not checked"]
    missed = f"; NOT CHECKED: {_few(unchecked)}" if unchecked else ""
    if not failed:
        return ("The one gate passed" if len(gates) == 1 else f"All {len(gates)} gates passed") + missed
    # The reason for a fault that an audit found begins with the gate's name.
    reasons = list(dict.fromkeys(
        f"{g['artifact']} {g['why']}" if g["why"].startswith(f"{g['name']}: ") else
        f"{g['artifact']} {g['name']}: " + (g["why"] or f"{g['metric']} {g['value']} {g['relation']} {g['limit']}")
        for g in failed))
    return f"{len(failed)} of {len(gates)} gates FAILED: {_few(reasons)}{missed}"


def _few(items: list[str]) -> str:
    """Join the first items, and state how many more there are."""
    more = [f"and {len(items) - NAMED_IN_VERDICT} more"] if len(items) > NAMED_IN_VERDICT else []
    return "; ".join(items[:NAMED_IN_VERDICT] + more)


def gate_table(report: Report) -> Table:
    """Return a table of the gates, failed ones first. Gates of devices, which have their own tables, only if failed."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name, justify in (("", "left"), ("artifact", "left"), ("gate", "left"), ("metric", "left"), ("value", "right"),
                          ("limit", "left")):
        table.add_column(name, justify=justify, overflow="fold")  # type: ignore[arg-type]
    names = Names(report["artifacts"])
    for gate in ordered_gates(report):
        if "target" in gate and gate["passed"]:
            continue
        cells = gate_cells(gate, names)
        # Text, not str: names from a teacher's files may look like rich markup.
        row = (cells["artifact"], cells["name"], cells["metric"], cells["value"], f"{cells['asked']} {cells['limit']}")
        style = "" if cells["passed"] else "bold red"
        mark = Text("pass", "green") if cells["passed"] else Text("FAIL", style)
        table.add_row(mark, *(Text(cell, style) for cell in row))
    return table


def failure_lines(report: Report) -> list[str]:
    """Return why gates failed, if a reason is known beyond their values: one line per reason, with the file's name."""
    names = Names(report["artifacts"])
    cells = (gate_cells(gate, names) for gate in ordered_gates(report) if "target" not in gate)
    return list(dict.fromkeys(f"{c['artifact']}: {c['why']}" for c in cells if c["why"] and not c["passed"]))


def show_verdict(report: Report, out: Path, console: Console) -> None:
    """Print the first sample text, the gates, why some failed, the notes, the verdict and the path of the page."""
    runtimes = {a["path"]: f"{a['format']}:{a['encoding']} in {a['runtime']}" for a in report["artifacts"]}
    for sample in report["samples"][:1]:
        console.print(f"\n{sample['prompt']} ...", style="bold", highlight=False, markup=False)
        for output in sample["outputs"]:
            text = " ".join(output["text"].split())
            console.print(f"  {runtimes.get(output['who'], output['who'])}: {text}", highlight=False, markup=False,
                          soft_wrap=True)
    console.print()
    console.print(gate_table(report))
    for line in failure_lines(report):
        console.print(f"failed: {line}", style="red", highlight=False, markup=False, soft_wrap=True)
    for note in report.get("notes") or []:
        console.print(f"note: {visible(note)}", style="yellow", highlight=False, markup=False, soft_wrap=True)
    passed = all(gate["passed"] for gate in report["gates"])
    unchecked = any(row["state"] == "not checked" for target in report.get("targets", []) for row in target["rows"])
    style = "bold red" if not passed else "bold yellow" if unchecked else "bold green"
    console.print(verdict(report), style=style, soft_wrap=True, markup=False)
    console.print(f"Report: {out / 'report.html'}", highlight=False, soft_wrap=True, markup=False)


def render_report(report: Report) -> str:
    """Return one self-contained HTML page. Every text in it is escaped."""
    names = Names(report["artifacts"])
    teacher = report.get("teacher")
    state = "failed" if any(g.get("passed") is not True for g in report["gates"]) else "passed"
    return template("report.html.jinja").render(
        css=style("report.css"), report=report, verdict=verdict(report),
        state=state if report["gates"] else "unjudged", title=visible(report["student"]["name"]),
        teacher=visible(teacher["name"]) if teacher else "",
        tiles=view.tiles(report, names), models=view.models(report), shape=view.shape_rows(report),
        training=view.training_facts(report), quantization=quantization_facts(report, names),
        artifacts=view.artifact_rows(report, names), reference_top=TOP,
        targets=target_tables(report.get("targets") or [], names),
        loss_charts=charts.loss_charts(report), kl_chart=charts.kl_chart(report, names),
        size_chart=charts.size_chart(report, names), samples=view.sample_rows(report, names),
        caches=view.cache_rows(report, names), cache_advice=view.cache_advice_rows(report, names),
        notes=[visible(note) for note in report.get("notes") or []],
        fallbacks=view.fallback_groups(report, names), tokenizer=view.tokenizer_rows(report, names),
        templates=view.template_rows(report, names),
        gates=[gate_cells(gate, names) for gate in ordered_gates(report)], facts=view.build_facts(report))


def read_report(out: Path) -> Report:
    """Read out/report.json. Raises UserError if it is missing, or damaged so that it cannot be rendered."""
    file = out / REPORT
    if not file.exists():
        raise UserError(f"{out}: no {REPORT}; run lrc-edge build, export or check first")
    with damage_reported(file, "delete it, then run lrc-edge check to write it again"):
        report: Report = json.loads(file.read_text(encoding="utf-8"))
        render_report(report)
        show_verdict(report, out, Console(quiet=True))
    return report


@contextmanager
def damage_reported(file: Path, advice: str) -> Iterator[None]:
    """Raise UserError for any error in reading one of our own files: it was complete when written, so it is damaged."""
    try:
        yield
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError, OSError,
            TemplateError) as error:
        raise UserError(f"{file}: damaged ({error!r:.200}); {advice}") from error


def write_report(report: Report, out: Path) -> None:
    """Write out/report.json and out/report.html, each atomically."""
    page = render_report(report)
    write_atomically(out / REPORT, json.dumps(finite(report), indent=1, allow_nan=False) + "\n")
    write_atomically(out / "report.html", page)
