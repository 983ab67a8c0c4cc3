"""`--target`: check the artifacts of a build in the runtimes of devices, against stored PyTorch outputs."""
from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lrc_edge.artifact import Artifact
from lrc_edge.console import Task, running
from lrc_edge.errors import UserError
from lrc_edge.exit_status import ExitStatus
from lrc_edge.figures import NONE, figure, percent, visible
from lrc_edge.formats import KINDS
from lrc_edge.machine import architecture, threads_for
from lrc_edge.parity import CHANGES
from lrc_edge.pipeline.budget_check import check_budget
from lrc_edge.recipe import recorded_recipe
from lrc_edge.report.devices import budget_text, failures, memory_text, speed_text, target_tables
from lrc_edge.report.report_file import REPORT, damage_reported, read_report, write_report
from lrc_edge.report.schema import ArtifactRow, Report
from lrc_edge.report.view import Names, gate_cells
from lrc_edge.stored_reference import REFERENCE_FILE, TEACHER_FILE, StoredReference
from lrc_edge.targets import speed
from lrc_edge.targets.devices.device_check import CheckInput, check_artifact
from lrc_edge.targets.energy import MEANING, EnergyCounter, EnergyUnavailable
from lrc_edge.targets.profile import Profile, load_profiles
from lrc_edge.targets.runtimes.table import runtimes_of
from lrc_edge.targets.runtimes.worker import WorkerFailed, ended_by_signals
from lrc_edge.workspace import MANIFEST, Workspace, write_atomically


@dataclass(frozen=True)
class BuildFacts:
    """A build directory read without PyTorch: artifacts, recipe, stored reference outputs."""

    out: Path
    artifacts: tuple[Artifact, ...]
    check_input: CheckInput
    predicted: dict[str, Any] | None  # what the student was predicted to cost, if there is a budget

    @classmethod
    def read(cls, out: Path) -> BuildFacts:
        """Read a build directory. Raises UserError if it is not one, or lacks what a check needs."""
        build = Workspace(out)
        job, stages = build.manifest.get("job"), build.manifest["stages"]
        if job is None:
            raise UserError(f"{out}: no build here (no build.json); give the --out folder of a build or an export")
        try:
            artifacts = tuple(Artifact.from_dict(table) for name in KINDS if name in stages
                              for table in stages[name]["result"])
            recipe = recorded_recipe(job["recipe"], out)
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{out / MANIFEST}: damaged ({error!r}); copy it again, or build again") from error
        reference = StoredReference.load(out / REFERENCE_FILE)
        return cls(out, artifacts, CheckInput(out, reference, recipe, threads_for(reference.shape)),
                   job.get("predicted"))

    def artifacts_for(self, profile: Profile) -> list[Artifact]:
        """Return the artifacts that the profile runs. Raises UserError if there are none, or if one is missing."""
        wanted = [a for a in self.artifacts if a.name in profile.format_names]
        if not wanted:
            raise UserError(f"{self.out}: no artifact for {profile.name}, which runs "
                            f"{', '.join(profile.format_names)}; rebuild with --target {profile.name_or_path}")
        for artifact in wanted:
            if not (self.out / artifact.path).exists():
                raise UserError(f"{self.out / artifact.path}: missing, though the build wrote it; copy it here or "
                                "build again")
        return wanted


def check_targets(out: Path, targets: Sequence[str], console: Console) -> ExitStatus:
    """Check `out` on each target, print its table, and add it to the report.

    Returns the exit status; a failed gate takes precedence over an artifact that could not be checked. Mistakes in the
    input are reported before anything runs.
    """
    if not targets:
        return ExitStatus.PASSED
    profiles, facts = load_profiles(targets), BuildFacts.read(out)
    plans = [(profile, facts.artifacts_for(profile)) for profile in profiles]
    report = read_report(out) if (out / REPORT).exists() else None
    states = set()
    for profile, artifacts in plans:
        with ended_by_signals():
            result = _check_target(facts, artifacts, profile, console)
        write_atomically(out / "check" / f"{profile.name}.json", json.dumps(result, indent=1) + "\n")
        show(result, console)
        if report is not None:  # at once: what comes next may take an hour, and be interrupted
            add_results(report, [result])
            write_report(report, out)
        states |= {row["state"] for row in result["rows"]}
    if "failed" in states:
        return ExitStatus.GATE_FAILED
    return ExitStatus.NOT_CHECKED if "not checked" in states else ExitStatus.PASSED


