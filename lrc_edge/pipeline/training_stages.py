"""The stages that train: vocabulary, data, identity, start, train, fold, and quantize (quantization-aware training)."""
from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from lrc_edge import __version__
from lrc_edge.checkpoint import DenseCheckpoint
from lrc_edge.checkpoint_writer import LICENCES
from lrc_edge.console import Task
from lrc_edge.corpus.held_out import HeldOut
from lrc_edge.corpus.sources import SELF, local_files
from lrc_edge.lineage import Lineage
from lrc_edge.parity import gates_of_copy
from lrc_edge.pipeline import texts
from lrc_edge.pipeline.method import method_of
from lrc_edge.pipeline.stage import ON_GRID, STUDENT, VOCABULARY, Build, Done, Inputs, gate_tables, named
from lrc_edge.workspace import digest, replace_tree

if TYPE_CHECKING:
    from lrc_edge.train.loop.stage import Plan as TrainingPlan

# Settings that change how training runs, not what it makes.
RUN_SETTINGS = ("device", "compile", "gradient_checkpointing", "micro_batch", "workers", "log_every", "eval_every",
                "checkpoint_every", "keep_checkpoints", "on_bad_batch", "spike_factor")

# vocabulary


def vocabulary_inputs(build: Build) -> Inputs:
    teacher = build.plan.source.checkpoint
    others = [teacher.path / name for name in ("generation_config.json", "README.md", *LICENCES)]
    return _document_inputs(build) | {
        "student.vocab_size": build.plan.student.vocab_size, "teacher": build.digest(teacher),
        "tokenizer": build.digest_of_tokenizer(teacher),
        "other files": build.digest_of_files(file for file in others if file.exists())}


def vocabulary(build: Build, task: Task) -> Done:
    """Write the teacher with the student's vocabulary: the tokens that are most frequent in the data."""
    from lrc_edge.train.data.stage import count_occurrences
    from lrc_edge.train.trimmed_teacher import write_trimmed
    from lrc_edge.train.vocabulary import COUNTED_TOKENS, Vocabulary

    teacher, size = build.plan.source.checkpoint, build.plan.student.vocab_size
    tokens = Vocabulary.of(teacher)
    task.expect(COUNTED_TOKENS)
    counts = count_occurrences(teacher, build.recipe, COUNTED_TOKENS, task.update)
    kept = tokens.choose(size, counts)
    with build.workspace.partial(VOCABULARY) as partial:
        write_trimmed(teacher, kept, partial, task.update)
        replace_tree(partial, build.out / VOCABULARY)
    n, n_kept = int(counts.sum()), int(counts[kept].sum())
    return ({"tokens": size, "teacher_tokens": teacher.shape.vocab_size, "counted": n, "counted_and_kept": n_kept},
            f"{size:,} of {teacher.shape.vocab_size:,} tokens kept: {n_kept / max(1, n):.2%} of {n:,} in the data")


def _document_inputs(build: Build) -> Inputs:
    """Return everything that the documents depend on."""
    data = build.recipe.data
    # A local source is its files, however its path is written.
    sources = [[[str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns] for f in local_files([source])] or source
               for source in data.sources]
    return named("data", data, leave_out=("sources", "cache", "isolate_documents")) | {"data.sources": sources}


# data


def corpus_inputs(build: Build) -> Inputs:
    """Return everything that the tokens depend on. Builds with the same inputs may share tokens (data.cache)."""
    from lrc_edge.train.data.stage import row_length

    train, model = build.recipe.train, build.source
    inputs = _document_inputs(build) | {"train.tokens": train.tokens, "tokenizer": build.digest_of_tokenizer(model)}
    if SELF in build.recipe.data.sources:
        inputs |= {"teacher": build.digest(model), "train.seq_len": row_length(build.recipe, model),
                   "train.seed": train.seed, "train.precision": train.precision}
    return inputs


def data_inputs(build: Build) -> Inputs:
    from lrc_edge.train.data.stage import row_length

    return corpus_inputs(build) | {"train.seq_len": row_length(build.recipe, build.source)}


