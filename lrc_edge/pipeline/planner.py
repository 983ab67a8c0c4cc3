"""`lrc-edge plan`: from a teacher, a device and a budget to the sizes of a student, as a recipe for a build."""
from __future__ import annotations

import json
import shlex
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lrc_edge.console import running, stage_line
from lrc_edge.errors import UserError
from lrc_edge.exit_status import ExitStatus
from lrc_edge.figures import human_bytes, human_count
from lrc_edge.machine import threads_for
from lrc_edge.pipeline.plan import Plan
from lrc_edge.pipeline.plan_table import Choice, plan_table
from lrc_edge.pipeline.plan_trials import EFFORTS, Trial, Trials
from lrc_edge.pipeline.preflight import check_sources
from lrc_edge.pipeline.stage import Build, describe_job, leaving_nothing_of_a_mistake, run_stages
from lrc_edge.pipeline.stages import stages
from lrc_edge.recipe import Budget, Recipe, load_recipe, to_toml
from lrc_edge.report.plan_page import PAGE_FILE, PLAN_FILE, chosen_row, write_plan
from lrc_edge.report.plan_schema import PlanTable
from lrc_edge.shape import ModelShape
from lrc_edge.shape_search import COSTS, Search
from lrc_edge.targets.profile import Profile
from lrc_edge.targets.timing.anchors import anchors_of
from lrc_edge.targets.timing.measured import Measured, measured_here, runtime_here
from lrc_edge.targets.timing.price import Device, Limits, Offer, offers
from lrc_edge.workspace import digest, write_atomically

RECIPE_FILE = "recipe.toml"
BINS = (1.0, 0.8, 1.25)  # of a full search: shares of the budget


def plan(source: str, recipe: Recipe, out: Path, console: Console) -> ExitStatus:
    """Write RECIPE_FILE, plan.json and its page in `out`. Raises UserError, also for a budget that no student has."""
    if given := _sizes_given(recipe):
        raise UserError(f"plan: student.{given[0]} = {getattr(recipe.student, given[0])} is set, but a plan chooses "
                        "it; leave it out, or run `lrc-edge build` with it")
    planned(source, recipe, out, console)
    console.print(f"\n{_command(source, out)}\nPlan: {out / PAGE_FILE}", highlight=False, markup=False, soft_wrap=True)
    return ExitStatus.PASSED


def with_sizes(source: str, recipe: Recipe, out: Path, console: Console) -> tuple[Recipe, dict[str, Any] | None]:
    """Return the recipe of a build with the student's sizes, planned in `out` if there is a budget but no size; and
    what the student is predicted to cost, with which format and context on which device; None without a budget.

    Raises UserError if the given sizes exceed the budget.
    """
    if recipe.budget == Budget():
        return recipe, None
    if not _sizes_given(recipe):
        recipe = planned(source, recipe, out, console)
        table: PlanTable = json.loads((out / PLAN_FILE).read_text())
        return recipe, {"device": table["device"], "format": table["format"], "context": table["context"],
                        "price": chosen_row(table)["price"]}
    job = Plan.of_build(source, recipe, writes=False)
    device = device_of(_profile_of(job), _teacher_of(job), recipe.budget, console)
    limits, price = Limits.of(recipe.budget, device), device.price(job.student)
    if excess := limits.excess(price):
        name = max(excess, key=excess.__getitem__)
        raise UserError(f"budget: a student of these sizes is {excess[name]:.2g} times over the limit of its "
                        f"{LIMIT_NAMES[name]} on {device.profile.name}; choose smaller sizes, or leave [student] out, "
                        "and a plan chooses them")
    return recipe, {"device": device.profile.name, "format": device.format, "context": device.context,
                    "price": asdict(price)}


LIMIT_NAMES = {"token_ms": "time per token", "first_token_s": "time to the first token", "memory_bytes": "memory",
               "file_bytes": "file"}


def planned(source: str, recipe: Recipe, out: Path, console: Console) -> Recipe:
    """Return the recipe with the sizes that a plan in `out` chose. A finished plan with the same inputs is kept: its
    timings may be of another machine."""
    effort = EFFORTS[recipe.budget.search]
    job = Plan.of_build(source, effort.of(recipe), writes=False)
    timings = str(Measured.load(Path(recipe.budget.timings))) if recipe.budget.timings else ""
    key = digest([job.source.checkpoint.shape.as_dict(), recipe.as_dict(), timings])
    if (out / PLAN_FILE).exists() and json.loads((out / PLAN_FILE).read_text()).get("key") == key:
        stage_line(console, "plan", f"{out / PLAN_FILE} is of the same inputs, nothing to do")
        return load_recipe(out / RECIPE_FILE)
    teacher = _teacher_of(job)
    if effort.tokens_of(recipe):
        check_sources(recipe)
    device = device_of(_profile_of(job), teacher, recipe.budget, console)
    limits = Limits.of(recipe.budget, device)
    found = _offers(teacher, device, limits, effort.bins)
    with leaving_nothing_of_a_mistake(out):
        choice = _choose(Build(job, out, console), source, device, limits, found)
    recipe = replace(recipe, student=replace(recipe.student, **{axis: getattr(choice.chosen.shape, axis)
                                                                for axis in COSTS}))
    write_atomically(out / RECIPE_FILE, to_toml(recipe))
    write_plan(plan_table(job.source.checkpoint.name, teacher, choice, key, _command(source, out)), out)
    show(console, choice)
    return recipe


