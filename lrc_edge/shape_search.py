"""Choose among shapes by trials. A model of the losses and mutation of the best shapes propose; trials decide.

The model is linear: every halving of an axis costs the same number of nats. It starts from what cuts cost in
benchmarks/axes.py, learns from the trials (ridge least squares, no axis gains from a cut), and so needs some dozens of
short runs, not one for every shape (compare whittle, arXiv 2510.07227).
"""
from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from lrc_edge.shape import ModelShape

# Axis -> nats per token that a halving costs after training: roughly the means of the teachers in benchmarks/axes.py
# and, for the width, sample_efficiency.py (docs/LOG.md).
COSTS = {"hidden_size": 0.07, "num_hidden_layers": 0.20, "intermediate_size": 0.08, "num_attention_heads": 0.20,
         "num_key_value_heads": 0.02}
RIDGE = 0.01  # of the model: squared noise of a trial (0.01 nats) / squared uncertainty of COSTS (0.1 nats)
NEIGHBOURS = 8  # of a good shape, among which a mutation is drawn
Trials = dict[ModelShape, float]  # shape -> its loss


def halvings(shape: ModelShape, teacher: ModelShape) -> np.ndarray:
    """Return how often each axis of the teacher is halved, (A,)."""
    return np.array([math.log2(getattr(teacher, axis) / getattr(shape, axis)) for axis in COSTS])


@dataclass
class Search:
    """Searches each bin: shapes of about the same speed or size. A trial counts for every bin."""

    teacher: ModelShape
    bins: Sequence[Sequence[ModelShape]]
    seed: int = 0
    trials: Trials = field(default_factory=dict)

    def probes(self) -> list[ModelShape]:
        """Return the first trials: for each axis, the shape of the first bin that cuts it most for what it cuts of the
        others."""
        found = []
        for axis in range(len(COSTS)):
            cuts = {shape: halvings(shape, self.teacher) for shape in self.bins[0]}
            share = {shape: cut[axis] / cut.sum() if cut.sum() else 0.0 for shape, cut in cuts.items()}
            best = max(self.bins[0], key=lambda shape: share[shape])
            if share[best] > 0:
                found.append(best)
        return list(dict.fromkeys(found))

    def predict(self) -> Callable[[ModelShape], float]:
        """Return the model: shape -> the loss that it expects; without trials, the loss above the teacher's."""
        known = np.array([[1.0, *halvings(shape, self.teacher)] for shape in self.trials]).reshape(-1, 1 + len(COSTS))
        prior = np.eye(1 + len(COSTS))[1:] * RIDGE**0.5
        costs = _non_negative(np.concatenate([known, prior]),
                              np.array([*self.trials.values(), *(RIDGE**0.5 * cost for cost in COSTS.values())]))
        return lambda shape: float(np.dot([1.0, *halvings(shape, self.teacher)], costs))

    def proposals(self, n: int) -> list[ModelShape]:
        """Return n shapes of each bin for the next trials: half those that the model expects most of, half mutations of
        the best quarter."""
        predicted, rng = self.predict(), random.Random(self.seed + len(self.trials))
        found: dict[ModelShape, None] = {}
        for shapes in self.bins:
            rest = sorted((s for s in shapes if s not in self.trials and s not in found), key=predicted)
            found |= dict.fromkeys(rest[:math.ceil(n / 2)])
            for _ in range(min(n, len(rest)) - math.ceil(n / 2)):
                found[self._mutation([s for s in rest if s not in found], self.best(shapes), rng)] = None
        return list(found)

    def _mutation(self, rest: list[ModelShape], best: list[ModelShape], rng: random.Random) -> ModelShape:
        """Return one of `rest` that is near to one of the best quarter."""
        if not best:
            return rng.choice(rest)
        parent = halvings(rng.choice(best[:math.ceil(len(best) / 4)]), self.teacher)
        rest.sort(key=lambda shape: float(np.square(halvings(shape, self.teacher) - parent).sum()))
        return rng.choice(rest[:NEIGHBOURS])

    def best(self, shapes: Sequence[ModelShape]) -> list[ModelShape]:
        """Return those of these shapes that were tried, the best first."""
        return sorted((shape for shape in shapes if shape in self.trials), key=self.trials.__getitem__)


def _non_negative(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return the least squares whose coefficients, but for the first (the constant), are not negative."""
    kept = list(range(x.shape[1]))
    while True:
        solved = np.linalg.lstsq(x[:, kept], y, rcond=None)[0]
        if len(kept) == 1 or solved[1:].min() >= 0:
            break
        kept.pop(1 + int(solved[1:].argmin()))
    found = np.zeros(x.shape[1])
    found[kept] = solved
    return found


def search(job: Search, evaluate: Callable[[list[ModelShape]], Trials], rounds: int, per_round: int) -> None:
    """Run probes, and rounds with so many trials in each bin. job.trials holds what they found."""
    job.trials |= evaluate(job.probes())
    for _ in range(rounds):
        if proposals := job.proposals(per_round):
            job.trials |= evaluate(proposals)
