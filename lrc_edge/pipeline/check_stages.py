"""The stages `weights` (every weight is finite), `check` (every artifact in its runtime) and `report`."""
from __future__ import annotations

from typing import Any

from lrc_edge.console import Task, stage_line
from lrc_edge.pipeline import texts
from lrc_edge.pipeline.device_checks import add_results, kept_results
from lrc_edge.pipeline.stage import Build, Done, Inputs, gate_tables
from lrc_edge.report.report_file import REPORT, read_report, write_report
from lrc_edge.report.schema import Report
from lrc_edge.report.table import report_table
from lrc_edge.targets.profile import all_profiles
from lrc_edge.targets.proof.kv_advice import kv_cache_advice


def weights_inputs(build: Build) -> Inputs:
    model = build.plan.source.checkpoint
    return {file.name: build.workspace.hash(file) for file in model.weight_files()}


def weights(build: Build, task: Task) -> Done:
    """Read every weight of the input once, so that NaN or infinity is found before training."""
    model, done = build.plan.source.checkpoint, 0
    tensors = list(model.weights())
    task.expect(sum(map(model.n_bytes, tensors)) / 1e6, "MB")
    for weight in tensors:
        task.update(weight.name, done / 1e6)
        model.tensor(weight.name)
        done += model.n_bytes(weight)
    return None, f"{model.name}: {model.shape.n_params:,} {model.shape.family} parameters, all finite"


def check_inputs(build: Build) -> Inputs:
    on_grid = build.student_on_grid
    return {**{artifact.path: artifact.sha256 for artifact in build.artifacts}, **build.check_settings,
            "student": build.digest(build.student), "student on the grid": build.digest(on_grid) if on_grid else None}


def check(build: Build, task: Task) -> Done:
    """Compare every artifact, in its runtime, with the PyTorch student."""
    from lrc_edge.targets.proof.prove import prove

    text = texts.proof_text(build.held_out, build.recipe, build.student)
    proof = prove(build.artifacts, build.out, build.student, build.student_on_grid, text, build.recipe,
                  build.plan.threads, build.teacher if build.plan.trains else None, task)
    gates = gate_tables(proof.gates)
    table = {key: value for key, value in vars(proof).items() if key != "gates"}
    return {**table, "gates": gates}, f"{sum(gate['passed'] for gate in gates)} of {len(gates)} gates passed"


def report(build: Build) -> Report:
    """Write report.json and report.html from the results of the stages, and return the report."""
    if not build.ran and (build.out / REPORT).exists() and (build.out / "report.html").exists():
        stage_line(build.console, "report", "unchanged, nothing to do")
        return read_report(build.out)
    table = report_of(build, build.workspace.result("check"))
    add_results(table, kept_results(build.out, table["artifacts"]))
    write_report(table, build.out)
    return table


def report_of(build: Build, check: dict[str, Any]) -> Report:
    """Return the report of the check stage and of the stages before it."""
    stages = build.workspace.manifest["stages"]
    table = report_table({**stages, "check": {"result": check}}, build.student, build.plan.teacher, _curve(build))
    table["kv_cache_advice"] = kv_cache_advice(table["artifacts"], build.student.shape,
                                               build.plan.profiles or all_profiles(), build.recipe.gates.gguf_q8_0_kl)
    return table


def _curve(build: Build) -> list[dict[str, Any]]:
    """Return the rows of metrics.jsonl; empty if nothing was trained."""
    if "train" not in build.workspace.manifest["stages"]:
        return []
    from lrc_edge.train.loop.stage import METRICS_FILE, read_metrics

    return read_metrics(build.out / "train" / METRICS_FILE)