def _command(source: str, out: Path) -> str:
    return shlex.join(["lrc-edge", "build", source, "--recipe", str(out / RECIPE_FILE), "--out", "out"])


def _sizes_given(recipe: Recipe) -> list[str]:
    return [axis for axis in (*COSTS, "hops") if getattr(recipe.student, axis)]


def _profile_of(job: Plan) -> Profile:
    if len(job.profiles) != 1:
        raise UserError("budget: need one device: give it with --target; `lrc-edge targets` lists them")
    return job.profiles[0]


def _teacher_of(job: Plan) -> ModelShape:
    """Return the teacher's shape, with the student's vocabulary."""
    return job.source.checkpoint.shape.resized({"vocab_size": job.student.vocab_size})


def device_of(profile: Profile, teacher: ModelShape, budget: Budget, console: Console) -> Device:
    """Return the device with a model of its speed: from a file of timings, or measured if it is this machine, else
    none. Raises UserError."""
    format_ = profile.format_named(budget.format or None)
    context = min(budget.context or profile.context, teacher.max_position_embeddings)
    if budget.timings:
        found = Measured.load(Path(budget.timings))
        if found.format != format_:
            raise UserError(f"{budget.timings}: timings of {found.format}, the plan is for {format_}; measure that, or "
                            f"give --format {found.format}")
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
    return Device(profile, format_, context, model, found)


def _offers(teacher: ModelShape, device: Device, limits: Limits, bins: int) -> list[list[Offer]]:
    """Return the offers of each bin, those of the budget first. Raises UserError if it has none, or the teacher."""
    found = [offers(teacher, device, limits)]
    if found[0][0].shape == teacher:
        price = found[0][0].price
        raise UserError(f"plan: the teacher itself is within this budget ({1000 / price.token_ms:.3g} tokens/s, "
                        f"{human_bytes(price.memory_bytes)} of memory); ask for more, or export the teacher")
    for share in BINS[1:bins]:
        try:
            found.append([offer for offer in offers(teacher, device, limits.scaled(share)) if offer.shape != teacher])
        except UserError:  # no student is so small
            continue
    return found


def _choose(run: Build, source: str, device: Device, limits: Limits, bins: list[list[Offer]]) -> Choice:
    """Search among the offers of all bins, and return the best within the budget."""
    found = {offer.shape: offer for bin_ in bins for offer in bin_}
    job = Search(_teacher_of(run.plan), [[offer.shape for offer in bin_] for bin_ in bins], run.recipe.train.seed)
    trials: list[Trial] = []
    if run.recipe.budget.search != "none":
        describe_job(run, teacher=source)
        run_stages(stages(last="data"), run)
        trials = Trials(run).of(job)
    predicted = job.predict()
    expected = {shape: predicted(shape) for shape in found}
    fits = [shape for shape, offer in found.items() if not limits.excess(offer.price)]
    best = job.best(fits) or sorted(fits, key=expected.__getitem__)
    return Choice(device, list(found.values()), limits, expected, trials, found[best[0]], run.recipe.budget.search,
                  run.recipe.train.tokens if trials else 0)




def show(console: Console, choice: Choice) -> None:
    """Print the best shapes and the price of the chosen one."""
    tried = {trial.shape: f"{trial.loss:.3f}" for trial in choice.trials}
    best = list(tried) or sorted(choice.expected, key=choice.expected.__getitem__)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for header in ("width", "layers", "neurons", "heads", "parameters",
                   "loss in 4 bits" if tried else "expected nats above the teacher"):
        table.add_column(header, justify="right")
    for shape in best[:10]:
        table.add_row(str(shape.hidden_size), str(shape.num_hidden_layers), str(shape.intermediate_size),
                      f"{shape.num_attention_heads}/{shape.num_key_value_heads}", human_count(shape.n_params),
                      tried.get(shape, f"{choice.expected[shape]:.3f}"),
                      style="bold" if shape == choice.chosen.shape else None)
    console.print(table)
    price, device = choice.chosen.price, choice.device
    how = "measured anchors" if device.is_measured else "an estimate: an upper bound on the speed"
    console.print(f"\n{1000 / price.token_ms:.3g} tokens/s with {device.context:,} tokens of context, "
                  f"{human_bytes(price.memory_bytes)} of memory, a file of {human_bytes(price.file_bytes)} ({how})",
                  highlight=False, markup=False, soft_wrap=True)