def _check_target(facts: BuildFacts, artifacts: list[Artifact], profile: Profile, console: Console) -> dict[str, Any]:
    with running(console, profile.name) as task:
        rows = [check_artifact(artifact, runtime, profile, facts.check_input, task.update) for artifact in artifacts
                for runtime in runtimes_of(profile) if runtime.row.reads == artifact.format]
        energy = _add_speed(facts, profile, rows, task)
        budget = _budget(facts, artifacts, profile, rows, task)
    there = {artifact.name for artifact in artifacts}
    return {"target": profile.name, "description": profile.description,
            "absent": [name for name in profile.format_names if name not in there],
            "sha256": {artifact.path: artifact.sha256 for artifact in artifacts},
            "created": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"), "machine": architecture(), "energy": energy,
            "rows": rows, "budget": budget}


def _budget(facts: BuildFacts, artifacts: list[Artifact], profile: Profile, rows: list[dict[str, Any]], task: Task
            ) -> list[dict[str, Any]]:
    """Return the rows of budget_check; none if there is no budget for this device."""
    if facts.predicted is None or facts.predicted["device"] != profile.name:
        return []
    try:
        return check_budget(facts.check_input.recipe.budget, facts.predicted, artifacts, profile, facts.check_input,
                            rows, task.update)
    except WorkerFailed as error:
        task.console.print(f"{profile.name}: the budget was not checked: {visible(str(error))}", style="yellow",
                           highlight=False, markup=False, soft_wrap=True)
        return []


def _add_speed(facts: BuildFacts, profile: Profile, rows: list[dict[str, Any]], task: Task) -> str:
    """Add tokens/s and joules per token, and their ratios to the teacher's, where this machine has the device's
    processor. Return whose energy that is, or why it is unavailable; empty if nothing was measured."""
    runtimes = {runtime.name: runtime for runtime in runtimes_of(profile) if runtime.timed}
    timed = {f"{row['artifact']} in {row['runtime']}": row for row in rows
             if row["state"] == "passed" and row["runtime"] in runtimes}
    files = {name: (runtimes[row["runtime"]].start, facts.out / row["artifact"]) for name, row in timed.items()}
    teacher = facts.out / TEACHER_FILE
    readers = [runtime for runtime in runtimes.values() if runtime.row.reads == "gguf"]
    if timed and readers and teacher.exists():
        files = {"teacher": (readers[0].start, teacher), **files}
    n_ctx = min(facts.check_input.reference.shape.max_position_embeddings, 2 * speed.DEPTH)
    prompt = facts.check_input.reference.long_prompt(n_ctx)
    energy, note = _energy_counter()
    try:
        found = speed.measure(files, prompt, n_ctx, facts.check_input.threads, task.update, energy) if timed else {}
    except (WorkerFailed, EnergyUnavailable) as error:  # no reason to lose the rows
        task.console.print(f"{profile.name}: speed was not measured: {visible(str(error))}", style="yellow",
                           highlight=False, markup=False, soft_wrap=True)
        return ""
    for name, row in timed.items():
        row["speed"] = found[name]
        for rates, teacher_rates in zip(found[name], found.get("teacher", []), strict=False):
            rates |= {f"{key}_of_teacher": rates[key] / teacher_rates[key] for key in ("prefill", "decode", "joules")
                      if rates[key] and teacher_rates[key]}
    return note if timed else ""


