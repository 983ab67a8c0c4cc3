"""`lrc-edge plan`: from a teacher, a device and a budget to the sizes of a student, as a recipe for a build."""
from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lrc_edge.console import running, stage_line
from lrc_edge.errors import UserError
from lrc_edge.exit_status import ExitStatus
from lrc_edge.figures import human_bytes, human_count
from lrc_edge.machine import threads_for
from lrc_edge.pipeline.commands import leaving_nothing_of_a_mistake
from lrc_edge.pipeline.plan import Plan
from lrc_edge.pipeline.preflight import check_sources
from lrc_edge.pipeline.stage import Build, describe_job, run_stages
from lrc_edge.pipeline.stages import stages
from lrc_edge.recipe import Recipe, to_toml
from lrc_edge.shape import ModelShape
from lrc_edge.shape_search import Search, search
from lrc_edge.targets.profile import Profile
from lrc_edge.targets.timing.anchors import anchors_of
from lrc_edge.targets.timing.measured import Measured, measured_here, runtime_here
from lrc_edge.targets.timing.price import Budget, Device, Offer, check_budget, offers
from lrc_edge.workspace import digest

RECIPE_FILE, PLAN_FILE, TRIALS_FILE = "recipe.toml", "plan.json", "trials.jsonl"


@dataclass(frozen=True)
class Effort:
    """How much is spent on trials. share: tokens of a trial, of the recipe's budget."""

    rounds: int
    per_round: int
    share: float


EFFORTS = {"none": Effort(1, 4, 0.0), "short": Effort(1, 4, 0.01), "full": Effort(3, 8, 0.01)}
LEAST_TOKENS, MOST_TOKENS = 51_200, 10_000_000  # of a trial


@dataclass(frozen=True)
class Trial:
    """A shape that was tried: its loss on held-out text in 4 bits, nats per token."""

    shape: ModelShape
    start_kl: float
    loss: float


def plan(source: str, recipe: Recipe, budget: Budget, context: int | None, effort: str, timings: Path | None, out: Path,
         console: Console, format_: str | None = None) -> ExitStatus:
    """Write RECIPE_FILE and PLAN_FILE in `out`. Raises UserError, also for a budget that no student has."""
    if effort not in EFFORTS:
        raise UserError(f"--search {effort}: need one of {', '.join(EFFORTS)}")
    job = Plan.of_build(source, _for_trials(recipe, EFFORTS[effort]), writes=False)
    if len(job.profiles) != 1:
        raise UserError("plan: give one device with --target; `lrc-edge targets` lists them")
    if budget == Budget():
        raise UserError("plan: no budget; give --tokens-per-second, --time-to-first-token, --memory or --file-size")
    check_sources(recipe)
    device = device_of(job.profiles[0], job.source.checkpoint.shape, context, timings, console, format_)
    check_budget(budget, device)
    found = offers(job.source.checkpoint.shape, device, budget)
    if found[0].shape == job.source.checkpoint.shape:
        price = found[0].price
        raise UserError(f"plan: the teacher itself is within this budget ({1000 / price.token_ms:.3g} tokens/s, "
                        f"{human_bytes(price.memory_bytes)} of memory); ask for more, or export the teacher")
    stage_line(console, "shapes", f"{len(found)} that no other within the budget exceeds in every size")
    with leaving_nothing_of_a_mistake(out):
        run = Build(job, out, console)
        describe_job(run, teacher=source)
        run_stages(stages(last="data"), run)
    trials = Trials(run, EFFORTS[effort]).of(found)
    best = trials[0]
    chosen = next(offer for offer in found if offer.shape == best.shape)
    _write(out, recipe, device, budget, found, trials, chosen)
    show(console, device, chosen, trials)
    console.print(f"\nlrc-edge build {source} --recipe {out / RECIPE_FILE} --out out", highlight=False, markup=False,
                  soft_wrap=True)
    return ExitStatus.PASSED


