"""Write the tables and the plot of sample_efficiency.py from its runs.jsonl."""
from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Pair = tuple[float, float]  # learning rate, alpha
Grids = Mapping[str, tuple[Sequence[float], Sequence[float]]]  # method -> the rates and the alphas that it tries
Curve = list[tuple[int, float]]  # (tokens, held-out loss)

# Start -> phase and terms -> method: what each part of the method contributes.
ATTRIBUTION = {
    "gaussian (LRC)": {"projections": "gaussian, clone", "projections, terms": "gaussian, clone, terms",
                       "weights": "gaussian, dense", "weights, terms": "gaussian, dense, terms"},
    "strongest channels (RED)": {"projections": "selection, clone", "projections, terms": "selection, clone, terms",
                                 "weights": "hard pruning + KD", "weights, terms": "selection, dense, terms"},
    "principal components": {"projections": "components, clone", "projections, terms": "components, clone, terms",
                             "weights": "SliceGPT start + KD", "weights, terms": "components, dense, terms"},
}


@dataclass(frozen=True)
class Teacher:
    name: str
    loss: float  # on the rows that judge
    n_params: int
    n_params_of: Callable[[int], int]  # student's width -> its parameters

    def line(self) -> str:
        return f"Teacher `{self.name}`: {self.n_params:,} parameters, loss {self.loss:.4f}."


@dataclass(frozen=True)
class Run:
    width: int
    method: str
    rate: float
    alpha: float
    seed: int
    tokens: int
    judged: str  # `pick`: on text that only picks the pair; `eval`: on text that picked nothing
    seconds: float  # of CPU time, without evaluations
    curve: Sequence[tuple[int, float]]  # (tokens, held-out loss)
    skipped: int

    @property
    def loss(self) -> float:
        return self.curve[-1][1]

    @property
    def key(self) -> tuple[Any, ...]:
        return self.width, self.method, self.rate, self.alpha, self.seed, self.tokens, self.judged


def read_runs(out: Path) -> list[Run]:
    file = out / "runs.jsonl"
    return [Run(**json.loads(line)) for line in file.read_text().splitlines()] if file.exists() else []


def best_pair(runs: list[Run], width: int, method: str) -> Pair:
    """Return the (rate, alpha) whose run ended at the lowest loss on the text that picks."""
    best = min((run for run in runs if (run.width, run.method, run.judged) == (width, method, "pick")),
               key=lambda run: run.loss)
    return best.rate, best.alpha


def final_runs(runs: list[Run], width: int) -> dict[str, list[Run]]:
    """Return the runs of the shortest final budget, by method."""
    judged = [run for run in runs if (run.width, run.judged) == (width, "eval")]
    shortest = min((run.tokens for run in judged), default=0)
    found: dict[str, list[Run]] = {}
    for run in judged:
        if run.tokens == shortest and (run.rate, run.alpha) == best_pair(runs, width, run.method):
            found.setdefault(run.method, []).append(run)
    return found


def leaders(runs: list[Run], width: int) -> list[str]:
    """Return the methods that have final runs, the best first."""
    found = final_runs(runs, width)
    return sorted(found, key=lambda name: statistics.fmean(run.loss for run in found[name]))


def mean_curve(runs: list[Run]) -> Curve:
    return [(points[0][0], statistics.fmean(loss for _, loss in points))
            for points in zip(*(run.curve for run in runs), strict=True)]


def at_edge(value: float, tried: Sequence[float]) -> str:
    """Say whether a better value may lie below or above those tried."""
    return {min(tried): " (lowest)", max(tried): " (highest)"}.get(value, "") if len(tried) > 1 else ""


def spread(losses: list[float]) -> str:
    return f"± {(max(losses) - min(losses)) / 2:.3f}" if len(losses) > 1 else "one seed"


def render(out: Path, grids: Grids, teacher: Teacher) -> str:
    """Write table.md and, with matplotlib, curves.png; return the tables."""
    runs = read_runs(out)
    sections = [teacher.line()]
    for width in sorted({run.width for run in runs}, reverse=True):
        finals = final_runs(runs, width)
        order = [name for name in grids if name in finals]
        sections += ["", f"### {width} wide, {megabytes(teacher.n_params_of(width)):.1f} MB in BF16", "",
                     *_losses(runs, finals, order, grids), "", *_attribution(finals), *_long(runs, width)]
    text = "\n".join(sections) + "\n"
    (out / "table.md").write_text(text)
    _plot(runs, list(grids), teacher, out / "curves.png")
    return text


def megabytes(n_params: int) -> float:
    """Return the size of a BF16 checkpoint."""
    return n_params * 2 / 1e6


