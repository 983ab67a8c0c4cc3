"""The commands after the command line has been parsed: checks first, then stages, then the verdict."""
from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console

from lrc_edge.artifact import smallest_gguf
from lrc_edge.errors import UserError
from lrc_edge.exit_status import ExitStatus
from lrc_edge.formats import KINDS
from lrc_edge.machine import processors
from lrc_edge.pipeline import check_stages, preflight, texts
from lrc_edge.pipeline.device_checks import check_targets
from lrc_edge.pipeline.plan import Plan
from lrc_edge.pipeline.planner import with_sizes
from lrc_edge.pipeline.stage import Build, describe_job, leaving_nothing_of_a_mistake, run_stages
from lrc_edge.pipeline.stages import stages
from lrc_edge.recipe import Budget, Recipe, recorded_recipe
from lrc_edge.report.report_file import read_report, show_verdict, write_report
from lrc_edge.workspace import MANIFEST, Workspace

PLAN_FOLDER = "plan"  # of a build whose sizes a budget decides


def build(source: str, out: Path, recipe: Recipe, console: Console, only_train: bool = False) -> ExitStatus:
    """Run all stages, or only those up to `train`."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        if not only_train:
            raise UserError("several processes can only train: use lrc-edge train under torchrun, then build on one")
        return _train_together(source, out, recipe, console)
    recipe, predicted = with_sizes(source, recipe, out / PLAN_FOLDER, console)
    run = _start(source, out, recipe, console, only_train, predicted)
    if run is None:
        return ExitStatus.GATE_FAILED
    if only_train:
        run_stages(stages("train", "train"), run)
        return ExitStatus.PASSED
    return _finish(run, "train")


def _start(source: str, out: Path, recipe: Recipe, console: Console, only_train: bool,
           predicted: dict[str, Any] | None = None) -> Build | None:
    """Check everything, then run the stages before training. Returns None if the identity gate failed.

    predicted: what the student costs, if there is a budget (planner.with_sizes).
    """
    # A machine that only trains need not have the runtimes; the machine that writes the files checks the formats.
    plan = Plan.of_build(source, recipe, writes=not only_train or find_spec("llama_cpp") is not None)
    preflight.check(plan, out)
    for warning in (*preflight.fit_warnings(plan), *preflight.capacity_warning(plan)):
        console.print(f"warning: {warning}", style="yellow", highlight=False, markup=False, soft_wrap=True)
    with leaving_nothing_of_a_mistake(out):
        run = Build(plan, out, console)
        describe_job(run, teacher=_recorded_name(plan), predicted=predicted)
        run_stages(stages(last="data"), run)
    if not run_stages(stages("identity", "start"), run):
        console.print("identity gate failed: a clone of this teacher would not equal it, so nothing was trained",
                      style="red", soft_wrap=True)
        return None
    return run


def _recorded_name(plan: Plan) -> str:
    """Return the name or absolute path that finds the model again from another directory."""
    source = plan.source
    return str(source.checkpoint.path.resolve()) if source.revision == "local" else source.given


def _train_together(source: str, out: Path, recipe: Recipe, console: Console) -> ExitStatus:
    """Train as one of the processes that torchrun started; the main one also runs the stages before training."""
    from lrc_edge.train.device import choose_device
    from lrc_edge.train.loop.processes import join, leave

    if recipe.budget != Budget():
        raise UserError("several processes can only train: choose the sizes with lrc-edge plan, and train its recipe "
                        "without [budget]")
    ranks = join(choose_device(recipe.train.device))
    if ranks.is_main_process and (recipe.train.tokens or recipe.train.batch_tokens):
        _check_rows_divide(Plan.of_build(source, recipe, writes=False), ranks.num_processes)
    run = _start(source, out, recipe, console, only_train=True) if ranks.is_main_process else None
    if ranks.is_main_process and run is None:
        raise UserError(f"{out}: identity gate failed; not trained")
    try:
        ranks.wait_for_everyone()
    except RuntimeError as error:  # the connection broke: the main process stopped, and has printed why
        raise SystemExit(2) from error
    if run is None:
        run = Build(Plan.of_build(source, recipe, writes=False), out, Console(quiet=True), leads=False)
    run_stages(stages("train", "train"), run)
    leave(ranks)
    return ExitStatus.PASSED


def _check_rows_divide(plan: Plan, world: int) -> None:
    """Check, before the data is read, that the sequences of a step divide among `world` processes. Raises UserError.

    Only for a recipe that sets train.tokens or train.batch_tokens, which decide the size of a step.
    """
    from lrc_edge.train.hops import hop_settings
    from lrc_edge.train.loop.schedule import Schedule

    for shape, train in zip(plan.shapes, hop_settings(plan.recipe.train, 0, len(plan.hops)), strict=True):
        Schedule.of(train, shape, 0).rows_of_process(world, train.micro_batch)


def export(source: str, out: Path, recipe: Recipe, console: Console) -> ExitStatus:
    """Write and verify the artifacts of any dense checkpoint of a supported family."""
    plan = Plan.of_export(source, recipe)
    preflight.check(plan, out)
    with leaving_nothing_of_a_mistake(out):
        run = Build(plan, out, console)
        describe_job(run, student=str(plan.source.checkpoint.path.resolve()))
        run_stages(stages(last="data"), run)
        # Too little --data is reported before the files are written.
        texts.held_out_rows(run.held_out, plan.recipe, plan.source.checkpoint)
    return _finish(run, "quantize")


def _finish(run: Build, first: str) -> ExitStatus:
    """Run the stages from `first` on, write the report, check the devices, and print the verdict."""
    run_stages(stages(first), run)
    check_stages.report(run)
    status = check_targets(run.out, run.recipe.export.targets, run.console)
    report = read_report(run.out)
    show_verdict(report, run.out, run.console)
    return ExitStatus.of_gates(report["gates"]) or status


def _reopen(out: Path, console: Console) -> Build:
    """Open the build directory of an earlier command. Raises UserError for any other directory."""
    if not (out / MANIFEST).exists():
        raise UserError(f"{out}: no {MANIFEST}; give the --out directory of a build or an export")
    job: dict[str, Any] = Workspace(out).manifest.get("job", {})
    recipe = recorded_recipe(job.get("recipe", {}), out)
    plan = Plan.of_build(job["teacher"], recipe) if "teacher" in job else Plan.of_export(job["student"], recipe)
    return Build(plan, out, console)


def check(out: Path, console: Console) -> ExitStatus:
    """Verify the artifacts of a build again, even if they were verified before."""
    run = _reopen(out, console)
    recorded = run.workspace.manifest["stages"]
    if not recorded.keys() & set(KINDS):
        raise UserError(f"{out}: no artifacts to check; run lrc-edge build or export first")
    for artifact in run.artifacts:
        if not (out / artifact.path).exists():
            raise UserError(f"{out / artifact.path}: missing, though the build wrote it; run the build again")
    run.workspace.forget("check")
    run_stages(stages("check", "check"), run)
    report = check_stages.report(run)
    show_verdict(report, out, console)
    return ExitStatus.of_gates(report["gates"])


def fold(out: Path, console: Console) -> ExitStatus:
    """Fold the tensors that `train` wrote to `out`."""
    run = _reopen(out, console)
    if not run.plan.trains or "train" not in run.workspace.manifest["stages"]:
        raise UserError(f"{out}: nothing trained here to fold; run lrc-edge train or build first")
    run_stages(stages("fold", "fold"), run)
    return ExitStatus.of_gates(run.workspace.result("fold"))


def show_report(out: Path, console: Console) -> ExitStatus:
    """Render report.html again from report.json, and print the gates."""
    report = read_report(out)
    write_report(report, out)
    show_verdict(report, out, console)
    return ExitStatus.of_gates(report["gates"])


def chat(path: Path, encoding: str, temperature: float, max_tokens: int, console: Console) -> None:
    """Chat with one GGUF in the terminal until the end of input."""
    from lrc_edge.targets.serve.chat import Chat

    file = smallest_gguf(path, encoding)
    conversation = Chat(file, n_ctx=0, threads=processors())
    console.print(f"{file.name} on llama.cpp; Ctrl-D ends", style="dim", highlight=False)
    while True:
        try:
            text = console.input("[bold]> [/]")
        except EOFError:
            return
        if text.strip():
            for piece in conversation.reply(text, temperature, max_tokens):
                console.print(piece, end="", highlight=False, markup=False, soft_wrap=True)
            console.print()
