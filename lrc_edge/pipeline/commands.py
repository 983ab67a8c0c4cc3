"""What each command does, after the command line has been parsed: checks first, then stages, then the verdict."""
from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console

from lrc_edge.artifact import Artifact, smallest_gguf
from lrc_edge.checkpoint import DenseCheckpoint, resolve_model
from lrc_edge.errors import UserError
from lrc_edge.machine import processors
from lrc_edge.pipeline import preflight
from lrc_edge.pipeline.base import Teacher
from lrc_edge.pipeline.device_checks import check_targets
from lrc_edge.pipeline.pipeline import Pipeline
from lrc_edge.pipeline.training import ON_GRID
from lrc_edge.recipe import Recipe, recorded_recipe
from lrc_edge.report.report_file import read_report, show_verdict, write_report
from lrc_edge.workspace import MANIFEST, BuildDir


def build(source: str, out: Path, recipe: Recipe, console: Console, until: str = "report") -> bool | int:
    """The whole pipeline, or up to the stage `until` ("train", "fold"). Returns whether every gate passed; where only
    a device's runtime was missing, the exit status that says so."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        if until != "train":
            raise UserError("several processes can only train: use lrc-edge train under torchrun, then build on one")
        return _train_together(source, out, recipe, console)
    pipeline = _before_training(source, out, recipe, console, until)
    if pipeline is None:
        return False
    pipeline.train()
    if until == "train":
        return True
    pipeline.fold()
    if until == "fold":
        return all(gate["passed"] for gate in pipeline.dir.result("fold"))
    student = DenseCheckpoint.open(out / "student")
    return _prove_and_report(pipeline, student, console)


def _before_training(source: str, out: Path, recipe: Recipe, console: Console, until: str) -> Pipeline | None:
    """Checks, and the stages up to the identity gate; None where it failed."""
    teacher = Teacher.of(source)
    # A machine that only trains need not have the runtimes; what they cannot run is then found where they are.
    trains_only = until == "train" and find_spec("llama_cpp") is None
    preflight.check_build(teacher.checkpoint, recipe, out, runtimes=not trains_only)
    for warning in preflight.fit_warnings(teacher.checkpoint, recipe):
        console.print(f"warning: {warning}", style="yellow", highlight=False, markup=False, soft_wrap=True)
    with _leaving_nothing_of_a_mistake(out):
        pipeline = Pipeline(out, recipe, console, teacher)
        pipeline.describe_job(teacher=str(Path(source).resolve()) if teacher.revision == "local" else source)
        pipeline.weights(teacher.checkpoint)
        pipeline.data(teacher.checkpoint)
    pipeline.identity()
    if not all(gate["passed"] for gate in pipeline.dir.result("identity")):
        console.print("identity gate failed: this teacher's clone would not be the teacher; not trained",
                      style="red", soft_wrap=True)
        return None
    return pipeline


def _train_together(source: str, out: Path, recipe: Recipe, console: Console) -> bool:
    """As one of the processes that torchrun started: the first does what comes before training, all train."""
    from lrc_edge.train.loop.processes import join, leave
    from lrc_edge.train.loop.trainer import choose_device

    peers = join(choose_device(recipe.train.device))
    if peers.is_main_process and (recipe.train.tokens or recipe.train.batch_tokens):
        _check_rows_divide(Teacher.of(source).checkpoint, recipe, peers.num_processes)
    pipeline = _before_training(source, out, recipe, console, "train") if peers.is_main_process else None
    if peers.is_main_process and pipeline is None:
        raise UserError(f"{out}: identity gate failed; not trained")
    try:
        peers.wait_for_everyone()
    except RuntimeError as error:  # the connection broke: the first process stopped, and has said why
        raise SystemExit(2) from error
    if pipeline is None:
        pipeline = Pipeline(out, recipe, Console(quiet=True), Teacher.of(source), leads=False)
    pipeline.train()
    leave(peers)
    return True


def _check_rows_divide(teacher: DenseCheckpoint, recipe: Recipe, world: int) -> None:
    """Known before the data is where the recipe says how much of it a step takes. Raises UserError."""
    from lrc_edge.train.loop.schedule import Schedule

    student = teacher.shape.with_hidden_size(preflight.student_width(recipe, teacher.shape))
    schedule = Schedule.of(recipe.train, student, 0)
    schedule.rows_of_process(world, recipe.train.micro_batch)


def export(source: str, out: Path, recipe: Recipe, console: Console) -> bool | int:
    """Write and prove the artifacts of any dense checkpoint of a supported family."""
    path, name, _ = resolve_model(source)
    student = DenseCheckpoint.open(path, name)
    preflight.check_export(student, recipe, out)
    if recipe.quantize.tokens and not recipe.train.tokens:  # read as much of --data as there is use for
        recipe = replace(recipe, train=replace(recipe.train, tokens=recipe.quantize.tokens))
    with _leaving_nothing_of_a_mistake(out):
        pipeline = Pipeline(out, recipe, console)
        pipeline.describe_job(student=str(path.resolve()))
        pipeline.weights(student)
        if recipe.quantize.tokens:
            pipeline.data(student)
        pipeline.held_out_rows(student)  # too little --data is said before the files are written
    return _prove_and_report(pipeline, student, console)


@contextmanager
def _leaving_nothing_of_a_mistake(out: Path) -> Iterator[None]:
    """Remove `out` again when this run made it and a mistake in the input stopped it before anything was finished."""
    existed = out.exists()
    try:
        yield
    except UserError:
        # Hours of tokenizing, or of the teacher's own text, which can go on.
        kept = [*out.glob("*.unfinished/state.json"), *out.glob("*.unfinished/self.jsonl")]
        if not existed and not any(file.stat().st_size for file in kept):
            shutil.rmtree(out, ignore_errors=True)
        raise


def _prove_and_report(pipeline: Pipeline, student: DenseCheckpoint, console: Console) -> bool | int:
    on_grid = pipeline.quantize(student)
    artifacts = pipeline.export(student, on_grid)
    pipeline.check(student, artifacts, on_grid)
    pipeline.teacher_gguf()
    pipeline.report(student)
    status = check_targets(pipeline.out, pipeline.recipe.export.targets, console)
    report = read_report(pipeline.out)
    show_verdict(report, pipeline.out, console)
    return status if all(gate["passed"] for gate in report["gates"]) else False


def _reopen(out: Path, console: Console) -> tuple[Pipeline, dict[str, Any]]:
    """A build directory as an earlier command left it, and what it is of. Raises UserError when it is none."""
    if not (out / MANIFEST).exists():
        raise UserError(f"{out}: no {MANIFEST}; give the --out directory of a build or an export")
    job: dict[str, Any] = BuildDir(out).manifest.get("job", {})
    recipe = recorded_recipe(job.get("recipe", {}), out)
    return Pipeline(out, recipe, console, Teacher.of(job["teacher"]) if "teacher" in job else None), job


def check(out: Path, console: Console) -> bool:
    """Prove the artifacts of a build again, from the files, whatever was proved before."""
    pipeline, job = _reopen(out, console)
    student = DenseCheckpoint.open(job.get("student") or out / "student")
    stages = pipeline.dir.manifest["stages"]
    artifacts = [Artifact.from_dict(t) for name in ("gguf", "onnx") if name in stages for t in stages[name]["result"]]
    if not artifacts:
        raise UserError(f"{out}: no artifacts to check; run lrc-edge build or export first")
    for artifact in artifacts:
        if not (out / artifact.path).exists():
            raise UserError(f"{out / artifact.path}: missing, though the build wrote it; run the build again")
    on_grid = DenseCheckpoint.open(out / ON_GRID) if "quantize" in stages else None
    pipeline.check(student, artifacts, on_grid, again=True)
    report = pipeline.report(student)
    show_verdict(report, out, console)
    return all(gate["passed"] for gate in report["gates"])


def fold(out: Path, console: Console) -> bool:
    """Fold what `train` left in `out`. Returns whether the fold's gates passed."""
    pipeline, _ = _reopen(out, console)
    if pipeline.teacher is None or "train" not in pipeline.dir.manifest["stages"]:
        raise UserError(f"{out}: nothing trained here to fold; run lrc-edge train or build first")
    pipeline.fold()
    return all(gate["passed"] for gate in pipeline.dir.result("fold"))


def show_report(out: Path, console: Console) -> bool:
    """Render report.html again from report.json, and print the gates."""
    report = read_report(out)
    write_report(report, out)
    show_verdict(report, out, console)
    return all(gate["passed"] for gate in report["gates"])


def chat(path: Path, encoding: str, temperature: float, max_tokens: int, console: Console) -> None:
    """A conversation on the terminal with one GGUF, until end of input."""
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
