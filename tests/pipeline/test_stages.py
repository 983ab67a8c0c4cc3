"""The list of stages, and how one runs: skipped while nothing changed, run again with what changed, removed if the
plan has it no longer."""
from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tiny_models import make_tiny

from lrc_edge.console import Task
from lrc_edge.pipeline import training_stages
from lrc_edge.pipeline.plan import Plan
from lrc_edge.pipeline.stage import Build, Done, Stage, run_stages
from lrc_edge.pipeline.stages import STAGES, stages
from lrc_edge.recipe import load_recipe


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    return Plan.of_export(str(make_tiny(tmp_path_factory.mktemp("model") / "tiny")), load_recipe())


def run(plan: Plan, out: Path, *given: Stage) -> tuple[bool, list[str]]:
    """Whether no gate failed, and the lines that were printed without their times."""
    console = Console(file=io.StringIO(), width=200)
    passed = run_stages(given, Build(plan, out, console))
    return passed, [line.partition("  (")[0].strip() for line in console.file.getvalue().splitlines()]  # type: ignore


def stage(name: str = "write", result: Any = None, **options: Any) -> Stage:
    """One that writes its first input to a file."""
    inputs = options.pop("named", {"train.tokens": 1000})

    def work(build: Build, task: Task) -> Done:
        (build.out / name).write_text(str(inputs))
        return result, "written"

    return Stage(name, 1, work, lambda build: inputs, outputs=(name,), **options)


def test_a_stage_runs_once_and_again_when_a_named_input_changes(plan: Plan, tmp_path: Path) -> None:
    assert run(plan, tmp_path, stage()) == (True, ["write  written"])
    assert run(plan, tmp_path, stage()) == (True, ["write  unchanged, nothing to do"])
    changed = stage(named={"train.tokens": 2000})
    assert run(plan, tmp_path, changed) == (True, ["write  runs again: train.tokens was 1000, is 2000",
                                                   "write  written"])
    newer = replace(changed, version=2)
    assert run(plan, tmp_path, newer)[1][0] == "write  runs again: version of the stage was 1, is 2"
    (tmp_path / "write").write_text("changed by hand")
    assert run(plan, tmp_path, newer)[1] == ["write  written"]


def test_a_failed_gate_ends_the_build(plan: Plan, tmp_path: Path) -> None:
    failing, after = stage("gate", [{"passed": False}], is_gate=True), stage("after")
    assert run(plan, tmp_path, failing, after) == (False, ["gate  written"])
    assert run(plan, tmp_path, failing, after) == (False, ["gate  unchanged, nothing to do"])
    passing = stage("gate", [{"passed": True}], is_gate=True, named={"x": 1})
    assert run(plan, tmp_path, passing, after)[0] and (tmp_path / "after").exists()


def test_only_an_optional_stage_is_removed_with_the_plan_that_had_it(plan: Plan, tmp_path: Path) -> None:
    unwanted = {"wanted": lambda plan: False}
    run(plan, tmp_path, stage("kept"), stage("removed"))
    run(plan, tmp_path, stage("kept", **unwanted), stage("removed", is_optional=True, **unwanted))
    assert (tmp_path / "kept").exists() and not (tmp_path / "removed").exists()
    assert run(plan, tmp_path, stage("removed"))[1] == ["removed  written"]


def test_a_folder_with_a_stages_name_is_the_users(plan: Plan, tmp_path: Path) -> None:
    """Above all `teacher`, next to which someone may build. Only what a stage recorded, or works in, is removed."""
    for name in ("teacher", "gguf", "work"):
        (tmp_path / name).mkdir()
    unwanted = stage("gguf", is_optional=True, wanted=lambda plan: False, scratch=("work",))
    run(plan, tmp_path, unwanted, *(stage for stage in STAGES if not stage.wanted(plan)))
    assert [path.name for path in sorted(tmp_path.iterdir()) if path.is_dir()] == ["gguf", "teacher"]


def test_what_finishes_a_stage_follows_the_record(plan: Plan, tmp_path: Path) -> None:
    seen: list[bool] = []
    given = stage(finish=lambda build: seen.append(build.workspace.inputs("write") is not None))
    run(plan, tmp_path, given)
    run(plan, tmp_path, given)
    assert seen == [True, True]


def test_commands_are_selections() -> None:
    names = [stage.name for stage in STAGES]
    assert len(set(names)) == len(names)
    assert [stage.name for stage in stages(last="data")] == ["weights", "vocabulary", "data"]
    assert [stage.name for stage in stages("check", "check")] == ["check"]
    assert stages() == STAGES
    with pytest.raises(ValueError, match="chekc"):
        stages("chekc")


def test_an_export_wants_no_stage_that_trains(plan: Plan) -> None:
    wanted = [stage.name for stage in STAGES if stage.wanted(plan)]
    assert wanted == ["weights", "imatrix", "gguf", "onnx", "check"]


def test_every_part_of_the_students_shape_is_an_input_of_training(tiny_llama: Path, tmp_path: Path) -> None:
    """Or a build of another shape would take the trained tensors of this one."""
    recipe = load_recipe(None, ["student.hidden_size=32"], data={"sources": ["text.txt"]})
    build = Build(Plan.of_build(str(tiny_llama), recipe, writes=False), tmp_path / "out", Console(quiet=True))
    build.workspace.manifest["stages"] |= {key: {"outputs": {}} for key in ("data", "start")}
    inputs = training_stages.train_inputs(build)
    assert {f"student.{key}": value for key, value in build.plan.student.as_dict().items()}.items() <= inputs.items()