def _energy_counter() -> tuple[EnergyCounter | None, str]:
    """Return what to read joules from, if there is anything, and a sentence for the report."""
    try:
        return EnergyCounter.find(), MEANING
    except EnergyUnavailable as error:
        return None, f"energy is unavailable: {error}"


def kept_results(out: Path, artifacts: Sequence[ArtifactRow]) -> list[dict[str, Any]]:
    """Return earlier results whose artifacts have not changed. Raises UserError for a damaged result file."""
    now, names = {artifact["path"]: artifact["sha256"] for artifact in artifacts}, Names(artifacts)
    kept = []
    for file in sorted((out / "check").glob("*.json")):
        with damage_reported(file, "delete it, then check that target again"):
            result = json.loads(file.read_text(encoding="utf-8"))
            target_tables([result], names)
            gates = [gate for row in result["rows"] for gate in row["gates"]]
            [gate_cells(gate, names) for gate in gates]
            changed = any(gate["metric"] == CHANGES and not gate["passed"] for gate in gates)
            if result["sha256"].items() <= now.items() and not changed:
                kept.append(result)
    return kept


def add_results(report: Report, results: list[dict[str, Any]]) -> None:
    """Put the targets' results into the report, replacing older ones."""
    names = {result["target"] for result in results}
    report["targets"] = [old for old in report.get("targets", []) if old["target"] not in names] + results
    report["gates"] = [gate for gate in report["gates"] if gate.get("target") not in names]
    report["gates"] += [gate for result in results for row in result["rows"] for gate in row["gates"]]


def show(result: dict[str, Any], console: Console) -> None:
    """Print the table of one target, then the reasons for failed or unchecked rows, then the speeds."""
    console.print(f"\n{result['target']}: {result['description']}", style="bold", highlight=False, soft_wrap=True)
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("", no_wrap=True)
    table.add_column("artifact")
    for name in ("KL mean", "top-1", "token ids", "memory"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in result["rows"]:
        table.add_row(*_cells(row))
    console.print(table)
    if result["absent"]:
        console.print(f"not in this build: {', '.join(result['absent'])}", style="yellow", highlight=False,
                      soft_wrap=True)
    # What keeps one row from being checked mostly keeps others, too.
    unchecked = dict.fromkeys(row["why"] for row in result["rows"] if row["state"] == "not checked")
    for why in unchecked:
        console.print(f"not checked: {visible(why)}", style="yellow", highlight=False, markup=False, soft_wrap=True)
    for row in result["rows"]:
        for reason in failures(row):
            console.print(f"failed: {_who(row)}: {reason}", style="red", highlight=False, markup=False, soft_wrap=True)
        for rates in row.get("speed", []):
            console.print(_speed_line(row, rates), highlight=False, markup=False, soft_wrap=True)
    if result["energy"]:
        console.print(visible(result["energy"]), style="dim", highlight=False, markup=False, soft_wrap=True)
    for row in result.get("budget", []):
        console.print(f"budget: {budget_text(row)}", highlight=False, markup=False, soft_wrap=True)


def _cells(row: dict[str, Any]) -> list[Text]:
    mark = {"passed": Text("pass", "green"), "failed": Text("FAIL", "bold red")}.get(row["state"],
                                                                                     Text("not checked", "yellow"))
    wrong = row.get("token_mismatches")
    tokens = NONE if wrong is None else f"{wrong:,} wrong" if wrong else f"all {row['n_texts']:,}"
    cells = [_who(row), figure(row.get("kl_mean")), percent(row.get("top1")), tokens,
             memory_text(row)]
    return [mark, *(Text(visible(cell)) for cell in cells)]


def _who(row: dict[str, Any]) -> str:
    emulated = f", emulated {row['emulated']}" if row["emulated"] else ""
    return f"{row['format']}:{row['encoding']} in {row['runtime']}{emulated}"


def _speed_line(row: dict[str, Any], rates: dict[str, Any]) -> str:
    return f"{_who(row)}, {speed_text(rates)}"