def data(build: Build, task: Task) -> Done:
    """Tokenize the corpus for a build, or for the quantization-aware training of a finished model."""
    from lrc_edge.train.data.stage import row_length, tokenize_corpus
    from lrc_edge.train.data.tokenize import PackedRows

    model, folder = build.source, build.out / "data"
    summary = tokenize_corpus(model, build.recipe, folder, digest(corpus_inputs(build)), task.update)
    n_tokens = PackedRows(folder, row_length(build.recipe, model)).n_tokens
    held_out = HeldOut.load(folder / "held_out.npz")
    more = f" ({summary})" if summary else ""
    return None, f"{n_tokens:,} training tokens, {len(held_out.ids):,} held out{more}"


def data_finished(build: Build) -> None:
    from lrc_edge.train.data.token_cache import forget_key

    forget_key(build.out / "data")


# identity


def identity_inputs(build: Build) -> Inputs:
    return {"teacher": build.digest(build.teacher), **build.check_settings, "data": build.digest_of_outputs("data")}


def identity(build: Build, task: Task) -> Done:
    """Check, before training, that a clone with P = I folds back to the teacher. Finds a wrong RoPE, eps or role."""
    from lrc_edge.targets.proof.reference import HeldOutRows, Reference

    teacher, recipe = build.teacher, build.recipe
    ids = texts.held_out_rows(build.held_out, recipe, teacher)
    task.update("teacher logits")
    reference = Reference(teacher.model())
    rounding = reference.rounding(ids)
    expected = HeldOutRows.of(reference, ids, folder=build.out)
    task.update("folding P = I")
    with build.workspace.partial("identity") as partial:
        folded = fold_identity(teacher, partial)
        metrics = expected.compare(Reference(folded.model()).prefill, recipe.parity.near_tie)
    gates = gates_of_copy("identity vs teacher", "teacher", metrics, recipe.gates, rounding)
    return gate_tables(gates), f"P = I folds to the teacher: max abs difference {metrics.max_abs:.1e}"


def fold_identity(teacher: DenseCheckpoint, folder: Path) -> DenseCheckpoint:
    """Fold the teacher through P = I at full width; the result must equal the teacher."""
    import torch
    from safetensors.torch import save_file

    from lrc_edge.export.fold import fold

    lineage, identity = Lineage.of(teacher.shape, teacher.shape), torch.eye(teacher.shape.hidden_size).bfloat16()
    folder.mkdir(parents=True)
    tensors = {w.name: identity.clone() if w.role.is_matrix else teacher.tensor(w.name).float()
               for w in teacher.weights() if not w.role.is_inner}
    save_file(tensors, folder / "identity.safetensors", lineage.metadata("projections"))
    return fold(teacher, folder / "identity.safetensors", folder / "student",
                {"name": teacher.name, "teacher": teacher.name})


# start


def start_inputs(build: Build) -> Inputs:
    from lrc_edge.train.data.stage import row_length

    train, length = build.recipe.train, row_length(build.recipe, build.teacher)
    return {"train.init": train.init, "train.seed": train.seed, "train.seq_len": length,
            "train.dense_share is 1": train.dense_share == 1, **named("student", build.plan.shapes[0]),
            "teacher": build.digest(build.teacher), "data": build.digest_of_outputs("data")}


def start(build: Build, task: Task) -> Done:
    """Compute the student's values before training."""
    from lrc_edge.train.device import choose_device
    from lrc_edge.train.start.layers import Layers
    from lrc_edge.train.start.stage import make_start, save_start

    teacher = Layers.of(build.teacher, choose_device(build.recipe.train.device))
    with build.workspace.partial("start") as partial:
        partial.mkdir(parents=True)
        begun = make_start(teacher, build.plan.shapes[0], build.recipe.train, build.out / "data", partial, task.update)
        figures = save_start(begun, partial)
        replace_tree(partial, build.out / "start")
    line = f"{figures['loss']:.3f} nats per token on training text, KL {figures['kl']:.3f} from the teacher"
    if len(figures["layers"]) < build.teacher.shape.num_hidden_layers:
        line += f"; layers {', '.join(map(str, figures['layers']))}"
    return figures, line


# train


def train_inputs(build: Build) -> Inputs:
    from lrc_edge.train.device import choose_device, choose_precision

    settings = build.recipe.train
    return {**named("train", settings, leave_out=RUN_SETTINGS), "start": build.digest_of_outputs("start"),
            "train.precision": str(choose_precision(settings.precision, choose_device(settings.device))),
            **named("student", build.plan.student), "student.hops": build.recipe.student.hops,
            "data.isolate_documents": build.recipe.data.isolate_documents,
            "teacher": build.digest(build.teacher), "data": build.digest_of_outputs("data")}


