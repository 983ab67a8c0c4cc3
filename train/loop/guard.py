"""The guard: a batch whose loss is not finite, or far above its average, never changes the weights.

It decides on the device, where the optimizer's own `found_inf` skips the update, so that no step waits. The host
learns of a skipped update when it writes the next log row.
"""
from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from lrc_edge.train.losses import TERMS

WATCHED = (*(f"{name} loss" for name in TERMS), "gradient norm")
N_LOSSES = len(TERMS)
DECAY = 0.9  # of the running average that a spike is measured against
SLACK = 1.0  # a loss this little above its average is no spike: near the teacher, KL may be small and vary by factors
MOST_SKIPPED = 10  # bad batches in a row: no bad batch, but a run that has diverged


@dataclass(frozen=True)
class BadBatch:
    step: int
    term: str
    value: float
    average: float
    in_a_row: int  # bad batches up to this one without a good one between them

    def __str__(self) -> str:
        if not math.isfinite(self.value):
            return f"the {self.term} is {self.value} at step {self.step}"
        return f"the {self.term} jumped to {self.value:.4g} at step {self.step}, from about {self.average:.4g}"


class Guard:
    """Judges each step's values of WATCHED, a tensor on the device: the loss terms and the gradient's norm."""

    def __init__(self, device: torch.device, spike_factor: float):
        """A loss may be `spike_factor` times its running average, or SLACK above it. 0: any finite value passes."""
        self.spike_factor = spike_factor
        self.average = torch.zeros(len(WATCHED), device=device)
        self._seen: list[tuple[int, torch.Tensor]] = []
        self._bad_in_a_row = 0

    def judge(self, step: int, terms: torch.Tensor) -> torch.Tensor:
        """Return 1.0 (0-d) if the step's update must be skipped, else 0.0. Does not wait for the device."""
        fine = terms.isfinite().all()
        started = self.average > 0  # a term that has been 0 so far has no average to compare with
        if self.spike_factor:
            limits = torch.maximum(self.average * self.spike_factor, self.average + SLACK)
            # The gradient's norm may jump: clipping is there for that.
            fine &= ((terms <= limits) | ~started)[:N_LOSSES].all()
        self._seen.append((step, torch.cat([terms, self.average, fine[None].float()])))
        # The first value is the average; afterwards it decays. A bad batch leaves no trace in it.
        updated = torch.where(started, DECAY * self.average + (1 - DECAY) * terms, terms)
        self.average = torch.where(fine, updated, self.average)
        return 1.0 - fine.float()

    def report(self) -> tuple[list[float] | None, list[BadBatch]]:
        """Return the mean terms of the good steps since the last report, and the bad steps. Waits for the device."""
        steps = [step for step, _ in self._seen]
        rows = torch.stack([row for _, row in self._seen]).tolist() if self._seen else []
        self._seen = []
        good = [row[:len(WATCHED)] for row in rows if row[-1]]
        means = [sum(column) / len(good) for column in zip(*good, strict=True)] if good else None
        bad: list[BadBatch] = []
        for step, row in zip(steps, rows, strict=True):
            self._bad_in_a_row = 0 if row[-1] else self._bad_in_a_row + 1
            if self._bad_in_a_row:
                bad.append(self._describe(step, row))
        return means, bad

    def _describe(self, step: int, row: list[float]) -> BadBatch:
        terms, averages = row[:len(WATCHED)], row[len(WATCHED):-1]
        named = list(zip(WATCHED, terms, averages, strict=True))
        term, value, average = next((n for n in named if not math.isfinite(n[1])),
                                    max(named[:N_LOSSES], key=lambda n: n[1] / max(n[2], 1e-30)))
        return BadBatch(step, term, value, average, self._bad_in_a_row)
