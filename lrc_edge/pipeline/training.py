"""The stages that train: data, identity check, train, fold, and the student on the grid of the 4-bit files."""
from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lrc_edge import __version__
from lrc_edge.checkpoint import DenseCheckpoint
from lrc_edge.console import Task
from lrc_edge.corpus.held_out import HeldOut
from lrc_edge.corpus.sources import SELF, local_files
from lrc_edge.lineage import Lineage
from lrc_edge.parity import gates_of_copy
from lrc_edge.pipeline import preflight
from lrc_edge.pipeline.base import Stages
from lrc_edge.workspace import replace_tree

# Settings that change how training runs, not what it makes.
RUN_SETTINGS = ("device", "compile", "gradient_checkpointing", "micro_batch", "workers", "log_every", "eval_every",
                "checkpoint_every", "keep_checkpoints", "on_bad_batch", "spike_factor")
ON_GRID = "student-q4_0"  # folder of the student that was trained on the grid of the 4-bit files


class TrainingStages(Stages):
    """A clone's from its teacher's text to the folded student; `quantize` is any dense checkpoint's."""

    @property
    def hidden_size(self) -> int:
        return preflight.student_width(self.recipe, self._teacher.shape)

    def data(self, model: DenseCheckpoint) -> None:
        """Tokenize the corpus for a model to train on: the teacher, or a finished student that goes onto a grid."""
        from lrc_edge.train.data.stage import row_length, tokenize_corpus
        from lrc_edge.train.data.token_cache import forget_key
        from lrc_edge.train.data.tokenize import PackedRows

        folder, seq_len = self.out / "data", row_length(self.recipe, model)
        corpus = self._corpus_inputs(model, seq_len)

        def work(task: Task) -> tuple[Any, str]:
            key = self.dir.fingerprint("data", corpus)
            told = tokenize_corpus(model, self.recipe, folder, key, task.update)
            n_tokens, held_out = PackedRows(folder, seq_len).n_tokens, HeldOut.load(folder / "held_out.npz")
            return None, f"{n_tokens:,} training tokens, {len(held_out.ids):,} held out" + f" ({told})" * bool(told)

        self._stage("data", [corpus, seq_len], [folder], work, self.recipe.train.tokens or None)
        forget_key(folder)

    def _corpus_inputs(self, model: DenseCheckpoint, seq_len: int) -> list[Any]:
        """All that the tokens depend on, so that builds with the same may share them (data.cache)."""
        d, t = self.recipe.data, self.recipe.train
        files = [[str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns] for f in local_files(d.sources)]
        # A local source is its files, however its path is written.
        sources = [[str(f.resolve()) for f in local_files([source])] or source for source in d.sources]
        sampling = [self._hashes(model), seq_len, t.seed, t.precision] if SELF in d.sources else None
        return [sources, files, d.weights, d.text_field, d.messages_field, d.held_out_share, t.tokens, sampling,
                self._tokenizer_hashes(model)]

    def identity(self) -> None:
        """Before any training: a clone with P = I, folded, must be the teacher. Catches a wrong RoPE, eps or role."""
        def work(task: Task) -> tuple[Any, str]:
            from lrc_edge.targets.proof.reference import HeldOutRows, Reference

            ids = self.held_out_rows(self._teacher)
            task.update("teacher logits")
            reference = Reference(self._teacher.model())
            rounding = reference.rounding(ids)
            expected = HeldOutRows.of(reference, ids, folder=self.out)
            task.update("folding P = I")
            with self.dir.partial("identity") as partial:
                folded = fold_identity(self._teacher, partial)
                metrics = expected.compare(Reference(folded.model()).prefill, self.recipe.parity.near_tie)
            gates = gates_of_copy("identity vs teacher", "teacher", metrics, self.recipe.gates, rounding)
            return self._gates(gates), f"P = I folds to the teacher: max abs difference {metrics.max_abs:.1e}"

        inputs = [self._hashes(self._teacher), self._check_settings(), self.dir.output_hashes("data")]
        self._stage("identity", inputs, [], work)

    def train(self) -> None:
        from lrc_edge.train.loop.checkpoints import claim
        from lrc_edge.train.loop.stage import METRICS_FILE, SUMMARY_FILE, TRAINED_FILE, Plan, train

        recipe, folder = self.recipe, self.out / "train"
        plan = Plan.of(recipe, self._teacher, self._teacher.shape.with_hidden_size(self.hidden_size),
                       self.out / "data")
        settings = {k: v for k, v in asdict(recipe.train).items() if k not in RUN_SETTINGS}
        inputs = [settings, self.hidden_size, str(plan.dtype), self._hashes(self._teacher),
                  self.dir.output_hashes("data"), recipe.data.isolate_documents]
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
        from lrc_edge.targets.proof.reference import Reference, compare_models
        from lrc_edge.train.loop.stage import TRAINED_FILE, load_trained

        trained, folder = self.out / "train" / TRAINED_FILE, self.out / "student"
        provenance = self._provenance()

        def work(task: Task) -> tuple[Any, str]:
            with self.dir.partial("student") as partial:
                student = fold(self._teacher, trained, partial, provenance, task.update)
                task.update("folded vs clone")
                clone = load_trained(self._teacher, trained)
                reference, rows = Reference(clone.student), self.held_out_rows(self._teacher)
                rounding = reference.rounding(rows)
                metrics = compare_models(reference, Reference(student.model()), rows, self.recipe.parity.near_tie)
                replace_tree(partial, folder)
            gates = gates_of_copy("folded vs clone", "student", metrics, self.recipe.gates, rounding)
            return (self._gates(gates),
                    f"{provenance['name']}: {student.shape.n_params:,} parameters, "
                    f"max abs difference to the clone {metrics.max_abs:.1e}")

        self._stage("fold", [provenance, self._hashes(self._teacher), self._tokenizer_hashes(self._teacher),
                             self.dir.output_hashes("train"), self._check_settings()], [folder], work)

    def _provenance(self) -> dict[str, str]:
        assert self.teacher is not None
        training = self.dir.result("train")
        return {
            "name": preflight.student_name(self.recipe, self._teacher),
            # A path of this machine means nothing elsewhere, and may say what its owner would not.
            "teacher": self.teacher.source if self.teacher.revision != "local" else self._teacher.name,
            "teacher_revision": self.teacher.revision,
            "teacher_sha256": self.dir.fingerprint("fold", self._hashes(self._teacher)),
            "method": _method(training),
            "teacher_hidden_size": str(self._teacher.shape.hidden_size),
            "student_hidden_size": str(self.hidden_size),
            "init": training["init"],
            "training_tokens": str(training["tokens"]),
            "recipe_sha256": self.dir.fingerprint("train", [asdict(self.recipe.train), asdict(self.recipe.student)]),
            "tool": f"lrc-edge {__version__}",
        }

    def quantize(self, student: DenseCheckpoint) -> DenseCheckpoint | None:
        """The student trained on the grid of the 4-bit files; None where the recipe or the formats ask for none."""
        if not preflight.trains_on_grid(self.recipe, student.shape.hidden_size):
            self.drop("quantize")
            shutil.rmtree(self.out / ON_GRID, ignore_errors=True)
            return None
        from lrc_edge.export.fold import with_weights
        from lrc_edge.train.loop.checkpoints import claim
        from lrc_edge.train.loop.quantized_stage import settings_of, train_on_grid
        from lrc_edge.train.loop.stage import SUMMARY_FILE, TRAINED_FILE

        folder, result = self.out / "quantize", self.out / ON_GRID
        teacher = self._teacher if self.recipe.quantize.teacher == "teacher" else student
        settings = {k: v for k, v in asdict(settings_of(self.recipe, student.shape)).items()
                    if k not in RUN_SETTINGS}
        inputs = [settings, self._hashes(student), self._hashes(teacher), self.dir.output_hashes("data"),
                  self.recipe.data.isolate_documents]

        def work(task: Task) -> tuple[Any, str]:
            claim(folder, self.dir.fingerprint("quantize", inputs),
                  {f"quantize.{name}": value for name, value in asdict(self.recipe.quantize).items()})
            train_on_grid(student, teacher, self.recipe, self.out / "data", folder,
                          lambda row: _show_training(task, row))
            summary = json.loads((folder / SUMMARY_FILE).read_text())
            provenance = student.provenance | {"name": student.name, "grid": "Q4_0; embedding and head Q8_0",
                                               "grid_tokens": str(summary["tokens"]),
                                               "grid_teacher": self.recipe.quantize.teacher}
            with self.dir.partial(ON_GRID) as partial:
                with_weights(student, folder / TRAINED_FILE, partial, provenance)
                replace_tree(partial, result)
            plain, trained = summary["first_held_out_loss"], summary["student_held_out_loss"]
            return summary, (f"{summary['tokens']:,} tokens on the Q4_0 grid: held-out loss {plain:.4f} rounded, "
                             f"{trained:.4f} trained, {summary['teacher_held_out_loss']:.4f} its {teacher_word}'s")

        teacher_word = "teacher" if teacher is not student else "unquantized self"
        self._stage("quantize", inputs, [result], work, self.recipe.quantize.tokens)
        # Recorded: what they led to lies in `result`.
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        (folder / TRAINED_FILE).unlink(missing_ok=True)
        return DenseCheckpoint.open(result)


