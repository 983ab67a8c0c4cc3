"""Write the table and the plot of sample_efficiency.py from its runs.jsonl."""
from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Run:
    method: str
    rate: float
    seed: int
    tokens: int
    seconds: float
    tokens_per_second: float
    curve: Sequence[tuple[int, float]]  # (tokens, held-out loss)
    skipped: int

    @property
    def loss(self) -> float:
        return self.curve[-1][1]


def read_runs(out: Path) -> list[Run]:
    file = out / "runs.jsonl"
    return [Run(**json.loads(line)) for line in file.read_text().splitlines()] if file.exists() else []


def best_rate(runs: list[Run], method: str) -> float:
    """Return the learning rate with which seed 0 ended at the lowest loss."""
    return min((run for run in runs if run.method == method and run.seed == 0), key=lambda run: run.loss).rate


def mean_curve(runs: list[Run]) -> list[tuple[int, float]]:
    return [(points[0][0], statistics.fmean(loss for _, loss in points))
            for points in zip(*(run.curve for run in runs), strict=True)]


def tokens_to_reach(curve: list[tuple[int, float]], loss: float) -> float | None:
    """Return where the curve first reaches `loss`, interpolated linearly; None if never."""
    for (before, high), (after, low) in zip([curve[0], *curve], curve, strict=False):
        if low <= loss:
            return after if high <= loss or high == low else before + (after - before) * (high - loss) / (high - low)
    return None


def render(out: Path, order: list[str], teacher_loss: float, what: str) -> str:
    """Write table.md and, with matplotlib, curves.png; returns the table."""
    runs = read_runs(out)
    at_best = {name: [run for run in runs if run.method == name and run.rate == best_rate(runs, name)]
               for name in order if any(run.method == name for run in runs)}
    curves = {name: mean_curve(mine) for name, mine in at_best.items()}
    text = "\n".join([f"{what}; teacher's loss {teacher_loss:.4f}; {runs[0].tokens:,} tokens a run.\n",
                      *_losses(at_best, curves), "", *_crossings(curves), ""])
    (out / "table.md").write_text(text)
    _plot(curves, teacher_loss, out / "curves.png")
    return text


def _losses(at_best: dict[str, list[Run]], curves: dict[str, list[tuple[int, float]]]) -> list[str]:
    curve = next(iter(curves.values()))
    columns = [len(curve) * k // 4 for k in range(4)] + [len(curve) - 1]
    rows = ["| method | best rate | seeds | " + " | ".join(f"{curve[c][0]:,}" for c in columns)
            + " | spread | tokens/s |", "|---|---|---|" + "---|" * (len(columns) + 2)]
    for name, runs in at_best.items():
        ends = [run.loss for run in runs]
        spread = f"± {(max(ends) - min(ends)) / 2:.3f}" if len(ends) > 1 else "one seed"
        speed = statistics.fmean(run.tokens_per_second for run in runs)
        rows.append(f"| {name} | {runs[0].rate:g} | {len(runs)} | "
                    + " | ".join(f"{curves[name][c][1]:.3f}" for c in columns) + f" | {spread} | {speed:,.0f} |")
    return rows


def _crossings(curves: dict[str, list[tuple[int, float]]]) -> list[str]:
    """Return a table: the share of the run after which a row's method reaches the final loss of a column's method."""
    rows = ["Share of its tokens that the method of the row needs to reach the final loss of the column's:", "",
            "| | " + " | ".join(curves) + " |", "|---|" + "---|" * len(curves)]
    for name, curve in curves.items():
        cells = [tokens_to_reach(curve, other[-1][1]) for other in curves.values()]
        rows.append(f"| {name} | " + " | ".join("never" if c is None else f"{c / curve[-1][0]:.2f}" for c in cells)
                    + " |")
    return rows


def _plot(curves: dict[str, list[tuple[int, float]]], teacher_loss: float, file: Path) -> None:
    try:
        from matplotlib import pyplot
    except ImportError:
        print(f"no matplotlib: {file} is not drawn")
        return
    figure, axes = pyplot.subplots(figsize=(11, 5.5), layout="constrained")
    for i, (name, curve) in enumerate(curves.items()):
        axes.plot(*zip(*curve, strict=True), label=name, linewidth=1.5, color=f"C{i % 10}", linestyle="-:"[i // 10])
    axes.axhline(teacher_loss, color="black", linestyle="--", linewidth=1, label="teacher")
    axes.set(xlabel="tokens", ylabel="held-out loss, nats a token", yscale="log", yticks=[2.5, 3, 3.5, 4, 5, 6, 7, 8])
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=9)
    figure.savefig(file, dpi=130)
