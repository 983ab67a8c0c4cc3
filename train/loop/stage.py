"""The training stage: reads a teacher checkpoint and prepared tokens, writes trained.safetensors and metrics.jsonl."""
from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from transformers import PreTrainedModel

from lrc_edge import recipe as recipes
from lrc_edge.checkpoint import DenseCheckpoint
from lrc_edge.corpus.held_out import HeldOut
from lrc_edge.errors import UserError
from lrc_edge.lineage import Lineage, is_map, read_lineage
from lrc_edge.recipe import Recipe
from lrc_edge.train.clone import Clone
from lrc_edge.train.data.tokenize import HELD_OUT_FILE, PackedRows
from lrc_edge.train.device import choose_device, choose_precision
from lrc_edge.train.loop import processes
from lrc_edge.train.loop.checkpoints import latest
from lrc_edge.train.loop.schedule import Schedule
from lrc_edge.train.loop.trainer import (
    EVAL_TOKENS,
    METRICS_FILE,
    TRAINED_FILE,
    Progress,
    Trainer,
    held_out_loss,
    read_metrics,
    save_trained,
)
from lrc_edge.train.losses import TERMS
from lrc_edge.train.phases import CLONE, Phase
from lrc_edge.train.start.build import Start, first_phase

SUMMARY_FILE = "training.json"


@dataclass(frozen=True)
class Plan:
    """The settings of a training run, derived from its recipe, the start of its student, data and machine."""

    lineage: Lineage
    schedule: Schedule
    device: torch.device
    dtype: torch.dtype

    @classmethod
    def of(cls, recipe: Recipe, start: Start, data: Path) -> Plan:
        device = choose_device(recipe.train.device)
        n_tokens = PackedRows(data, recipe.train.seq_len).n_tokens
        return cls(start.lineage, Schedule.of(recipe.train, start.lineage.student, n_tokens, start.kl), device,
                   choose_precision(recipe.train.precision, device))


def load_clone(teacher: DenseCheckpoint, lineage: Lineage, *, dtype: torch.dtype = torch.float32,
               device: torch.device | None = None, recompute: bool = False, phase: Phase = CLONE) -> Clone:
    """Return a clone on `device`, to be initialized."""
    # The teacher is stored in the type it computes in: bf16 halves its memory.
    model: PreTrainedModel = teacher.model(dtype).to(device or torch.device("cpu"))  # type: ignore[arg-type]
    return Clone(model, lineage, dtype, recompute, phase).to(device or torch.device("cpu"))


def lineage_of(trained: Path) -> Lineage:
    """Read the lineage of a trained file. Raises UserError."""
    with safe_open(trained, framework="pt") as file:
        return read_lineage(file, trained)[0]


def load_trained(teacher: DenseCheckpoint, trained: Path) -> Clone:
    """Return the clone whose tensors `save_trained` wrote. Raises UserError for a file without a lineage."""
    with safe_open(trained, framework="pt") as file:
        lineage, holds = read_lineage(file, trained)
        clone = load_clone(teacher, lineage, phase=first_phase(holds))
        clone.initialize({name: file.get_tensor(name) for name in file.keys() if not is_map(name)})
    return clone


def train(teacher: DenseCheckpoint, recipe: Recipe, start: Start, data: Path, folder: Path, progress: Progress) -> None:
    """Train in `folder`, from its last checkpoint if there is one, else from `start`. Writes trained tensors, metrics
    and a summary there.

    Under torchrun every process calls it with the same arguments. Raises UserError if the GPU's memory is too small.
    """
    plan, settings = Plan.of(recipe, start, data), recipe.train
    with out_of_memory_told(plan.device, settings.micro_batch), processes.in_step(plan.device) as ranks:
        torch.manual_seed(settings.seed)
        clone = load_clone(teacher, plan.lineage, dtype=plan.dtype, device=plan.device,
                           recompute=settings.gradient_checkpointing, phase=first_phase(start.holds))
        if processes.agreed(latest(folder / "checkpoints"), ranks) is None:
            start.load_into(clone)
        rows = PackedRows(data, plan.schedule.seq_len, recipe.data.isolate_documents)
        run(clone, teacher, settings, plan, rows, data, folder, progress)


@contextmanager
def out_of_memory_told(device: torch.device, micro_batch: int) -> Iterator[None]:
    """Raise UserError if the GPU's memory is too small."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(f"train: out of memory on {device} ({str(error).split('. ')[0]}); lower train.micro_batch "
                        f"(now {micro_batch}) or set train.gradient_checkpointing=true: the same command "
                        "continues; if the models themselves do not fit, use a larger GPU") from error


def run(clone: Clone, teacher: DenseCheckpoint, settings: recipes.Train, plan: Plan, rows: PackedRows, data: Path,
        folder: Path, progress: Progress) -> None:
    """Train a clone that is ready to start, from the folder's last checkpoint if there is one, and write its files."""
    schedule = plan.schedule
    held_out = HeldOut.load(data / HELD_OUT_FILE)
    held_out_BL = evaluation_rows(held_out, schedule.seq_len, teacher)
    teacher_loss = held_out_loss(clone.teacher, held_out_BL, plan.dtype)
    trainer = Trainer(clone, settings, schedule, rows, held_out_BL, folder, progress)
    trainer.run()
    save_trained(clone, folder / TRAINED_FILE)
    if not trainer.is_main:
        return
    curve = read_metrics(folder / METRICS_FILE)
    losses = [row["held_out_loss"] for row in curve if "held_out_loss" in row]
    (folder / SUMMARY_FILE).write_text(json.dumps({
        "steps": schedule.steps, "tokens": schedule.tokens, "dense_from_step": schedule.dense_from,
        "seconds": round(trainer.clock.seconds, 1), "device": plan.device.type,
        "processes": trainer.processes.num_processes,
        "phases": schedule.phases,
        "precision": "bf16" if plan.dtype == torch.bfloat16 else "fp32", "init": settings.init,
        "terms": {name: term.label for name, term in TERMS.items()},
        "skipped_batches": sum("skipped" in row for row in curve),
        "teacher_held_out_loss": teacher_loss, "first_held_out_loss": losses[0], "student_held_out_loss": losses[-1],
        "bytes_per_token": held_out.bytes_per_token}, indent=1))


def evaluation_rows(held_out: HeldOut, seq_len: int, model: DenseCheckpoint) -> np.ndarray:
    return held_out.rows(min(seq_len, len(held_out.ids) // 2), EVAL_TOKENS, model.bos())


def evaluate(model: DenseCheckpoint, held_out: HeldOut, plan: Plan) -> float:
    """Return a model's loss on held-out text in its own ids, in nats per token, as `run` measures the teacher's."""
    loaded: Any = model.model(plan.dtype).to(plan.device)  # type: ignore[arg-type]
    return held_out_loss(loaded, evaluation_rows(held_out, plan.schedule.seq_len, model), plan.dtype)
