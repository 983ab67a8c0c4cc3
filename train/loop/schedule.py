"""The recipe's token counts as optimizer steps, batches, phases and learning rates."""
from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from lrc_edge import recipe as recipes
from lrc_edge.errors import UserError
from lrc_edge.shape import ModelShape

MIN_BATCH, MAX_BATCH, BATCHES = 1_024, 32_768, 2_000  # default tokens of a step: budget / BATCHES, within the limits
WARMUP_STEPS = 20  # Adam's first steps move every weight by the full rate, whatever its gradient
# Constants of the default peak rate, chosen from the runs in docs/LOG.md.
NEAR_RATE, FAR_RATE = 0.16, 0.4  # rate x width: of a student that starts at NEAR_KL; at most
MAX_RATE = 1e-2  # at any width
NEAR_KL, LEAST_KL, FEW_STEPS = 0.4, 1e-3, 50


def default_rate(width: int, steps: int, batch_tokens: int, start_kl: float) -> float:
    """Return the peak learning rate of a student of this width that starts `start_kl` nats per token from its teacher.

    It falls with the width (muP for Adam, arXiv 2203.03466). A student that starts near its teacher has more to lose
    than to gain from large steps, unless there are enough steps to recover. A large batch averages out noise, so it
    allows a larger rate, but not in a run of few steps.
    """
    # The KL of a student that equals its teacher is a rounding error, of either sign.
    distance, length = max(start_kl, LEAST_KL) / NEAR_KL, steps / FEW_STEPS
    near = min(1.0, math.sqrt(distance * length))
    batch = max(1.0, min(math.sqrt(batch_tokens / MIN_BATCH), length))
    return min(MAX_RATE, min(FAR_RATE, NEAR_RATE * near * max(1.0, distance) * batch) / width)


def _warmup(share: float, steps: int) -> int:
    return math.ceil(share * steps or max(steps / 50, min(WARMUP_STEPS, steps / 5)))


@dataclass(frozen=True)
class Schedule:
    """`dense_from` is the first step (counted from 0) of the dense phase, or `steps` if there is none."""

    seq_len: int
    rows: int  # sequences of an optimizer step, over all processes and forward passes
    steps: int
    dense_from: int
    clone_warmup: int  # steps, at the beginning of the phase
    clone_rate: float  # peak
    dense_warmup: int
    dense_rate: float

    @classmethod
    def of(cls, train: recipes.Train, student: ModelShape, n_tokens: int, start_kl: float = math.inf) -> Schedule:
        """`n_tokens`: the tokens of the data, which are the budget if the recipe has none. `start_kl`: KL of the
        student from its teacher before the first step, in nats per token; default rates depend on it."""
        seq_len = min(train.seq_len, student.max_position_embeddings)
        budget = train.tokens or n_tokens
        batch_tokens = train.batch_tokens or min(MAX_BATCH, max(MIN_BATCH, budget // BATCHES))
        rows = max(1, round(batch_tokens / seq_len))
        steps = max(1, round(budget / (rows * seq_len)))
        rate = default_rate(student.hidden_size, steps, rows * seq_len, start_kl)
        return cls(seq_len, rows, steps, round(steps * (1 - train.dense_share)),
                   _warmup(train.warmup_share, steps), train.learning_rate or rate,
                   _warmup(train.dense_warmup_share, steps), train.dense_learning_rate or rate)

    @property
    def tokens_per_step(self) -> int:
        return self.seq_len * self.rows

    @property
    def tokens(self) -> int:
        return self.steps * self.tokens_per_step

    @property
    def phases(self) -> dict[str, dict[str, float]]:
        """The steps, warmup steps and peak learning rate of each phase that runs."""
        phases = {"clone": (self.dense_from, self.clone_warmup, self.clone_rate),
                  "dense": (self.steps - self.dense_from, self.dense_warmup, self.dense_rate)}
        return {name: {"steps": steps, "warmup": warmup, "learning_rate": rate}
                for name, (steps, warmup, rate) in phases.items() if steps}

    def is_dense(self, step: int) -> bool:
        return step >= self.dense_from

    def learning_rate(self, step: int) -> float:
        """Return the rate: linear warmup in each phase (each has a new optimizer), linear decay to 0 over the run."""
        begin, peak, warmup = (self.dense_from, self.dense_rate, self.dense_warmup) if self.is_dense(step) \
            else (0, self.clone_rate, self.clone_warmup)
        warm = min(1.0, (step - begin + 1) / warmup) if warmup else 1.0
        return peak * warm * (1 - step / self.steps)

    def rows_of_process(self, world: int, micro_batch: int) -> tuple[int, int]:
        """(rows of one process, rows of one forward pass): the largest divisor that is at most `micro_batch`.

        Raises UserError if the step's rows do not divide among `world` processes.
        """
        if self.rows % world:
            raise UserError(f"train.batch_tokens: a step of {self.rows} rows of {self.seq_len} does not divide among "
                            f"{world} processes; take {math.ceil(self.rows / world) * world * self.seq_len}")
        rows = self.rows // world
        return rows, next(n for n in range(min(rows, micro_batch), 0, -1) if rows % n == 0)


class RowOrder:
    """The rows that each step reads: every row once per epoch, in an order that depends on the seed.

    The order is a function of the step alone, so a run resumes at the same row on any number of processes.
    """

    def __init__(self, n_rows: int, rows_per_step: int, seed: int):
        self.n_rows, self.rows_per_step, self.seed = n_rows, rows_per_step, seed
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.long)

    def _row(self, position: int) -> int:
        epoch, offset = divmod(position, self.n_rows)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed + epoch)
            self._epoch, self._order = epoch, torch.randperm(self.n_rows, generator=generator)
        return int(self._order[offset])

    def of_step(self, step: int) -> list[int]:
        first = step * self.rows_per_step
        return [self._row(position) for position in range(first, first + self.rows_per_step)]


class ProcessBatches(torch.utils.data.Sampler[list[int]]):
    """The rows that one of `world` processes reads, one list per step: a DataLoader's batch_sampler."""

    def __init__(self, order: RowOrder, steps: range, rank: int, world: int):
        self.order, self.steps, self.rank, self.world = order, steps, rank, world

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self):  # type: ignore[no-untyped-def]
        return (self.order.of_step(step)[self.rank::self.world] for step in self.steps)
