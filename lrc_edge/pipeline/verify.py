"""`verify`: verify files that other tools made against the Hugging Face model that they were made from.

The file is not trusted: an audit compares its contents with the directory, and then the file runs.
"""
from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from lrc_edge.artifact import Artifact, sha256_of
from lrc_edge.checkpoint import DenseCheckpoint
from lrc_edge.console import running, stage_line
from lrc_edge.errors import UserError
from lrc_edge.exit_status import ExitStatus
from lrc_edge.finding import Finding, faults
from lrc_edge.formats import judged_as, onnx_format_of
from lrc_edge.inspect.files import describe_gguf
from lrc_edge.inspect.onnx_files import describe_onnx
from lrc_edge.parity import Gate
from lrc_edge.pipeline import texts
from lrc_edge.pipeline.check_stages import report_of
from lrc_edge.pipeline.plan import Plan
from lrc_edge.pipeline.stage import Build, gate_tables
from lrc_edge.recipe import Recipe
from lrc_edge.report.report_file import read_report, show_verdict, write_report
from lrc_edge.targets.proof.prove import ProofText, prove
from lrc_edge.workspace import MANIFEST


@dataclass
class Subject:
    """One file, the findings of its audit, and the artifact to run (None if the file cannot be read)."""

    path: Path
    findings: list[Finding] = field(default_factory=list)
    artifact: Artifact | None = None

    def gates(self) -> list[Gate]:
        """Return a failed gate for each fault, or one passed gate for a file without faults."""
        found = faults(self.findings)
        return [Gate(fault.name, str(self.path), "faults", 1, 0, "==", fault.text) for fault in found] or [
            Gate("description", str(self.path), "faults", 0, 0, "==")]


def verify(source: str, files: Sequence[Path], out: Path, recipe: Recipe, console: Console) -> ExitStatus:
    """Audit and run each file, and write the report. Raises UserError."""
    for file in files:
        if not file.exists():
            raise UserError(f"{file}: no such file; give a .gguf file, an .onnx file or an ONNX folder")
    if (out / MANIFEST).exists():
        raise UserError(f"{out}: holds a build, whose report would be replaced; give another --out")
    run = Build(Plan.of_export(source, recipe), out, console)
    text = texts.proof_text(run.held_out, run.recipe, run.student)
    with running(console, "audit") as task:
        subjects = []
        for file in dict.fromkeys(file.resolve() for file in files):
            task.update(str(file))
            subjects.append(_examine(file, run.student))
    n_faults = sum(len(faults(subject.findings)) for subject in subjects)
    stage_line(console, "audit", f"{len(subjects)} files against {run.student.name}: {n_faults} faults")
    report = report_of(run, _run_files(run, [s.artifact for s in subjects if s.artifact], text))
    report["gates"] = gate_tables([gate for subject in subjects for gate in subject.gates()]) + report["gates"]
    report["notes"] += [f"{subject.path.name}: {finding.text}" for subject in subjects for finding in subject.findings
                        if finding.severity == "note"]
    write_report(report, out)
    show_verdict(read_report(out), out, console)
    return ExitStatus.of_gates(report["gates"])


def _run_files(run: Build, artifacts: list[Artifact], text: ProofText) -> dict[str, Any]:
    """Run files in any folder as the check stage of a build does, and return the stage's result."""
    with running(run.console, "check") as task:
        proof = prove(artifacts, run.out, run.student, None, text, run.recipe, run.plan.threads, None, task)
    gates = gate_tables(proof.gates)
    stage_line(run.console, "check", f"{sum(gate['passed'] for gate in gates)} of {len(gates)} gates passed")
    return {**vars(proof), "gates": gates}


def _examine(file: Path, model: DenseCheckpoint) -> Subject:
    """Audit the file. An unreadable file becomes a finding, so that the other files are still verified."""
    subject = Subject(file)
    try:
        suffix = ".onnx" if file.is_dir() else file.suffix  # a folder with an ONNX model
        if suffix not in EXAMINERS:
            raise UserError(f"{file}: neither a .gguf file, nor an .onnx file or a folder with one")
        EXAMINERS[suffix](subject, model)
    except UserError as error:
        subject.findings.append(Finding("readable", str(error)))
    return subject


def _examine_gguf(subject: Subject, model: DenseCheckpoint) -> None:
    from lrc_edge.export.audit.gguf_file import audit_gguf

    subject.findings = audit_gguf(subject.path, model)
    subject.artifact = _gguf_artifact(subject.path)


def _examine_onnx(subject: Subject, model: DenseCheckpoint) -> None:
    from lrc_edge.export.audit.onnx_folder import audit_onnx, model_file

    subject.findings = audit_onnx(subject.path, model)
    subject.path = model_file(subject.path)
    subject.artifact = _onnx_artifact(subject.path)


EXAMINERS = {".gguf": _examine_gguf, ".onnx": _examine_onnx}


def _gguf_artifact(file: Path) -> Artifact:
    """Return the artifact of a GGUF; its encoding is the type of most of its bytes, not what the metadata claim."""
    found = describe_gguf(file)
    sizes: Counter[str] = Counter()
    for tensor in found["tensors"]:
        if len(tensor["shape"]) > 1:
            sizes[tensor["dtype"]] += tensor["bytes"]
    if not sizes:
        raise UserError(f"{file}: holds no matrix; give the GGUF of a model")
    types = Counter(tensor["dtype"] for tensor in found["tensors"])
    return _artifact(file, "gguf", sizes.most_common(1)[0][0].lower(), found, dict(types), [file])


def _onnx_artifact(file: Path) -> Artifact:
    found = describe_onnx(file)
    encoding = onnx_format_of(found["bits_per_weight"] or 0.0).encoding
    types = Counter(tensor["dtype"] for tensor in found["tensors"])
    data = [file.parent / name for name in found["data_files"]]
    return _artifact(file, "onnx", encoding, found, dict(types), [file, *data])


def _artifact(file: Path, format_: str, encoding: str, found: dict[str, Any], types: dict[str, int],
              parts: Sequence[Path]) -> Artifact:
    judged_as(f"{format_}:{encoding}")  # raises for a type that no gate is for
    return Artifact(path=str(file), format=format_, encoding=encoding, bytes=found["bytes"],
                    bits_per_weight=found["bits_per_weight"] or 0.0, sha256=sha256_of(*parts), fallbacks=(),
                    tensor_types=types)