def train(build: Build, task: Task) -> Done:
    from lrc_edge.train.hops import hop_summaries, train_in_hops
    from lrc_edge.train.loop.checkpoints import claim
    from lrc_edge.train.loop.stage import SUMMARY_FILE
    from lrc_edge.train.loop.stage import Plan as TrainingPlan
    from lrc_edge.train.start.stage import load_start

    folder, corpus, begin = build.out / "train", build.out / "data", load_start(build.out / "start")
    plan = TrainingPlan.of(build.recipe, begin, corpus)
    task.expect(plan.schedule.tokens)
    if build.leads:
        claim(folder, train_inputs(build))
    train_in_hops(build.teacher, build.recipe, build.plan.shapes, build.out / "start", corpus, folder,
                  lambda row: _show_training(task, row))
    if not build.leads:
        return None, ""
    hops = hop_summaries(folder)
    # What the report shows as the start is that of the student itself.
    start_figures = hops[-1].pop("next") if hops else build.workspace.result("start")
    summary = json.loads((folder / SUMMARY_FILE).read_text()) | {"hops": hops, "start": start_figures}
    if build.plan.trims_vocabulary:
        task.update("teacher with its full vocabulary")
        summary["full_vocabulary"] = _full_vocabulary(build, plan)
    return summary, (f"{summary['tokens']:,} tokens on {summary['device']} in {summary['precision']}: held-out "
                     f"loss {summary['student_held_out_loss']:.3f} nats per token (before training "
                     f"{summary['first_held_out_loss']:.3f}, teacher's {summary['teacher_held_out_loss']:.3f})")


def _full_vocabulary(build: Build, plan: TrainingPlan) -> dict[str, float]:
    """Evaluate the teacher with its own tokens on the held-out text: its loss per byte is comparable, per token not."""
    from lrc_edge.train.loop.stage import evaluate

    teacher = build.plan.source.checkpoint
    held_out = build.held_out.retokenized(build.source.tokenizer(), teacher.tokenizer())
    return {"held_out_loss": evaluate(teacher, held_out, plan), "bytes_per_token": held_out.bytes_per_token}


def train_finished(build: Build) -> None:
    """Delete the checkpoints: the trained tensors are recorded, so no run resumes from them."""
    if build.leads:
        for folder in (build.out / "train").glob("**/checkpoints"):
            shutil.rmtree(folder, ignore_errors=True)


def _show_training(task: Task, row: dict[str, float]) -> None:
    from lrc_edge.train.losses import TERMS

    if "loss" in row:
        parts = ", ".join(f"{name} {row[name]:.3f}" for name in TERMS if row[name])
        task.update(f"step {row['step']:.0f}  loss {row['loss']:.3f} = {parts}  {row['tokens_per_second']:,.0f} tok/s",
                    int(row["tokens"]))


# fold


def fold_inputs(build: Build) -> Inputs:
    return {**{f"provenance of the student: {key}": value for key, value in _provenance(build).items()},
            "teacher": build.digest(build.teacher), "tokenizer": build.digest_of_tokenizer(build.teacher),
            "trained tensors": build.digest_of_outputs("train"), **build.check_settings}


def fold(build: Build, task: Task) -> Done:
    from lrc_edge.export.fold import fold as fold_student
    from lrc_edge.targets.proof.reference import Reference, compare_models
    from lrc_edge.train.loop.stage import TRAINED_FILE, load_trained

    teacher, recipe, trained = build.teacher, build.recipe, build.out / "train" / TRAINED_FILE
    provenance = _provenance(build)
    with build.workspace.partial(STUDENT) as partial:
        student = fold_student(teacher, trained, partial, provenance, task.update)
        task.update("folded vs clone")
        clone = load_trained(teacher, trained)
        reference, rows = Reference(clone.student), texts.held_out_rows(build.held_out, recipe, teacher)
        rounding = reference.rounding(rows)
        metrics = compare_models(reference, Reference(student.model()), rows, recipe.parity.near_tie)
        replace_tree(partial, build.out / STUDENT)
    gates = gates_of_copy("folded vs clone", "student", metrics, recipe.gates, rounding)
    return gate_tables(gates), (f"{provenance['name']}: {student.shape.n_params:,} parameters, "
                                f"max abs difference to the clone {metrics.max_abs:.1e}")