def fold_identity(teacher: DenseCheckpoint, folder: Path) -> DenseCheckpoint:
    """Fold the teacher through P = I at full width: what comes out must be the teacher."""
    import torch
    from safetensors.torch import save_file

    from lrc_edge.export.fold import fold

    lineage, identity = Lineage.of(teacher.shape, teacher.shape), torch.eye(teacher.shape.hidden_size).bfloat16()
    folder.mkdir(parents=True)
    tensors = {w.name: identity.clone() if lineage.is_composed(w.role) else teacher.tensor(w.name).float()
               for w in teacher.weights() if not lineage.is_copied(w.role)}
    save_file(tensors, folder / "identity.safetensors", lineage.metadata("projections"))
    return fold(teacher, folder / "identity.safetensors", folder / "student",
                {"name": teacher.name, "teacher": teacher.name})


def _show_training(task: Task, row: dict[str, float]) -> None:
    from lrc_edge.train.losses import TERMS

    if "loss" in row:
        parts = ", ".join(f"{name} {row[name]:.3f}" for name in TERMS if row[name])
        task.update(f"step {row['step']:.0f}  loss {row['loss']:.3f} = {parts}  {row['tokens_per_second']:,.0f} tok/s",
                    int(row["tokens"]))


def _method(training: dict[str, Any]) -> str:
    clone, dense = "Low-Rank Clone (arXiv 2505.12781)", "dense distillation of all weights (arXiv 2609.02006)"
    first = training.get("dense_from_step", training["steps"])
    if first == training["steps"]:
        return clone
    return f"{clone} for {first} steps, then {dense} for {training['steps'] - first}" if first else dense
