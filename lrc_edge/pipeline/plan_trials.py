"""The trials of a plan: short training runs of candidates, each once. Finished ones are kept in the plan's folder."""
from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from lrc_edge.console import running, stage_line
from lrc_edge.figures import duration
from lrc_edge.pipeline.stage import Build
from lrc_edge.recipe import Recipe
from lrc_edge.shape import ModelShape
from lrc_edge.shape_search import COSTS, Search, search
from lrc_edge.workspace import digest

TRIALS_FILE = "trials.jsonl"
LEAST_TOKENS, MOST_TOKENS = 51_200, 10_000_000  # of a trial
START_PASSES = 12  # what a start takes besides the choice of layers, in passes of the teacher over calibration rows


@dataclass(frozen=True)
class Effort:
    """How much a search spends. share: tokens of a trial, of the recipe's."""

    rounds: int
    per_round: int
    bins: int
    share: float

    def tokens_of(self, recipe: Recipe) -> int:
        """Return the tokens of one trial."""
        return min(MOST_TOKENS, max(LEAST_TOKENS, round(self.share * recipe.train.tokens))) if self.rounds else 0

    def of(self, recipe: Recipe) -> Recipe:
        """Return the recipe of the trials."""
        return replace(recipe, train=replace(recipe.train, tokens=self.tokens_of(recipe), dense_share=1.0))


EFFORTS = {"none": Effort(0, 0, 1, 0.0), "short": Effort(1, 4, 1, 0.01), "full": Effort(3, 8, 3, 0.01)}


@dataclass(frozen=True)
class Trial:
    """A shape that was tried: its loss on held-out text in 4 bits, nats per token."""

    shape: ModelShape
    start_kl: float
    loss: float


class Trials:
    """Evaluates shapes."""

    def __init__(self, run: Build):
        from lrc_edge.train.data.rows import PackedRows
        from lrc_edge.train.data.stage import row_length
        from lrc_edge.train.device import choose_device, choose_precision
        from lrc_edge.train.loop.stage import evaluation_rows
        from lrc_edge.train.start.depth import SharedGreedy
        from lrc_edge.train.start.layers import Layers

        self.run, self.effort, self.file = run, EFFORTS[run.recipe.budget.search], run.out / TRIALS_FILE
        train = run.recipe.train
        self.device = choose_device(train.device)
        self.dtype = choose_precision(train.precision, self.device)
        self.rows = PackedRows(run.out / "data", row_length(run.recipe, run.teacher))
        self.held_out_BL = evaluation_rows(run.held_out, self.rows.seq_len, run.teacher)
        self.layers, self.choice_of_layers = Layers.of(run.teacher, self.device), SharedGreedy(0)
        self.key = digest([train.tokens, train.seed, run.digest(run.teacher), run.digest_of_outputs("data")])
        self.known = {trial.shape: trial for trial in self._read()}

    def of(self, job: Search) -> list[Trial]:
        """Return the trials of a search, the best first."""
        n_layers = min(shape.num_hidden_layers for shapes in job.bins for shape in shapes)
        self.choice_of_layers.most = self.run.teacher.shape.num_hidden_layers - n_layers
        n = len(COSTS) + self.effort.rounds * self.effort.per_round * len(job.bins)
        sizes = [shape.n_params for shapes in job.bins for shape in shapes]
        stage_line(self.run.console, "trials", f"at most {n} shapes, {self.run.recipe.train.tokens:,} tokens each: "
                                               f"about {duration(self._seconds(n, sum(sizes) / len(sizes)))}")

        def evaluate(proposed: list[ModelShape]) -> dict[ModelShape, float]:
            with running(self.run.console, "trials") as task:
                losses = {trial.shape: trial.loss for trial in self._evaluate(proposed, task.update)}
            stage_line(self.run.console, "trials", f"{len(proposed)} shapes, the best {min(losses.values()):.3f} nats "
                                                   "per token in 4 bits")
            return losses

        search(job, evaluate, self.effort.rounds, self.effort.per_round)
        return [self.known[shape] for shape in job.best(list(job.trials))]

    def _seconds(self, n: int, n_params: float) -> float:
        """Return about how long n trials take, from the time of one pass of the teacher over a few rows."""
        import torch

        from lrc_edge.train.start.depth import SCORING_TOKENS
        from lrc_edge.train.start.stage import CALIBRATION_TOKENS

        teacher, rows = self.run.teacher, 2
        model = teacher.model(self.dtype).to(self.device)  # type: ignore[arg-type]
        ids_BL = torch.stack([self.rows[i % len(self.rows)]["input_ids"] for i in range(rows)]).to(self.device)
        with torch.no_grad():
            model(input_ids=ids_BL, use_cache=False)
            started = time.monotonic()
            model(input_ids=ids_BL, use_cache=False)
        per_token = (time.monotonic() - started) / ids_BL.numel()
        layers, most = teacher.shape.num_hidden_layers, self.choice_of_layers.most
        # A removal tries every layer that is left but the first, and runs those after it.
        passes = sum((left - 1) / 2 * left / layers for left in range(layers - most + 1, layers + 1))
        training = self.run.recipe.train.tokens * (1 + 3 * n * n_params / teacher.shape.n_params)
        return per_token * (n * START_PASSES * CALIBRATION_TOKENS + passes * SCORING_TOKENS + training)

    def _evaluate(self, shapes: list[ModelShape], progress: Callable[[str], None]) -> list[Trial]:
        from lrc_edge.train.start.build import Choices
        from lrc_edge.train.start.stage import make_start
        from lrc_edge.train.trials import run_trials

        run, train = self.run, self.run.recipe.train
        new = [shape for shape in shapes if shape not in self.known]
        choices = Choices(layers=self.choice_of_layers, seed=train.seed)
        starts = [make_start(self.layers, shape, train, run.out / "data", run.out,
                             partial(_after, f"start {i} of {len(new)}: ", progress), choices)
                  for i, shape in enumerate(new, 1)]
        losses = run_trials(run.teacher, starts, self.rows, self.held_out_BL, train.tokens, self.dtype, self.device,
                            lambda step, steps: progress(f"step {step:,} of {steps:,}"), train.seed)
        for shape, start, trial in zip(new, starts, losses, strict=True):
            self._keep(Trial(shape, start.kl, trial.loss_in_4_bits))
        return [self.known[shape] for shape in shapes]

    def _read(self) -> list[Trial]:
        lines = self.file.read_text().splitlines(keepends=True) if self.file.exists() else []
        rows = [json.loads(line) for line in lines if line.endswith("\n")]  # a killed run may leave half a line
        return [Trial(ModelShape.from_dict(row["shape"]), row["start_kl"], row["loss"]) for row in rows
                if row["key"] == self.key]

    def _keep(self, trial: Trial) -> None:
        self.known[trial.shape] = trial
        row: dict[str, Any] = {"key": self.key, **asdict(trial), "shape": trial.shape.as_dict()}
        with self.file.open("a") as file:
            file.write(json.dumps(row) + "\n")


def _after(words: str, progress: Callable[[str], None], text: str) -> None:
    progress(words + text)
