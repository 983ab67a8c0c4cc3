"""The pipeline: data, identity check, train, fold, write, prove, report. The one module that joins the stages.

Each stage reads files and leaves files; it is skipped when its fingerprint (inputs, recipe part, version) is that of
the run that left them.
"""
from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lrc_edge import __version__, preflight
from lrc_edge.artifact import Artifact
from lrc_edge.build import replace_tree
from lrc_edge.checkpoint import DenseCheckpoint
from lrc_edge.console import Task, stage_line
from lrc_edge.corpus import HeldOut
from lrc_edge.errors import UserError
from lrc_edge.parity import gates_of_fold, gates_of_identity
from lrc_edge.report import write_report
from lrc_edge.report_table import processors, report_table
from lrc_edge.sources import SELF, local_files
from lrc_edge.stages import Stages

# Settings that change how training runs, not what it makes.
RUN_SETTINGS = ("device", "compile", "gradient_checkpointing", "micro_batch", "workers", "log_every", "eval_every",
                "checkpoint_every", "keep_checkpoints", "on_bad_batch", "spike_factor")


class Pipeline(Stages):
    """The methods are the stages, in their order."""

    def weights(self, model: DenseCheckpoint) -> None:
        """Read every weight of the input once: NaN or infinity found now costs no training."""
        def work(task: Task) -> tuple[Any, str]:
            for weight in model.weights():
                task.update(weight.name)
                model.tensor(weight.name)
            return None, f"{model.name}: {model.shape.n_params:,} {model.shape.family} parameters, all finite"

        self._stage("weights", [self.dir.hash(file) for file in model.weight_files()], [], work)

    # -- stages of a clone ---------------------------------------------------------------------------------------------

    @property
    def hidden_size(self) -> int:
        return preflight.student_width(self.recipe, self._teacher.shape)

    def data(self) -> None:
        from lrc_edge.train.corpus_stage import row_length, tokenize_corpus
        from lrc_edge.train.data import PackedRows
        from lrc_edge.train.token_cache import forget_key

        folder, seq_len = self.out / "data", row_length(self.recipe, self._teacher)
        corpus = self._corpus_inputs(seq_len)

        def work(task: Task) -> tuple[Any, str]:
            key = self.dir.fingerprint("data", corpus)
            told = tokenize_corpus(self._teacher, self.recipe, folder, key, task.update)
            n_tokens, held_out = PackedRows(folder, seq_len).n_tokens, HeldOut.load(folder / "held_out.npz")
            return None, f"{n_tokens:,} training tokens, {len(held_out.ids):,} held out" + f" ({told})" * bool(told)

        self._stage("data", [corpus, seq_len], [folder], work, self.recipe.train.tokens or None)
        forget_key(folder)

    def _corpus_inputs(self, seq_len: int) -> list[Any]:
        """All that the tokens depend on, so that builds with the same may share them (data.cache)."""
        d, t = self.recipe.data, self.recipe.train
        files = [[str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns] for f in local_files(d.sources)]
        # A local source is its files, however its path is written.
        sources = [[str(f.resolve()) for f in local_files([source])] or source for source in d.sources]
        sampling = [self._teacher_hashes(), seq_len, t.seed, t.precision] if SELF in d.sources else None
        return [sources, files, d.weights, d.text_field, d.messages_field, d.held_out_share, t.tokens, sampling,
                self._tokenizer_hashes(self._teacher)]

    def identity(self) -> None:
        """Before any training: a clone with P = I, folded, must be the teacher. Catches a wrong RoPE, eps or role."""
        def work(task: Task) -> tuple[Any, str]:
            from lrc_edge.targets.reference import HeldOutRows, Reference

            ids = self.held_out_rows(self._teacher)
            task.update("teacher logits")
            expected = HeldOutRows.of(Reference(self._teacher.model()), ids)
            task.update("folding P = I")
            with self.dir.partial("identity") as partial:
                folded = fold_identity(self._teacher, partial)
                metrics = expected.compare(Reference(folded.model()).prefill, self.recipe.parity.near_tie)
            gates = gates_of_identity(metrics, self.recipe.gates)
            return self._gates(gates), f"P = I folds to the teacher: max abs difference {metrics.max_abs:.1e}"

        self._stage("identity", [self._teacher_hashes(), self._check_settings(), self.dir.output_hashes("data")], [],
                    work)

    def train(self) -> None:
        from lrc_edge.train.checkpoints import claim
        from lrc_edge.train.stage import METRICS_FILE, SUMMARY_FILE, TRAINED_FILE, Plan, train

        recipe, folder = self.recipe, self.out / "train"
        plan = Plan.of(recipe, self._teacher, self.hidden_size, self.out / "data")
        settings = {k: v for k, v in asdict(recipe.train).items() if k not in RUN_SETTINGS}
        inputs = [settings, self.hidden_size, str(plan.dtype), self._teacher_hashes(), self.dir.output_hashes("data"),
                  recipe.data.isolate_documents]
        named = {**{f"train.{name}": value for name, value in settings.items()},
                 "student.hidden_size": self.hidden_size, "computed in": str(plan.dtype),
                 "data.isolate_documents": recipe.data.isolate_documents,
                 "digest of the teacher": self.dir.fingerprint("train", inputs[3])[:8],
                 "digest of the data": self.dir.fingerprint("train", inputs[4])[:8]}

        def work(task: Task) -> tuple[Any, str]:
            if self.leads:
                claim(folder, self.dir.fingerprint("train", inputs), named)
            train(self._teacher, recipe, plan, self.out / "data", folder, lambda row: _show_training(task, row))
            if not self.leads:
                return None, ""
            summary = json.loads((folder / SUMMARY_FILE).read_text())
            return summary, (f"{summary['tokens']:,} tokens on {summary['device']} in {summary['precision']}: held-out "
                             f"loss {summary['student_held_out_loss']:.3f} (teacher's "
                             f"{summary['teacher_held_out_loss']:.3f}) nats a token")

        self._stage("train", inputs, [folder / TRAINED_FILE, folder / METRICS_FILE, folder / SUMMARY_FILE], work,
                    plan.schedule.tokens)
        if self.leads:  # recorded: the trained tensors are what the checkpoints led to
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)

    def fold(self) -> None:
        from lrc_edge.export.fold import fold
        from lrc_edge.targets.reference import Reference, compare_models
        from lrc_edge.train.stage import TRAINED_FILE, load_clone

        trained, folder = self.out / "train" / TRAINED_FILE, self.out / "student"
        provenance = self._provenance()

        def work(task: Task) -> tuple[Any, str]:
            with self.dir.partial("student") as partial:
                student = fold(self._teacher, trained, partial, provenance, task.update)
                task.update("folded vs clone")
                clone = load_clone(self._teacher, self.hidden_size, trained=trained)
                metrics = compare_models(Reference(clone.student), Reference(student.model()),
                                         self.held_out_rows(self._teacher), self.recipe.parity.near_tie)
                replace_tree(partial, folder)
            return (self._gates(gates_of_fold(metrics, self.recipe.gates)),
                    f"{provenance['name']}: {student.shape.n_params:,} parameters, "
                    f"max abs difference to the clone {metrics.max_abs:.1e}")

        self._stage("fold", [provenance, self._teacher_hashes(), self._tokenizer_hashes(self._teacher),
                             self.dir.output_hashes("train"), self._check_settings()], [folder], work)

    def _provenance(self) -> dict[str, str]:
        assert self.teacher is not None
        training = self.dir.result("train")
        return {
            "name": preflight.student_name(self.recipe, self._teacher),
            # A path of this machine means nothing elsewhere, and may say what its owner would not.
            "teacher": self.teacher.source if self.teacher.revision != "local" else self._teacher.name,
            "teacher_revision": self.teacher.revision,
            "teacher_sha256": self.dir.fingerprint("fold", self._teacher_hashes()),
            "method": _method(training),
            "teacher_hidden_size": str(self._teacher.shape.hidden_size),
            "student_hidden_size": str(self.hidden_size),
            "init": training["init"],
            "training_tokens": str(training["tokens"]),
            "recipe_sha256": self.dir.fingerprint("train", [asdict(self.recipe.train), asdict(self.recipe.student)]),
            "tool": f"lrc-edge {__version__}",
        }

    # -- stages of any dense checkpoint --------------------------------------------------------------------------------

    def export(self, student: DenseCheckpoint) -> list[Artifact]:
        """Write every format of the recipe; one stage a family of formats."""
        wanted: dict[str, list[str]] = {}
        for format_, encoding in preflight.wanted_formats(self.recipe, student.shape.hidden_size):
            wanted.setdefault(format_, []).append(encoding)
        student_hashes = [self.dir.hash(f) for f in sorted(student.path.iterdir()) if f.is_file()]
        if "gguf" in wanted and self.recipe.export.calibration_tokens:
            self._importance_matrix(student, student_hashes)
        for format_, encodings in wanted.items():
            self._write(format_, encodings, student, student_hashes)
        for stale in {"gguf", "onnx"} - wanted.keys():
            self.dir.forget(stale)
            shutil.rmtree(self.out / stale, ignore_errors=True)
        return [Artifact.from_dict(table) for format_ in wanted for table in self.dir.result(format_)]

    def _importance_matrix(self, student: DenseCheckpoint, student_hashes: list[str]) -> None:
        """How strongly each weight's inputs fire, for the quantizers, on text that the proof does not see."""
        folder = self.out / "imatrix"
        rows = self._calibration_rows(student)

        def work(task: Task) -> tuple[Any, str]:
            import numpy as np

            from lrc_edge.export.imatrix import collect

            with self.dir.partial("imatrix") as partial:
                partial.mkdir()
                matrix: dict[str, Any] = collect(student, rows, task.update)
                np.savez(partial / "importance.npz", **matrix)
                replace_tree(partial, folder)
            return None, f"importance of inputs on {rows.size:,} tokens"

        self._stage("imatrix", [student_hashes, hashlib.sha256(rows.tobytes()).hexdigest()], [folder], work)

    def _calibration_rows(self, student: DenseCheckpoint) -> Any:
        """Rows of the build's training text, or of what the given text holds behind the proof's rows."""
        import numpy as np

        n_tokens, row_len = self.recipe.export.calibration_tokens, self._row_len(student)
        if (self.out / "data" / "data.json").exists():
            from lrc_edge.train.data import PackedRows

            rows = PackedRows(self.out / "data", row_len)
            ids = np.concatenate([np.zeros(0, dtype=np.int64), *(rows[i]["input_ids"].numpy() for i in
                                                                 range(min(n_tokens // row_len, len(rows))))])
        else:
            proof_rows = self.held_out_rows(student)
            ids = self._held_out(student).ids[proof_rows.size:][:n_tokens]
        if len(ids) < row_len:
            raise UserError(f"calibration: {len(ids)} tokens beside the proof's, need at least {row_len}; give more "
                            "--data or --set export.calibration_tokens=0")
        return ids[: len(ids) // row_len * row_len].reshape(-1, row_len)

    def _write(self, format_: str, encodings: list[str], student: DenseCheckpoint, student_hashes: list[str]) -> None:
        level = self.recipe.export.onnx_accuracy_level

        file = self.out / "imatrix" / "importance.npz"
        importance = file if format_ == "gguf" and self.recipe.export.calibration_tokens else None

        def work(task: Task) -> tuple[Any, str]:
            import numpy as np

            weights = dict(np.load(importance)) if importance else None
            with self.dir.partial(format_) as partial:
                if format_ == "gguf":
                    from lrc_edge.export.to_gguf import export_gguf

                    artifacts = export_gguf(student, partial, encodings, task.update, importance=weights)
                else:
                    from lrc_edge.export.to_onnx import export_onnx

                    artifacts = export_onnx(student, partial, encodings, task.update, accuracy_level=level)
                replace_tree(partial, self.out / format_)
            sizes = ", ".join(f"{a.encoding} {a.bytes / 1e6:.1f} MB" for a in artifacts)
            return [a.as_dict() for a in artifacts], sizes

        inputs = [encodings, student.name, student_hashes, level if format_ == "onnx" else None,
                  self.dir.hash(importance) if importance else None]
        self._stage(format_, inputs, [self.out / format_], work)

    def check(self, student: DenseCheckpoint, artifacts: list[Artifact], again: bool = False) -> None:
        """Prove every artifact in its runtime. `again` proves even what is already proved."""
        if again:
            self.dir.forget("check")

        def work(task: Task) -> tuple[Any, str]:
            from lrc_edge.targets.prove import prove

            teacher = self.teacher.checkpoint if self.teacher else None
            proof = prove(artifacts, self.out, student, self.held_out_rows(student), self._prompts(student),
                          self.recipe, _threads(student), teacher, task.update)
            gates = self._gates(proof.gates)
            table = {key: value for key, value in vars(proof).items() if key != "gates"}
            return {**table, "gates": gates}, f"{sum(g['passed'] for g in gates)} of {len(gates)} gates passed"

        self._stage("check", [[a.as_dict() for a in artifacts], self._check_settings(),
                              [self.dir.hash(file) for file in student.weight_files()]], [], work)

    def report(self, student: DenseCheckpoint) -> dict[str, Any]:
        """Write report.json and report.html from what the stages left, and return the report."""
        if not self._stage_work and (self.out / "report.json").exists() and (self.out / "report.html").exists():
            stage_line(self.console, "report", "unchanged, nothing to do")
            report: dict[str, Any] = json.loads((self.out / "report.json").read_text())
            return report
        table = report_table(self.dir, student, self.teacher.checkpoint if self.teacher else None, self._curve())
        write_report(table, self.out)
        return table

    def _curve(self) -> list[dict[str, Any]]:
        if "train" not in self.dir.manifest["stages"]:
            return []
        from lrc_edge.train.stage import METRICS_FILE, read_metrics

        return read_metrics(self.out / "train" / METRICS_FILE)


def _threads(model: DenseCheckpoint) -> int:
    """Below 50M parameters a token takes less time than waking a second thread (measured: 0.04 s against 0.33 s)."""
    return 1 if model.shape.n_params < 50_000_000 else processors()


def fold_identity(teacher: DenseCheckpoint, folder: Path) -> DenseCheckpoint:
    """Fold the teacher through P = I at full width: what comes out must be the teacher."""
    import torch
    from safetensors.torch import save_file

    from lrc_edge.export.fold import fold

    width = teacher.shape.hidden_size
    folder.mkdir(parents=True)
    tensors = {w.name: teacher.tensor(w.name).float() if w.role.kind == "norm" else torch.eye(width).bfloat16()
               for w in teacher.weights() if w.role.kind != "copy"}
    save_file(tensors, folder / "identity.safetensors")
    return fold(teacher, folder / "identity.safetensors", folder / "student",
                {"name": teacher.name, "teacher": teacher.name})


def _show_training(task: Task, row: dict[str, float]) -> None:
    if "loss" in row:
        parts = ", ".join(f"{name} {row[name]:.3f}" for name in ("lm", "kl", "clone") if row[name])
        task.update(f"step {row['step']:.0f}  loss {row['loss']:.3f} = {parts}  {row['tokens_per_second']:,.0f} tok/s",
                    int(row["tokens"]))


def _method(training: dict[str, Any]) -> str:
    clone, dense = "Low-Rank Clone (arXiv 2505.12781)", "dense distillation of all weights (arXiv 2609.02006)"
    first = training.get("dense_from_step", training["steps"])
    if first == training["steps"]:
        return clone
    return f"{clone} for {first} steps, then {dense} for {training['steps'] - first}" if first else dense


