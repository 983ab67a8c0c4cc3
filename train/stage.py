"""The training stage: teacher checkpoint and prepared tokens in, projections.safetensors and metrics.jsonl out."""
from __future__ import annotations

import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from lrc_edge.checkpoint import DenseCheckpoint
from lrc_edge.corpus import HeldOut
from lrc_edge.recipe import Recipe
from lrc_edge.train import initialize
from lrc_edge.train.clone import Clone
from lrc_edge.train.data import HELD_OUT_FILE, PackedRows
from lrc_edge.train.trainer import (
    EVAL_TOKENS,
    METRICS_FILE,
    PROJECTIONS_FILE,
    CloneTrainer,
    Progress,
    Schedule,
    choose_device,
    choose_precision,
    held_out_loss,
    last_checkpoint,
    save_projections,
)

SUMMARY_FILE = "training.json"


@dataclass(frozen=True)
class Plan:
    """What training will do, known before it starts."""

    hidden_size: int
    schedule: Schedule
    device: torch.device
    dtype: torch.dtype

    @classmethod
    def of(cls, recipe: Recipe, teacher: DenseCheckpoint, hidden_size: int, data: Path) -> Plan:
        device = choose_device(recipe.train.device)
        n_tokens = PackedRows(data, recipe.train.seq_len).n_tokens
        return cls(hidden_size, Schedule.of(recipe.train, teacher.shape.max_position_embeddings, n_tokens), device,
                   choose_precision(recipe.train.precision, device))


def load_clone(teacher: DenseCheckpoint, hidden_size: int, *, dtype: torch.dtype = torch.float32,
               device: torch.device | None = None, projections: Path | None = None) -> Clone:
    """A clone on `device`, with the trained tensors of `projections` if given (else P = 0: initialize it)."""
    # The teacher is stored in the type it computes in: at bf16 that halves its memory.
    model: PreTrainedModel = teacher.model().to(device or torch.device("cpu"), dtype)  # type: ignore[arg-type]
    clone = Clone(model, teacher.shape, hidden_size, dtype).to(device or torch.device("cpu"))
    if projections is not None:
        clone.initialize(load_file(projections))
    return clone


def train(teacher: DenseCheckpoint, recipe: Recipe, plan: Plan, data: Path, folder: Path, progress: Progress) -> None:
    """Train in `folder`; continues from its last whole checkpoint. Leaves projections, metrics and a summary there."""
    settings = recipe.train
    torch.manual_seed(settings.seed)
    clone = load_clone(teacher, plan.hidden_size, dtype=plan.dtype, device=plan.device)
    rows = PackedRows(data, plan.schedule.seq_len, recipe.data.isolate_documents)
    held_out = HeldOut.load(data / HELD_OUT_FILE)
    held_out_BL = held_out.rows(min(plan.schedule.seq_len, len(held_out.ids) // 2), EVAL_TOKENS,
                                teacher.config.get("bos_token_id") if _adds_bos(teacher) else None)
    teacher_loss = held_out_loss(clone.teacher, held_out_BL, plan.dtype)
    checkpoint = last_checkpoint(folder)
    if checkpoint is None:
        _initialize(clone, settings.init, rows, settings.seed)
        (folder / METRICS_FILE).unlink(missing_ok=True)
    else:
        _drop_rows_after(folder / METRICS_FILE, int(checkpoint.name.rsplit("-", 1)[1]))
    trainer = CloneTrainer(clone, settings, plan.schedule, rows, held_out_BL, folder, progress)
    started = time.monotonic()
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    curve = read_metrics(folder / METRICS_FILE)
    last = next(row["held_out_loss"] for row in reversed(curve) if "held_out_loss" in row)
    save_projections(clone, folder / PROJECTIONS_FILE)
    (folder / SUMMARY_FILE).write_text(json.dumps({
        "steps": plan.schedule.steps, "tokens": plan.schedule.steps * plan.schedule.tokens_per_step,
        "seconds": round(time.monotonic() - started, 1), "device": plan.device.type,
        "precision": "bf16" if plan.dtype == torch.bfloat16 else "fp32", "init": settings.init,
        "teacher_held_out_loss": teacher_loss, "student_held_out_loss": last,
        "bytes_per_token": held_out.bytes_per_token}, indent=1))
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # the projections are what they led to


def _initialize(clone: Clone, init: str, rows: PackedRows, seed: int) -> None:
    if init == "gaussian":
        clone.initialize(initialize.gaussian_values(clone, seed))
        return
    picked = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[: initialize.CALIBRATION_ROWS]
    sample = torch.stack([rows[int(i)]["input_ids"] for i in picked]).to(next(clone.parameters()).device)
    values = initialize.pca_values if init == "pca" else initialize.selection_values
    clone.initialize(values(clone, sample))


def _adds_bos(teacher: DenseCheckpoint) -> bool:
    ids: Any = teacher.tokenizer()("a")["input_ids"]
    return ids[0] == teacher.config.get("bos_token_id")


def read_metrics(file: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def _drop_rows_after(file: Path, step: int) -> None:
    """A killed run logged past its last checkpoint; the continued one logs those steps again."""
    kept = [row for row in read_metrics(file) if row["step"] <= step]
    file.write_text("".join(json.dumps(row) + "\n" for row in kept))