def _losses(runs: list[Run], finals: dict[str, list[Run]], order: list[str], grids: Grids) -> list[str]:
    if not order:
        return ["(no final runs yet)"]
    curve = finals[order[0]][0].curve
    columns = sorted({0, len(curve) // 4, len(curve) // 2, len(curve) - 1})
    rows = ["| method | rate | alpha | settings tried | " + " | ".join(f"{curve[c][0]:,}" for c in columns)
            + " | spread | CPU s per 1,000 tokens |", "|---|---|---|---|" + "---|" * (len(columns) + 2)]
    for name in order:
        mine = finals[name]
        pair, means = (mine[0].rate, mine[0].alpha), mean_curve(mine)
        tried = sum((run.width, run.method, run.judged) == (mine[0].width, name, "pick") for run in runs)
        speed = statistics.fmean(run.seconds / run.tokens * 1000 for run in mine)
        rate, alpha = (f"{value:g}{at_edge(value, grid)}" for value, grid in zip(pair, grids[name], strict=True))
        cells = [name, rate, alpha if pair[1] else "-", str(tried),
                 *(f"{means[c][1]:.3f}" for c in columns), spread([run.loss for run in mine]), f"{speed:.2f}"]
        rows.append("| " + " | ".join(cells) + " |")
    return rows


def _attribution(finals: dict[str, list[Run]]) -> list[str]:
    """Return a table: start x (what is trained, with or without clone terms) -> final loss."""
    columns = list(next(iter(ATTRIBUTION.values())))
    rows = []
    for start, cells in ATTRIBUTION.items():
        losses = [[run.loss for run in finals.get(cells[column], [])] for column in columns]
        if any(losses):
            rows.append(f"| {start} | "
                        + " | ".join(f"{statistics.fmean(found):.3f}" if found else "" for found in losses) + " |")
    if not rows:
        return []
    return ["What each part contributes: the final loss by start (rows), by what is trained, and by clone terms:", "",
            "| start | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns), *rows]


def _long(runs: list[Run], width: int) -> list[str]:
    judged = [run for run in runs if (run.width, run.judged) == (width, "eval")]
    shortest = min((run.tokens for run in judged), default=0)
    longer = sorted((run for run in judged if run.tokens > shortest), key=lambda run: run.loss)
    if not longer:
        return []
    points = [tokens for tokens, _ in longer[0].curve]
    return ["", "The leaders with more tokens (seed 0):", "",
            "| method | rate | alpha | " + " | ".join(f"{tokens:,}" for tokens in points) + " |",
            "|---|---|---|" + "---|" * len(points),
            *(f"| {run.method} | {run.rate:g} | {run.alpha:g} | " + " | ".join(f"{loss:.3f}" for _, loss in run.curve)
              + " |" for run in longer)]


def _plot(runs: list[Run], names: list[str], teacher: Teacher, file: Path) -> None:
    """Draw held-out loss against tokens and CPU time, two panels for each width, and below against bytes."""
    try:
        from matplotlib import pyplot
    except ImportError:
        print(f"no matplotlib: {file} is not drawn")
        return
    widths = sorted({run.width for run in runs if run.judged == "eval"}, reverse=True)
    if not widths:
        return
    finals_of = {width: final_runs(runs, width) for width in widths}
    styles = {name: {"linewidth": 1.5, "color": f"C{i % 10}", "linestyle": ("-", "--", ":")[i // 10]}
              for i, name in enumerate(names)}
    n_rows = len(widths) + (len(widths) > 1)
    figure, axes = pyplot.subplots(n_rows, 2, figsize=(13, 5 * n_rows), layout="constrained", squeeze=False)
    for row, width in zip(axes, widths, strict=False):
        for name, mine in finals_of[width].items():
            curve = mean_curve(mine)
            seconds = statistics.fmean(run.seconds / run.tokens for run in mine)
            row[0].plot(*zip(*curve, strict=True), label=name, **styles[name])
            row[1].plot([tokens * seconds for tokens, _ in curve], [loss for _, loss in curve], **styles[name])
        for panel, label in zip(row, ("tokens", "CPU seconds"), strict=True):
            panel.set(xlabel=label, title=f"{width} wide")
    panels = list(axes[:len(widths)].flat)
    if len(widths) > 1:
        by_size, unused = axes[-1]
        unused.axis("off")
        for name in (name for name in names if all(name in finals_of[width] for width in widths)):
            by_size.plot([megabytes(teacher.n_params_of(width)) for width in widths],
                         [statistics.fmean(run.loss for run in finals_of[width][name]) for width in widths],
                         marker="o", **styles[name])
        by_size.plot([megabytes(teacher.n_params)], [teacher.loss], "k*", markersize=12)
        by_size.set(xlabel="MB in BF16 (star: the teacher)", title="final loss against size")
        panels.append(by_size)
    for panel in panels:
        panel.set(ylabel="held-out loss, nats per token", yscale="log")
        panel.yaxis.set_major_formatter("{x:g}")
        panel.yaxis.set_minor_formatter("{x:g}")
    handles = {label: handle for row in axes for handle, label in zip(*row[0].get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside right center", fontsize=8)
    figure.savefig(file, dpi=110)