def _provenance(build: Build) -> dict[str, str]:
    training, source = build.workspace.result("train"), build.plan.source
    teacher, student = source.checkpoint, build.plan.student
    return {
        "name": build.plan.student_name,
        # A path of this machine means nothing elsewhere, and may tell what its owner would not.
        "teacher": source.given if source.revision != "local" else teacher.name,
        "teacher_revision": source.revision,
        "teacher_sha256": build.digest(teacher),
        "method": method_of(build.recipe.train, training["dense_from_step"], training["steps"],
                            build.plan.student.hidden_size < teacher.shape.hidden_size),
        "teacher_hidden_size": str(teacher.shape.hidden_size),
        "student_hidden_size": str(student.hidden_size),
        **({"teacher_vocab_size": str(teacher.shape.vocab_size), "student_vocab_size": str(student.vocab_size)}
           if build.plan.trims_vocabulary else {}),
        **({"hops": "; ".join(build.recipe.student.hops)} if build.recipe.student.hops else {}),
        "init": training["init"],
        "training_tokens": str(training["tokens"] + sum(hop["tokens"] for hop in training["hops"])),
        "recipe_sha256": digest([asdict(build.recipe.train), asdict(build.recipe.student)]),
        "tool": f"lrc-edge {__version__}",
    }


# quantize


def quantize_inputs(build: Build) -> Inputs:
    from lrc_edge.train.loop.quantized_stage import own_settings

    own = own_settings(build.recipe, build.student.shape)
    return {**named("train", build.recipe.train, leave_out=(*RUN_SETTINGS, *own)),
            **{f"quantize.{key}": value for key, value in own.items()}, **named("quantize", build.recipe.quantize),
            "student": build.digest(build.student), "teacher": build.digest(_quantize_teacher(build)),
            "data": build.digest_of_outputs("data"), "data.isolate_documents": build.recipe.data.isolate_documents}


def _quantize_teacher(build: Build) -> DenseCheckpoint:
    return {"teacher": build.source, "student": build.student}[build.recipe.quantize.teacher]


def _quantize_lineage(build: Build) -> Lineage:
    """Return how the student and the model that it is distilled from are related."""
    from lrc_edge.train.loop.stage import TRAINED_FILE, lineage_of

    if build.recipe.quantize.teacher == "teacher":
        return lineage_of(build.out / "train" / TRAINED_FILE)
    return Lineage.of(build.student.shape, build.student.shape)


def quantize(build: Build, task: Task) -> Done:
    """Train the student on the quantization grid of the 4-bit files (quantization-aware training)."""
    from lrc_edge.export.fold import with_weights
    from lrc_edge.train.loop.checkpoints import claim
    from lrc_edge.train.loop.quantized_stage import train_on_grid
    from lrc_edge.train.loop.stage import SUMMARY_FILE, TRAINED_FILE

    student, folder = build.student, build.out / "quantize"
    claim(folder, quantize_inputs(build))
    train_on_grid(student, _quantize_teacher(build), _quantize_lineage(build), build.recipe, build.out / "data", folder,
                  lambda row: _show_training(task, row))
    summary = json.loads((folder / SUMMARY_FILE).read_text())
    provenance = student.provenance | {"name": student.name, "grid": "Q4_0; embedding and head Q8_0",
                                       "grid_tokens": str(summary["tokens"]),
                                       "grid_teacher": build.recipe.quantize.teacher}
    with build.workspace.partial(ON_GRID) as partial:
        with_weights(student, folder / TRAINED_FILE, partial, provenance)
        replace_tree(partial, build.out / ON_GRID)
    teacher = {"teacher": "teacher's", "student": "unquantized self's"}[build.recipe.quantize.teacher]
    return summary, (f"{summary['tokens']:,} tokens on the Q4_0 grid: held-out loss "
                     f"{summary['first_held_out_loss']:.4f} rounded, {summary['student_held_out_loss']:.4f} trained, "
                     f"{summary['teacher_held_out_loss']:.4f} its {teacher}")


def quantize_finished(build: Build) -> None:
    """Delete the checkpoints: the result is recorded in ON_GRID, so no run resumes from them."""
    from lrc_edge.train.loop.stage import TRAINED_FILE

    shutil.rmtree(build.out / "quantize" / "checkpoints", ignore_errors=True)
    (build.out / "quantize" / TRAINED_FILE).unlink(missing_ok=True)
