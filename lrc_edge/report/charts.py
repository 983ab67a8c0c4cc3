"""The report's charts: which figures each one shows."""
from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from markupsafe import Markup

from lrc_edge.figures import figure, human_bytes, human_count, is_number, tick, visible
from lrc_edge.parity import AS_TRAINED
from lrc_edge.report.schema import ArtifactRow, ModelRow, Report
from lrc_edge.report.svg import Bar, Point, Series, bar_chart, line_chart, point_chart
from lrc_edge.report.view import Names, student_perplexity, worst_kl

# Color and radius of a format's dots. Files of the same blocks lie on the same spot, so one is larger.
_DOTS = {"gguf": ("c1", 5.5), "onnx": ("c2", 3.6)}
BINS = 120  # points of one loss curve; longer ones are averaged


def loss_charts(report: Report) -> list[dict[str, Any]]:
    """Return two charts: cross entropy on training and held-out text, and the parts of the loss."""
    training = report["student"].get("training") or {}
    curve = training.get("curve") or []
    teacher = report.get("teacher")
    held_out: Any = teacher.get("held_out") if teacher else None
    of_teacher: Any = held_out.get("loss") if held_out else None
    level = ("teacher, held-out", float(of_teacher)) if is_number(of_teacher) else None
    entropy = [_series(curve, "lm", "training (LM loss)", "c1"),
               _series(curve, "held_out_loss", "held-out", "c2", dots=True)]
    terms: dict[str, str] = training.get("terms") or {}
    parts = [_series(curve, "loss", "total", "c4 thick"),
             *(_series(curve, key, label, f"c{1 + i % 3}") for i, (key, label) in enumerate(terms.items()))]
    charts = []
    if any(s.points for s in entropy):
        charts.append({"title": "Cross entropy", "note": "nats per token", "svg": Markup(line_chart(
            "Cross entropy over training", [s for s in entropy if s.points], x_name="training tokens",
            y_name="nats per token", x_tick=lambda n: tick(human_count(n)), level=level))})
    if any(s.points for s in parts):
        charts.append({"title": "Loss and its parts", "note": "logarithmic", "svg": Markup(line_chart(
            "Parts of the training loss", [s for s in parts if s.points], x_name="training tokens", y_name="loss",
            x_tick=lambda n: tick(human_count(n)), log=True))})
    return charts


def _series(curve: list[dict[str, Any]], key: str, name: str, css: str, dots: bool = False) -> Series:
    rows = [row for row in curve if is_number(row.get(key)) and (row[key] > 0 or key == "held_out_loss")]
    points = [(float(row["tokens"]), float(row[key])) for row in rows]
    return Series(name, css, tuple(points if dots else _binned(points)), dots)


def _binned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    size = math.ceil(len(points) / BINS) or 1
    groups = (points[i:i + size] for i in range(0, len(points), size))
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]


def kl_chart(report: Report, names: Names) -> Markup | None:
    bars = []
    for a in report["artifacts"]:
        # The chart shows the KL from the student; the KL from the quantization-aware student has another limit.
        gates = [g for g in report["gates"] if g["artifact"] == a["path"] and g["metric"] == "kl_mean"
                 and g["name"] != AS_TRAINED]
        values = tuple((visible(what), m.get("kl_mean") if is_number(m.get("kl_mean")) else None)
                       for what, m in (a.get("parity") or {}).items() if m and what != AS_TRAINED)
        if values:
            limit = min((g["limit"] for g in gates if is_number(g["limit"])), default=None)
            bars.append(Bar(names(a["path"]), values, limit, any(g.get("passed") is not True for g in gates)))
    return Markup(bar_chart("Mean KL divergence of each artifact", bars, value_name="mean KL, nats per token",
                            limit_name="gate limit")) if bars else None


def size_chart(report: Report, names: Names) -> dict[str, Any] | None:
    """Return the chart of size against perplexity, or against KL if no perplexity was measured."""
    points = list(_perplexity_points(report, names))
    against = "perplexity"
    if not points:
        against = "KL"
        points = [_point(a, names, kl, f"KL {figure(kl)}") for a in report["artifacts"] if (kl := worst_kl(a))]
    if not points:
        return None
    svg = point_chart(f"Size against {against}", points, x_name="size, bytes", log_y=against == "KL",
                      y_name="perplexity" if against == "perplexity" else "mean KL, nats per token",
                      x_tick=lambda n: tick(human_bytes(n)))
    return {"against": against, "svg": Markup(svg), "with_teacher": points[-1].name == "teacher"}


def _point(artifact: ArtifactRow, names: Names, y: float, note: str, error: float = 0.0) -> Point:
    """Make the point of an artifact. The colour shows the format, so the label is the encoding only."""
    name = names(artifact["path"])
    label = name.rpartition("/")[2].removeprefix(f"{artifact['format']}:")
    css, radius = _DOTS[artifact["format"]]
    return Point(label, name, artifact["bytes"], y, css, f"{human_bytes(artifact['bytes'])}, {note}", error, radius)


def _perplexity_points(report: Report, names: Names) -> Iterable[Point]:
    perplexity = student_perplexity(report)
    if perplexity is None:
        return
    for a in report["artifacts"]:
        m = (a.get("parity") or {}).get("prefill")
        if m and is_number(m.get("ppl")):
            error = m["delta_ppl_se"] if is_number(m.get("delta_ppl_se")) else 0.0
            yield _point(a, names, m["ppl"], f"perplexity {figure(m['ppl'], 4)} ± {figure(error, 2)}", error)
    teacher = report.get("teacher")
    models: list[tuple[str, str, ModelRow, Any]] = [("student", "c4", report["student"], perplexity)]
    if teacher and is_number(teacher.get("proof_perplexity")):
        models.append(("teacher", "c3", teacher, teacher["proof_perplexity"]))
    for name, css, model, value in models:
        size = 2 * model["n_params"]
        yield Point(name, name, size, value, css, f"{human_bytes(size)} at 16 bits, perplexity {figure(value, 4)}")