def budget_of(tokens_per_second: float | None, time_to_first_token: float | None, memory: float | None,
              file_size: float | None) -> Budget:
    """Return the budget of these options; memory and file size are in MB. Raises UserError."""
    given = {"tokens-per-second": tokens_per_second, "time-to-first-token": time_to_first_token, "memory": memory,
             "file-size": file_size}
    for name, value in given.items():
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"--{name} {value:g}: need a number above 0")
    return Budget(1000 / tokens_per_second if tokens_per_second else None, time_to_first_token,
                  memory * 1e6 if memory else None, file_size * 1e6 if file_size else None)


def _for_trials(recipe: Recipe, effort: Effort) -> Recipe:
    """Return the recipe with the tokens of one trial."""
    tokens = min(MOST_TOKENS, max(LEAST_TOKENS, round(effort.share * recipe.train.tokens)))
    return replace(recipe, train=replace(recipe.train, tokens=tokens, dense_share=1.0))


def device_of(profile: Profile, teacher: ModelShape, context: int | None, timings: Path | None, console: Console,
              format_: str | None = None) -> Device:
    """Return the device with a model of its speed: from `timings`, or measured if it is this machine, else none.

    format_: None: the recommended one.
    """
    format_ = profile.format_named(format_)
    context = min(context or profile.context, teacher.max_position_embeddings)
    if timings is not None:
        found = Measured.load(timings)
        if found.format != format_:
            raise UserError(f"{timings}: timings of {found.format}, the plan is for {format_}; measure that, or give "
                            f"--format {found.format}")
    elif runtime := runtime_here(profile, format_):
        with running(console, "timing") as task:
            shapes = anchors_of(teacher)
            found = measured_here(runtime, shapes, format_, context, threads_for(shapes[0]), task.update)
    else:
        stage_line(console, "timing", f"{profile.runtime_of(format_)} of {profile.name} is not timed on this machine: "
                                      "speeds are estimated from its bandwidth")
        return Device(profile, format_, context, None)
    model = found.model()
    stage_line(console, "timing", f"{len(found.timings)} timings on {found.machine}; the model is within "
                                  f"{model.worst:.0%} of them")
    return Device(profile, format_, context, model)


