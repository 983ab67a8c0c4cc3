"""Choose among shapes by trials: a few cuts along one axis each, then the shapes that a model of their losses prefers.

The model is linear: every halving of an axis costs as many nats as it did in the trials so far (ridge least squares, no
axis gains from a cut). It proposes; trials decide. So the search costs some dozens of short runs, not one for every
shape (compare whittle, arXiv 2510.07227).
"""
from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from lrc_edge.shape import ModelShape

AXES = ("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads", "num_key_value_heads")
RIDGE = 0.01  # of the model, in units of squared halvings


def halvings(shape: ModelShape, teacher: ModelShape) -> np.ndarray:
    """Return how often each axis of the teacher is halved, (A,)."""
    return np.array([math.log2(getattr(teacher, axis) / getattr(shape, axis)) for axis in AXES])


@dataclass
class Search:
    """trials: shape -> its loss. Evaluate proposals, and add their losses with `add`."""

    teacher: ModelShape
    shapes: Sequence[ModelShape]  # among which to choose
    seed: int = 0
    trials: dict[ModelShape, float] = field(default_factory=dict)

    def probes(self) -> list[ModelShape]:
        """Return the first trials: for each axis, the shape that cuts it most for what it cuts of the others."""
        found = []
        for axis in range(len(AXES)):
            cuts = {shape: halvings(shape, self.teacher) for shape in self.shapes}
            share = {shape: cut[axis] / cut.sum() if cut.sum() else 0.0 for shape, cut in cuts.items()}
            best = max(self.shapes, key=lambda shape: share[shape])
            if share[best] > 0:
                found.append(best)
        return list(dict.fromkeys(found))

    def add(self, losses: dict[ModelShape, float]) -> None:
        self.trials |= losses

    def predicted(self) -> dict[ModelShape, float]:
        """Return the loss that the model expects of each shape."""
        x = np.array([[1.0, *halvings(shape, self.teacher)] for shape in self.trials])
        y = np.array(list(self.trials.values()))
        costs = _non_negative(x, y - y.min())
        return {shape: float(y.min() + np.dot([1.0, *halvings(shape, self.teacher)], costs)) for shape in self.shapes}

    def proposals(self, n: int) -> list[ModelShape]:
        """Return n shapes for the next trials: half those that the model expects most of, half drawn from the better
        half of the rest, which keeps the model honest."""
        rest = sorted((s for s in self.shapes if s not in self.trials), key=self.predicted().__getitem__)
        best, others = rest[:math.ceil(n / 2)], rest[math.ceil(n / 2):max(n, len(rest) // 2)]
        return best + random.Random(self.seed + len(self.trials)).sample(others, min(n - len(best), len(others)))

    def best(self, n: int = 1) -> list[ModelShape]:
        """Return the n shapes with the lowest losses so far, of those among which to choose."""
        return sorted((shape for shape in self.trials if shape in self.shapes), key=self.trials.__getitem__)[:n]


def _non_negative(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return ridge least squares whose coefficients, but for the first (the constant), are not negative."""
    kept = list(range(x.shape[1]))
    while True:
        part = x[:, kept]
        solved = np.linalg.solve(part.T @ part + RIDGE * np.eye(len(kept)), part.T @ y)
        if len(kept) == 1 or solved[1:].min() >= 0:
            break
        kept.pop(1 + int(solved[1:].argmin()))
    found = np.zeros(x.shape[1])
    found[kept] = solved
    return found


def search(job: Search, evaluate: Callable[[list[ModelShape]], dict[ModelShape, float]], rounds: int, per_round: int
           ) -> list[ModelShape]:
    """Run probes and rounds of trials; return all shapes that were tried, the best first."""
    job.add(evaluate(job.probes()))
    for _ in range(rounds):
        if proposals := job.proposals(per_round):
            job.add(evaluate(proposals))
    return job.best(len(job.trials))
