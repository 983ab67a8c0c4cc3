"""The stages that quantize and write files: imatrix, sensitivity, allocate, gguf, onnx, and the teacher's GGUF."""
from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lrc_edge.artifact import Artifact
from lrc_edge.console import Task
from lrc_edge.corpus.held_out import Calibration
from lrc_edge.pipeline import texts
from lrc_edge.pipeline.stage import Build, Done, Inputs
from lrc_edge.stored_reference import TEACHER_FILE
from lrc_edge.workspace import replace_tree

if TYPE_CHECKING:
    from lrc_edge.export.quantize.mixed_precision import Allocation

SENSITIVITY_FILE = "sensitivity/sensitivity.json"

# imatrix: how strongly each weight's inputs fire, on text that the verification does not see


def _calibration(build: Build) -> Calibration:
    return texts.calibration(build.out, build.held_out, build.recipe, build.student)


def calibration_inputs(build: Build) -> Inputs:
    return {"student": build.digest(build.student), "name of the student": build.student.name,
            **{f"calibration text: {key}": value for key, value in _calibration(build).as_dict().items()}}


def imatrix(build: Build, task: Task) -> Done:
    """Collect the importance matrix for the quantizers."""
    from lrc_edge.export.quantize.imatrix import collect
    from lrc_edge.export.quantize.imatrix_file import write_imatrix

    calibration, file = _calibration(build), _imatrix_file(build)
    with build.workspace.partial("imatrix") as partial:
        partial.mkdir()
        importance = collect(build.student, calibration.rows, task)
        n_rows, row_len = calibration.rows.shape
        write_imatrix(partial / file.name, build.student, importance, n_rows, row_len, f"sha256:{calibration.sha256}")
        replace_tree(partial, file.parent)
    line = f"importance of inputs on {calibration.rows.size:,} tokens"
    if calibration.n_left_out:
        line += f"; {calibration.n_left_out} rows left out that share text with the verification's"
    return calibration.as_dict(), line


def _imatrix_file(build: Build) -> Path:
    from lrc_edge.export.gguf.to_gguf import file_stem

    return build.out / "imatrix" / f"{file_stem(build.student)}.imatrix.gguf"


# sensitivity: the KL divergence that each type of each matrix causes


def sensitivity_inputs(build: Build) -> Inputs:
    from lrc_edge.export.quantize.sensitivity import SAMPLE

    return {**calibration_inputs(build), "importance matrix": build.digest_of_outputs("imatrix"), "sample": SAMPLE}


def sensitivity(build: Build, task: Task) -> Done:
    """Measure the KL divergence that each quantized type of each matrix causes."""
    from lrc_edge.export.quantize.imatrix_file import read_imatrix
    from lrc_edge.export.quantize.sensitivity import SAMPLE, measure

    file, student = build.out / SENSITIVITY_FILE, build.student
    rows = _calibration(build).rows[:SAMPLE[0], :SAMPLE[1]]
    with build.workspace.partial("sensitivity") as partial:
        partial.mkdir()
        costs = measure(student, rows, read_imatrix(_imatrix_file(build), student), task)
        (partial / file.name).write_text(json.dumps({"tokens": rows.size, "kl": costs}, indent=1) + "\n")
        replace_tree(partial, file.parent)
    return None, f"KL of {len(costs)} matrices in each type, on {rows.size:,} tokens"


# allocate: the type of every matrix in the file of mixed precision


def allocate_inputs(build: Build) -> Inputs:
    return {"export.bits_per_weight": build.recipe.export.bits_per_weight,
            "sensitivity": build.digest_of_outputs("sensitivity")}


def allocate(build: Build, task: Task) -> Done:
    """Choose the type of every matrix in the mixed-precision file."""
    from lrc_edge.gguf_names import gguf_name

    bits, allocation = build.recipe.export.bits_per_weight, _allocation(build)
    types = {gguf_name(weight): allocation.types[weight.name].name for weight in build.student.weights()
             if weight.name in allocation.types}
    counts = ", ".join(f"{n} x {type}" for type, n in sorted(Counter(types.values()).items()))
    return ({"bits_per_weight": bits, "predicted_kl": allocation.predicted_kl, "types": types},
            f"{bits:g} bits per weight: {counts}; predicted KL {allocation.predicted_kl:.4f}")


