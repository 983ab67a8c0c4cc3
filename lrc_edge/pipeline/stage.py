"""A stage and its execution: it reads and writes files, and is skipped if its inputs and outputs are unchanged."""
from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.console import Console

from lrc_edge import __version__
from lrc_edge.artifact import Artifact
from lrc_edge.checkpoint import TOKENIZER_PARTS, DenseCheckpoint
from lrc_edge.console import Task, running, stage_line
from lrc_edge.corpus.held_out import HeldOut
from lrc_edge.errors import UserError
from lrc_edge.formats import KINDS
from lrc_edge.parity import Gate
from lrc_edge.pipeline import texts
from lrc_edge.pipeline.plan import Plan
from lrc_edge.workspace import Workspace, changes, digest

VOCABULARY = "vocabulary"  # folder of the teacher with the student's vocabulary, if that is smaller
STUDENT = "student"  # folder of the folded student
ON_GRID = "student-q4_0"  # folder of the student that was trained on the quantization grid
Inputs = dict[str, Any]  # by names that a person understands; anything that JSON holds
Done = tuple[Any, str]  # a stage's result, for build.json and the stages after it, and the line that it prints


class Build:
    """A plan being carried out in an output directory."""

    def __init__(self, plan: Plan, out: Path, console: Console, leads: bool = True):
        """leads: true in the main process (rank 0); other ranks write nothing to `out`."""
        self.plan, self.out, self.console, self.leads = plan, out, console, leads
        self.recipe = plan.recipe
        self.workspace = Workspace.create(out) if leads else Workspace(out)
        self.ran: list[str] = []  # stages that were not skipped

    @cached_property
    def source(self) -> DenseCheckpoint:
        """The model that the stages after `vocabulary` read: the teacher, or the model of an export."""
        given = self.plan.source.checkpoint
        return DenseCheckpoint.open(self.out / VOCABULARY, given.name) if self.plan.trims_vocabulary else given

    @property
    def teacher(self) -> DenseCheckpoint:
        """The teacher with the student's vocabulary; `plan.teacher` has its own."""
        assert self.plan.trains
        return self.source

    @cached_property
    def student(self) -> DenseCheckpoint:
        """The model that is written and verified: the folded student, or the model of an export."""
        return DenseCheckpoint.open(self.out / STUDENT) if self.plan.trains else self.plan.source.checkpoint

    @cached_property
    def student_on_grid(self) -> DenseCheckpoint | None:
        """The student that was trained on the quantization grid; None if the plan has no such phase."""
        return DenseCheckpoint.open(self.out / ON_GRID) if self.plan.trains_on_grid else None

    @cached_property
    def held_out(self) -> HeldOut:
        return texts.held_out_text(self.out, self.recipe, self.source)

    @property
    def artifacts(self) -> list[Artifact]:
        """The files that earlier stages have written."""
        return [Artifact.from_dict(table) for kind in KINDS
                if kind in self.workspace.manifest["stages"] for table in self.workspace.result(kind)]

    # -- parts of stages' inputs --

    def digest(self, model: DenseCheckpoint) -> str:
        """Return the digest of a model's config and weights."""
        return digest([self.workspace.hash(file) for file in (model.path / "config.json", *model.weight_files())])

    def digest_of_files(self, files: Iterable[Path]) -> str:
        return digest([self.workspace.hash(file) for file in files])

    def digest_of_tokenizer(self, model: DenseCheckpoint) -> str:
        return self.digest_of_files(model.path / name for name in TOKENIZER_PARTS if (model.path / name).exists())

    def digest_of_outputs(self, stage: str) -> str:
        return digest(self.workspace.output_hashes(stage))

    @property
    def check_settings(self) -> Inputs:
        return named("parity", self.recipe.parity) | named("gates", self.recipe.gates)


def named(section: str, settings: Any, leave_out: Iterable[str] = ()) -> Inputs:
    """Return a section of the recipe as stage inputs: {"train.tokens": 1000, ...}."""
    return {f"{section}.{key}": value for key, value in asdict(settings).items() if key not in leave_out}


