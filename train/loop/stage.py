"""The training stage: reads a teacher checkpoint and prepared tokens, writes trained.safetensors and metrics.jsonl."""
from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from safetensors import safe_open
from transformers import PreTrainedModel

from lrc_edge import recipe as recipes
from lrc_edge.checkpoint import DenseCheckpoint
from lrc_edge.corpus.held_out import HeldOut
from lrc_edge.errors import UserError
from lrc_edge.lineage import Lineage, read_metadata
from lrc_edge.recipe import Recipe
from lrc_edge.shape import ModelShape
from lrc_edge.train.clone import Clone
from lrc_edge.train.data.tokenize import HELD_OUT_FILE, PackedRows
from lrc_edge.train.initialize import CALIBRATION_ROWS, INITS
from lrc_edge.train.loop import processes
from lrc_edge.train.loop.checkpoints import latest
from lrc_edge.train.loop.schedule import Schedule
from lrc_edge.train.loop.trainer import (
    EVAL_TOKENS,
    METRICS_FILE,
    TRAINED_FILE,
    Progress,
    Trainer,
    choose_device,
    choose_precision,
    held_out_loss,
    read_metrics,
    save_trained,
)
from lrc_edge.train.losses import TERMS, Objective
from lrc_edge.train.phases import DENSE
from lrc_edge.workspace import write_atomically

SUMMARY_FILE, START_FILE = "training.json", "start.json"


@dataclass(frozen=True)
class Plan:
    """The settings of a training run, derived from its recipe, teacher, data and machine. Default learning rates are
    provisional: `train` computes them again once it has measured the student's KL from its teacher."""

    lineage: Lineage
    schedule: Schedule
    device: torch.device
    dtype: torch.dtype

    @classmethod
    def of(cls, recipe: Recipe, teacher: DenseCheckpoint, student: ModelShape, data: Path) -> Plan:
        device = choose_device(recipe.train.device)
        n_tokens = PackedRows(data, recipe.train.seq_len).n_tokens
        return cls(Lineage.of(teacher.shape, student), Schedule.of(recipe.train, student, n_tokens), device,
                   choose_precision(recipe.train.precision, device))


def load_clone(teacher: DenseCheckpoint, lineage: Lineage, *, dtype: torch.dtype = torch.float32,
               device: torch.device | None = None, recompute: bool = False) -> Clone:
    """Return a clone on `device`. Its projections are 0 until it is initialized."""
    # The teacher is stored in the type it computes in: bf16 halves its memory.
    model: PreTrainedModel = teacher.model(dtype).to(device or torch.device("cpu"))  # type: ignore[arg-type]
    return Clone(model, lineage, dtype, recompute).to(device or torch.device("cpu"))


def load_trained(teacher: DenseCheckpoint, trained: Path) -> Clone:
    """Return the clone whose tensors `save_trained` wrote. Raises UserError for a file without a lineage."""
    with safe_open(trained, framework="pt") as file:
        lineage, holds = read_metadata(file.metadata(), trained)
        clone = load_clone(teacher, lineage)
        if holds == DENSE.holds:
            clone.start(DENSE)
        clone.initialize({name: file.get_tensor(name) for name in file.keys()})
    return clone


def train(teacher: DenseCheckpoint, recipe: Recipe, plan: Plan, data: Path, folder: Path, progress: Progress) -> None:
    """Train in `folder`, from its last checkpoint if there is one. Writes trained tensors, metrics and a summary there.

    Under torchrun every process calls it with the same arguments. Raises UserError if the GPU's memory is too small.
    """
    with out_of_memory_told(plan.device, recipe.train.micro_batch), processes.in_step(plan.device) as ranks:
        _train(teacher, recipe, plan, data, folder, progress, ranks)


@contextmanager
def out_of_memory_told(device: torch.device, micro_batch: int) -> Iterator[None]:
    """Raise UserError if the GPU's memory is too small."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(f"train: out of memory on {device} ({str(error).split('. ')[0]}); lower train.micro_batch "
                        f"(now {micro_batch}) or set train.gradient_checkpointing=true: the same command "
                        "continues; if the models themselves do not fit, use a larger GPU") from error


def _train(teacher: DenseCheckpoint, recipe: Recipe, plan: Plan, data: Path, folder: Path, progress: Progress,
           ranks: PartialState) -> None:
    settings = recipe.train
    torch.manual_seed(settings.seed)
    clone = load_clone(teacher, plan.lineage, dtype=plan.dtype, device=plan.device,
                       recompute=settings.gradient_checkpointing)
    rows = PackedRows(data, plan.schedule.seq_len, recipe.data.isolate_documents)
    if processes.agreed(latest(folder / "checkpoints"), ranks) is None:
        start_kl = _initialize(clone, settings.init, rows, settings.seed)
        if ranks.is_main_process:
            write_atomically(folder / START_FILE, json.dumps({"kl": start_kl}))
        ranks.wait_for_everyone()
    schedule = Schedule.of(settings, plan.lineage.student, rows.n_tokens, _start_kl(folder))
    run(clone, teacher, settings, replace(plan, schedule=schedule), rows, data, folder, progress)


def run(clone: Clone, teacher: DenseCheckpoint, settings: recipes.Train, plan: Plan, rows: PackedRows, data: Path,
        folder: Path, progress: Progress) -> None:
    """Train a clone that is ready to start, from the folder's last checkpoint if there is one, and write its files."""
    schedule = plan.schedule
    held_out = HeldOut.load(data / HELD_OUT_FILE)
    held_out_BL = _evaluation_rows(held_out, schedule.seq_len, teacher)
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


def _evaluation_rows(held_out: HeldOut, seq_len: int, model: DenseCheckpoint) -> np.ndarray:
    return held_out.rows(min(seq_len, len(held_out.ids) // 2), EVAL_TOKENS, model.bos())


def evaluate(model: DenseCheckpoint, held_out: HeldOut, plan: Plan) -> float:
    """Return a model's loss on held-out text in its own ids, in nats per token, as `run` measures the teacher's."""
    loaded: Any = model.model(plan.dtype).to(plan.device)  # type: ignore[arg-type]
    return held_out_loss(loaded, _evaluation_rows(held_out, plan.schedule.seq_len, model), plan.dtype)


def _initialize(clone: Clone, init: str, rows: PackedRows, seed: int) -> float:
    """Set the clone's initial values from some rows. Return its KL from the teacher on them, in nats per token."""
    picked = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[: CALIBRATION_ROWS]
    sample_BL = torch.stack([rows[int(i)]["input_ids"] for i in picked]).to(next(clone.parameters()).device)
    clone.initialize(INITS[init](clone, sample_BL, seed))
    with torch.no_grad():
        losses = [clone(row[None], objective=Objective(clone=0.0)).parts["kl"].item() for row in sample_BL]
    return sum(losses) / len(losses)


def _start_kl(folder: Path) -> float:
    """Return the KL that `_initialize` measured when the run began. Raises UserError if it is not recorded."""
    try:
        return float(json.loads((folder / START_FILE).read_text())["kl"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / START_FILE}: cannot be read ({error}), and the learning rate depends on it; "
                        f"remove {folder} to start again") from error