def _allocation(build: Build) -> Allocation:
    from lrc_edge.export.gguf.to_gguf import rope_factor_bytes
    from lrc_edge.export.quantize.mixed_precision import allocate as allocate_types

    costs = json.loads((build.out / SENSITIVITY_FILE).read_text())["kl"]
    return allocate_types(build.student.weights(), costs, build.recipe.export.bits_per_weight,
                          rope_factor_bytes(build.student))


# gguf, onnx


def _file_inputs(build: Build, kind: str) -> Inputs:
    student, on_grid = build.student, build.student_on_grid
    inputs = {"formats": build.plan.encodings(kind), "name of the student": student.name,
              "student": build.digest_of_files(sorted(f for f in student.path.iterdir() if f.is_file())),
              "student on the grid": build.digest(on_grid) if on_grid else None}
    if build.plan.calibrates(kind):
        inputs["importance matrix"] = build.digest_of_outputs("imatrix")
    return inputs


def gguf_inputs(build: Build) -> Inputs:
    mixed = {"types of the mixed precision": build.workspace.result("allocate")} if build.plan.mixes_types else {}
    return _file_inputs(build, "gguf") | mixed


def onnx_inputs(build: Build) -> Inputs:
    return _file_inputs(build, "onnx") | {"export.onnx_accuracy_level": build.recipe.export.onnx_accuracy_level}


def _importance(build: Build, kind: str) -> Any:
    from lrc_edge.export.quantize.imatrix_file import read_imatrix

    return read_imatrix(_imatrix_file(build), build.student) if build.plan.calibrates(kind) else None


def gguf(build: Build, task: Task) -> Done:
    from lrc_edge.export.gguf.to_gguf import export_gguf

    plan, importance = build.plan, _importance(build, "gguf")
    n_chunks = build.workspace.result("imatrix")["rows"] if importance else None
    allocation = _allocation(build) if plan.mixes_types else None
    with build.workspace.partial("gguf") as partial:
        artifacts = export_gguf(build.student, partial, plan.encodings("gguf"), task, importance, n_chunks=n_chunks,
                                on_grid=build.student_on_grid, allocation=allocation)
        replace_tree(partial, build.out / "gguf")
    return _written(artifacts)


def onnx(build: Build, task: Task) -> Done:
    from lrc_edge.export.onnx.to_onnx import export_onnx

    with build.workspace.partial("onnx") as partial:
        artifacts = export_onnx(build.student, partial, build.plan.encodings("onnx"), task,
                                build.recipe.export.onnx_accuracy_level, _importance(build, "onnx"),
                                on_grid=build.student_on_grid)
        replace_tree(partial, build.out / "onnx")
    return _written(artifacts)


def _written(artifacts: list[Artifact]) -> Done:
    return ([artifact.as_dict() for artifact in artifacts],
            ", ".join(f"{artifact.encoding} {artifact.bytes / 1e6:.1f} MB" for artifact in artifacts))


# teacher


def teacher_inputs(build: Build) -> Inputs:
    return {"teacher": build.digest(build.teacher)}


def teacher(build: Build, task: Task) -> Done:
    """Write the teacher in 4 bits, to compare its speed with the student's."""
    from lrc_edge.export.gguf.to_gguf import export_gguf

    file = build.out / TEACHER_FILE
    with build.workspace.partial("teacher") as partial:
        [artifact] = export_gguf(build.teacher, partial, ["q4_0"], task)
        file.parent.mkdir(exist_ok=True)
        (partial / Path(artifact.path).name).replace(file)
    return None, f"{build.teacher.name} as Q4_0 for timing, {artifact.bytes / 1e6:.1f} MB"