class Trials:
    """Evaluates shapes, each once: finished trials are kept in the build's folder."""

    def __init__(self, run: Build, effort: Effort):
        self.run, self.effort, self.file = run, effort, run.out / TRIALS_FILE
        self.tokens = run.recipe.train.tokens if effort.share else 0
        self.key = digest([self.tokens, run.recipe.train.seed, run.digest(run.teacher), run.digest_of_outputs("data")])
        self.known = {trial.shape: trial for trial in self._read()}

    def of(self, found: list[Offer]) -> list[Trial]:
        """Return the trials of a search among these shapes, the best first."""
        shapes = [offer.shape for offer in found]
        job = Search(self.run.teacher.shape, shapes, self.run.recipe.train.seed)

        def evaluate(proposed: list[ModelShape]) -> dict[ModelShape, float]:
            with running(self.run.console, "trials") as task:
                losses = {trial.shape: trial.loss for trial in self._evaluate(proposed, task.update)}
            stage_line(self.run.console, "trials", f"{len(proposed)} shapes, the best {min(losses.values()):.3f} nats "
                                                   "per token")
            return losses

        return [self.known[shape] for shape in search(job, evaluate, self.effort.rounds, self.effort.per_round)]

    def _evaluate(self, shapes: list[ModelShape], progress: Callable[[str], None]) -> list[Trial]:
        from lrc_edge.train.data.rows import PackedRows
        from lrc_edge.train.data.stage import row_length
        from lrc_edge.train.device import choose_device, choose_precision
        from lrc_edge.train.loop.stage import evaluation_rows
        from lrc_edge.train.start.layers import Layers
        from lrc_edge.train.start.stage import make_start
        from lrc_edge.train.trials import run_trials

        teacher, train, data = self.run.teacher, self.run.recipe.train, self.run.out / "data"
        device = choose_device(train.device)
        new = [shape for shape in shapes if shape not in self.known]
        starts = [make_start(Layers.of(teacher, device), shape, train, data, self.run.out,
                             partial(_after, f"start {i} of {len(new)}: ", progress)) for i, shape in enumerate(new, 1)]
        if self.tokens:
            rows = PackedRows(data, row_length(self.run.recipe, teacher))
            held_out_BL = evaluation_rows(self.run.held_out, rows.seq_len, teacher)
            losses = [trial.loss_in_4_bits for trial in run_trials(
                teacher, starts, rows, held_out_BL, self.tokens, choose_precision(train.precision, device), device,
                lambda step, steps: progress(f"step {step:,} of {steps:,}"), train.seed)]
        else:
            losses = [start.loss for start in starts]
        for shape, start, loss in zip(new, starts, losses, strict=True):
            self._keep(Trial(shape, start.kl, loss))
        return [self.known[shape] for shape in shapes]

    def _read(self) -> list[Trial]:
        lines = self.file.read_text().splitlines(keepends=True) if self.file.exists() else []
        rows = [json.loads(line) for line in lines if line.endswith("\n")]  # a killed run may leave half a line
        return [Trial(ModelShape.from_dict(row["shape"]), row["start_kl"], row["loss"]) for row in rows
                if row["key"] == self.key]

    def _keep(self, trial: Trial) -> None:
        self.known[trial.shape] = trial
        with self.file.open("a") as file:
            file.write(json.dumps({"key": self.key, **asdict(trial), "shape": trial.shape.as_dict()}) + "\n")


def _after(words: str, progress: Callable[[str], None], text: str) -> None:
    progress(words + text)


def _write(out: Path, recipe: Recipe, device: Device, budget: Budget, found: list[Offer], trials: list[Trial],
           chosen: Offer) -> None:
    sizes = {field: getattr(chosen.shape, field) for field in (
        "hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads", "num_key_value_heads")}
    (out / RECIPE_FILE).write_text(to_toml(replace(recipe, student=replace(recipe.student, **sizes))))
    by_shape = {trial.shape: trial for trial in trials}
    rows: list[dict[str, Any]] = [{"shape": offer.shape.as_dict(), "price": asdict(offer.price),
                                   "trial": None if (trial := by_shape.get(offer.shape)) is None else
                                   {"start_kl": trial.start_kl, "loss": trial.loss}} for offer in found]
    table = {"device": device.profile.name, "format": device.format, "context": device.context,
             "speed": "measured" if device.is_measured else "estimated", "budget": asdict(budget),
             "chosen": chosen.shape.as_dict(), "shapes": rows}
    (out / PLAN_FILE).write_text(json.dumps(table, indent=1) + "\n")


def show(console: Console, device: Device, chosen: Offer, trials: list[Trial]) -> None:
    """Print the trials, the best first, and the price of the chosen shape."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for header in ("width", "layers", "neurons", "heads", "parameters", "loss in 4 bits"):
        table.add_column(header, justify="right")
    for trial in trials[:10]:
        shape = trial.shape
        table.add_row(str(shape.hidden_size), str(shape.num_hidden_layers), str(shape.intermediate_size),
                      f"{shape.num_attention_heads}/{shape.num_key_value_heads}", human_count(shape.n_params),
                      f"{trial.loss:.3f}")
    console.print(table)
    price, how = chosen.price, "measured anchors" if device.is_measured else "an estimate: an upper bound on the speed"
    console.print(f"\n{1000 / price.token_ms:.3g} tokens/s with {device.context:,} tokens of context, "
                  f"{human_bytes(price.memory_bytes)} of memory, a file of {human_bytes(price.file_bytes)} ({how})",
                  highlight=False, markup=False, soft_wrap=True)