def gate_tables(gates: list[Gate]) -> list[Any]:
    """The gates as report.json holds them."""
    return [gate.as_dict() for gate in gates]


@dataclass(frozen=True)
class Stage:
    """One step of a build.

    inputs: everything that the outputs depend on, by name.
    outputs: files or folders below the output directory that the stage writes.
    scratch: folders that it works in, which are not outputs.
    version: incremented when the stage writes different files from the same inputs.
    wanted: whether a plan includes the stage.
    is_optional: if a plan does not include the stage, outputs of an earlier run are removed.
    total: the amount of work in tokens, if known.
    is_gate: the result is a list of gates, and the build stops if one fails.
    finish: called after the outputs are recorded, also if the stage was skipped.
    """

    name: str
    version: int
    work: Callable[[Build, Task], Done]
    inputs: Callable[[Build], Inputs]
    outputs: tuple[str, ...] = ()
    scratch: tuple[str, ...] = ()
    wanted: Callable[[Plan], bool] = lambda plan: True
    total: Callable[[Build], int | None] = lambda build: None
    is_optional: bool = False
    is_gate: bool = False
    finish: Callable[[Build], None] = lambda build: None


def run_stages(stages: Iterable[Stage], build: Build) -> bool:
    """Run the stages that the plan includes and that are not done. Returns False if a gate of a stage failed."""
    for stage in stages:
        if not stage.wanted(build.plan):
            if stage.is_optional:
                _drop(stage, build)
            continue
        _run(stage, build)
        if stage.is_gate and not all(gate["passed"] for gate in build.workspace.result(stage.name)):
            return False
    return True


def _run(stage: Stage, build: Build) -> None:
    workspace, console = build.workspace, build.console
    inputs = {"version of the stage": stage.version, **stage.inputs(build)}
    if workspace.is_done(stage.name, inputs):
        stage_line(console, stage.name, "unchanged, nothing to do")
        stage.finish(build)
        return
    if not build.leads:
        stage.work(build, Task(console, stage.name, None))
        return
    if differences := changes(workspace.inputs(stage.name), inputs):
        stage_line(console, stage.name, f"runs again: {'; '.join(differences)}")
    workspace.forget(stage.name)
    started = time.monotonic()
    with running(console, stage.name, stage.total(build)) as task:
        result, line = stage.work(build, task)
    workspace.record(stage.name, inputs, [build.out / output for output in stage.outputs], result)
    build.ran.append(stage.name)
    stage.finish(build)
    stage_line(console, stage.name, line, time.monotonic() - started)


def _drop(stage: Stage, build: Build) -> None:
    """Remove what the stage wrote for an earlier recipe, which would be mistaken for this build's.

    Only what is recorded or named by the stage: a folder with the stage's name may be the user's own.
    """
    recorded = build.workspace.inputs(stage.name) is not None
    build.workspace.forget(stage.name)
    for name in (*(stage.outputs if recorded else ()), *stage.scratch):
        path = build.out / name
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def describe_job(build: Build, **facts: Any) -> None:
    """Record the recipe and the models in build.json, for commands that get only the directory."""
    build.workspace.manifest |= {"job": {"recipe": build.recipe.as_dict(), **facts}, "lrc_edge": __version__}
    build.workspace.save()


@contextmanager
def leaving_nothing_of_a_mistake(out: Path) -> Iterator[None]:
    """Remove `out` if this run created it and a mistake in the input stopped the run before any stage finished."""
    existed = out.exists()
    try:
        yield
    except UserError:
        # Hours of tokenizing, or of the teacher's own text, which can be continued.
        kept = [*out.glob("*.unfinished/state.json"), *out.glob("*.unfinished/self.jsonl")]
        if not existed and not any(file.stat().st_size for file in kept):
            shutil.rmtree(out, ignore_errors=True)
        raise
