"""The pipeline: data, identity check, train, fold, write, prove, report. The one module that joins the stages.

Each stage reads files and leaves files; it is skipped when its fingerprint (inputs, recipe part, version) is that of
the run that left them.
"""
from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lrc_edge.artifact import Artifact
from lrc_edge.checkpoint import DenseCheckpoint
from lrc_edge.console import Task, stage_line
from lrc_edge.machine import threads_for
from lrc_edge.pipeline import preflight
from lrc_edge.pipeline.calibrate import CalibrationStages
from lrc_edge.pipeline.device_checks import TEACHER_FILE, add_results, kept_results
from lrc_edge.pipeline.training import TrainingStages
from lrc_edge.report.report_file import REPORT, read_report, write_report
from lrc_edge.report.table import report_table
from lrc_edge.stored_reference import REFERENCE_FILE
from lrc_edge.targets.profile import all_profiles, load_profile, load_profiles
from lrc_edge.targets.proof.kv_advice import kv_cache_advice
from lrc_edge.targets.runtimes.table import is_here
from lrc_edge.workspace import replace_tree

if TYPE_CHECKING:
    from lrc_edge.targets.proof.prove import ProofText


class Pipeline(TrainingStages, CalibrationStages):
    """The methods are the stages, in their order."""

    def weights(self, model: DenseCheckpoint) -> None:
        """Read every weight of the input once: NaN or infinity found now costs no training."""
        def work(task: Task) -> tuple[Any, str]:
            weights, done = list(model.weights()), 0
            task.expect(sum(map(model.n_bytes, weights)) / 1e6, "MB")
            for weight in weights:
                task.update(weight.name, done / 1e6)
                model.tensor(weight.name)
                done += model.n_bytes(weight)
            return None, f"{model.name}: {model.shape.n_params:,} {model.shape.family} parameters, all finite"

        self._stage("weights", [self.dir.hash(file) for file in model.weight_files()], [], work)

    def export(self, student: DenseCheckpoint, on_grid: DenseCheckpoint | None) -> list[Artifact]:
        """Write every format of the recipe; one stage a family of formats. `on_grid`: what `quantize` gave."""
        wanted: dict[str, list[str]] = {}
        for format_, encoding in preflight.wanted_formats(self.recipe, student.shape.hidden_size):
            wanted.setdefault(format_, []).append(encoding)
        student_hashes = [self.dir.hash(f) for f in sorted(student.path.iterdir()) if f.is_file()]
        if self.recipe.export.bits_per_weight:
            wanted.setdefault("gguf", [])
        self.calibrate(student, student_hashes, any(self._calibrated(*entry) for entry in wanted.items()))
        for format_, encodings in wanted.items():
            self._write(format_, encodings, student, student_hashes, on_grid)
        for stale in {"gguf", "onnx"} - wanted.keys():
            self.drop(stale)
        return [Artifact.from_dict(table) for format_ in wanted for table in self.dir.result(format_)]

    def _calibrated(self, format_: str, encodings: list[str]) -> bool:
        """Whether the importance matrix changes any of these files."""
        return self.recipe.export.calibration_tokens > 0 and (format_ == "gguf" or "q4" in encodings)

    def _write(self, format_: str, encodings: list[str], student: DenseCheckpoint, student_hashes: list[str],
               on_grid: DenseCheckpoint | None) -> None:
        level = self.recipe.export.onnx_accuracy_level
        imatrix = self._imatrix_file(student) if self._calibrated(format_, encodings) else None
        mixed = self.dir.result("allocate") if format_ == "gguf" and self.recipe.export.bits_per_weight else None

        def work(task: Task) -> tuple[Any, str]:
            from lrc_edge.export.quantize.imatrix_file import read_imatrix

            importance = read_imatrix(imatrix, student) if imatrix else None
            with self.dir.partial(format_) as partial:
                if format_ == "gguf":
                    from lrc_edge.export.gguf.to_gguf import export_gguf

                    n_chunks = self.dir.result("imatrix")["rows"] if imatrix else None
                    allocation = self._allocation(student) if mixed else None
                    artifacts = export_gguf(student, partial, encodings, task, importance, n_chunks=n_chunks,
                                            on_grid=on_grid, allocation=allocation)
                else:
                    from lrc_edge.export.onnx.to_onnx import export_onnx

                    artifacts = export_onnx(student, partial, encodings, task, level, importance,
                                            on_grid=on_grid)
                replace_tree(partial, self.out / format_)
            sizes = ", ".join(f"{a.encoding} {a.bytes / 1e6:.1f} MB" for a in artifacts)
            return [a.as_dict() for a in artifacts], sizes

        inputs = [encodings, student.name, student_hashes, level if format_ == "onnx" else None,
                  self.dir.hash(imatrix) if imatrix else None, mixed, self._hashes(on_grid) if on_grid else None]
        self._stage(format_, inputs, [self.out / format_], work)

    def check(self, student: DenseCheckpoint, artifacts: list[Artifact], on_grid: DenseCheckpoint | None,
              again: bool = False) -> None:
        """Prove every artifact in its runtime. `again` proves even what is already proved."""
        if again:
            self.dir.forget("check")

        def work(task: Task) -> tuple[Any, str]:
            from lrc_edge.targets.proof.prove import prove

            teacher = self.teacher.checkpoint if self.teacher else None
            proof = prove(artifacts, self.out, student, on_grid, self.proof_text(student), self.recipe,
                          threads_for(student.shape), teacher, task)
            gates = self._gates(proof.gates)
            table = {key: value for key, value in vars(proof).items() if key != "gates"}
            return {**table, "gates": gates}, f"{sum(g['passed'] for g in gates)} of {len(gates)} gates passed"

        self._stage("check", [[a.as_dict() for a in artifacts], self._check_settings(),
                              [self._hashes(model) for model in (student, on_grid) if model]],
                    [self.out / REFERENCE_FILE], work)

    def proof_text(self, model: DenseCheckpoint) -> ProofText:
        """What the proof reads: the rows, longer ones as far as the model's context goes, and prompts."""
        from lrc_edge.targets.proof.prove import ProofText

        rows, longest = self.held_out_rows(model), model.context_length
        held_out, bos = self._held_out(model), self._bos(model)
        lengths = sorted({min(wanted or longest, longest) for wanted in self.recipe.parity.long_rows})
        return ProofText(rows, tuple(held_out.long_row(length, bos) for length in lengths if length > rows.shape[1]),
                         tuple(self._prompts(model)))

    def teacher_gguf(self) -> None:
        """The teacher in 4 bits, where a target is a machine like this one: how much faster is the student?"""
        file = self.out / TEACHER_FILE
        if self.teacher is None or not any(is_here(load_profile(name)) for name in self.recipe.export.targets):
            return
        teacher = self._teacher

        def work(task: Task) -> tuple[Any, str]:
            from lrc_edge.export.gguf.to_gguf import export_gguf

            with self.dir.partial("teacher") as partial:
                [artifact] = export_gguf(teacher, partial, ["q4_0"], task)
                file.parent.mkdir(exist_ok=True)
                (partial / Path(artifact.path).name).replace(file)
            return None, f"{teacher.name} as Q4_0 for timing, {artifact.bytes / 1e6:.1f} MB"

        self._stage("teacher", self._hashes(teacher), [file], work)

    def report(self, student: DenseCheckpoint) -> dict[str, Any]:
        """Write report.json and report.html from what the stages left, and return the report."""
        if not self._stage_work and (self.out / REPORT).exists() and (self.out / "report.html").exists():
            stage_line(self.console, "report", "unchanged, nothing to do")
            return read_report(self.out)
        table = self.report_of(self.dir.result("check"), student)
        add_results(table, kept_results(self.out, table["artifacts"]))
        write_report(table, self.out)
        return table

    def report_of(self, check: dict[str, Any], student: DenseCheckpoint) -> dict[str, Any]:
        """The report of what the check stage found, and of the stages before it."""
        table = report_table({**self.dir.manifest["stages"], "check": {"result": check}}, student,
                             self.teacher.checkpoint if self.teacher else None, self._curve())
        profiles = load_profiles(self.recipe.export.targets) or all_profiles()
        table["kv_cache_advice"] = kv_cache_advice(table["artifacts"], student.shape, profiles,
                                                   self.recipe.gates.gguf_q8_0_kl)
        return table

    def _curve(self) -> list[dict[str, Any]]:
        if "train" not in self.dir.manifest["stages"]:
            return []
        from lrc_edge.train.loop.stage import METRICS_FILE, read_metrics

        return read_metrics(self.out / "train" / METRICS_FILE)
