"""Quantization-aware training (QAT): train a dense student so that its weights are on the grid of the 4-bit files.

Weights that were trained in float32 lose quality when they are rounded. Here they are rounded in every forward pass and
trained to reproduce the outputs of the unquantized student. Variants are known as QAD (with distillation) and DWQ.
"""
from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lrc_edge import recipe as recipes
from lrc_edge.checkpoint import DenseCheckpoint
from lrc_edge.lineage import Lineage
from lrc_edge.recipe import Recipe
from lrc_edge.shape import ModelShape
from lrc_edge.train.data.rows import PackedRows
from lrc_edge.train.device import choose_device, choose_precision
from lrc_edge.train.grids import BLOCK
from lrc_edge.train.loop import processes
from lrc_edge.train.loop.schedule import Schedule
from lrc_edge.train.loop.stage import Plan, load_clone, out_of_memory_told, run
from lrc_edge.train.loop.trainer import Progress
from lrc_edge.train.losses import TERMS
from lrc_edge.train.phases import DENSE, QUANTIZED


def row_off_the_grid(shape: ModelShape) -> int | None:
    """Return the row length of the first matrix that blocks of 32 do not divide; None if all fit the grid."""
    rows = (shape.hidden_size, shape.intermediate_size, shape.num_attention_heads * shape.head_dim)
    return next((row for row in rows if row % BLOCK), None)


def own_settings(recipe: Recipe, student: ModelShape) -> dict[str, Any]:
    """Return the training settings with the budget, learning rate and objective of this phase."""
    q = recipe.quantize
    return {
        **{term.settings[QUANTIZED.name]: 0.0 for term in TERMS.values()}, "kl_weight": 1.0, "kl_temperature": 1.0,
        # A teacher of another width has no layers to compare with: nothing maps its stream to the student's.
        "dense_alpha": q.alpha if q.teacher == "student" else 0.0, "clone_terms": "relative",
        "tokens": q.tokens, "batch_tokens": q.batch_tokens or min(32_768, max(1_024, q.tokens // 500)),
        "dense_learning_rate": q.learning_rate or recipes.QUANTIZED_RATE / student.hidden_size,
        "dense_share": 1.0, "dense_warmup_share": 0.05,
        "teacher_precision": "auto"}  # the rounding to be learned is of the size of e4m3's


def train_on_grid(student: DenseCheckpoint, teacher: DenseCheckpoint, lineage: Lineage, recipe: Recipe, data: Path,
                  folder: Path, progress: Progress) -> None:
    """Train `student` on the grid in `folder`, from its last checkpoint if there is one. Writes what stage.run writes.

    `teacher`: the model to distil from, either the unquantized student itself or its teacher. `lineage`: of the two.
    """
    settings = replace(recipe.train, **own_settings(recipe, student.shape))
    device = choose_device(settings.device)
    schedule = Schedule.of(settings, student.shape, 0)
    plan = Plan(lineage, schedule, device, choose_precision(settings.precision, device))
    torch.manual_seed(settings.seed)
    with out_of_memory_told(device, settings.micro_batch), processes.in_step(device):
        clone = load_clone(teacher, plan.lineage, dtype=plan.dtype, device=device,
                           recompute=settings.gradient_checkpointing, phase=DENSE)
        clone.initialize({name: student.tensor(name).float() for name in clone.trainable()})
        clone.start(QUANTIZED)
        run(clone, teacher, settings, plan, PackedRows(data, schedule.seq_len, recipe.data.isolate_documents), data,
            folder, progress)
