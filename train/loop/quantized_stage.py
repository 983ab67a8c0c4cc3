"""The quantization-aware stage: a dense student in, the same student on the grid of the 4-bit files out.

Weights that were trained in float32 lose when they are rounded; here they are trained as they will be rounded, to say
what the unquantized student says. The peers' words for it: QAT, QAD (distilled), DWQ.
"""
from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lrc_edge import recipe as recipes
from lrc_edge.checkpoint import DenseCheckpoint
from lrc_edge.recipe import Recipe
from lrc_edge.shape import ModelShape
from lrc_edge.train.data.rows import PackedRows
from lrc_edge.train.grids import BLOCK
from lrc_edge.train.loop import processes
from lrc_edge.train.loop.schedule import Schedule
from lrc_edge.train.loop.stage import Plan, load_clone, out_of_memory_told, run
from lrc_edge.train.loop.trainer import Progress, choose_device, choose_precision


def row_off_the_grid(shape: ModelShape) -> int | None:
    """The length of a matrix's row that blocks of 32 do not divide, or None when all fit the grid."""
    rows = (shape.hidden_size, shape.intermediate_size, shape.num_attention_heads * shape.head_dim)
    return next((row for row in rows if row % BLOCK), None)


def own_settings(recipe: Recipe, width: int) -> dict[str, Any]:
    """The settings of this phase that differ from the run's: budget, rate and objective."""
    q = recipe.quantize
    return dict(
        tokens=q.tokens, batch_tokens=q.batch_tokens or min(32_768, max(1_024, q.tokens // 500)),
        dense_share=1.0, dense_learning_rate=q.learning_rate or recipes.QUANTIZED_RATE / width,
        lm_weight=0.0, kl_weight=1.0, kl_temperature=1.0, warmup_share=0.05, clone_terms="relative",
        # Through a teacher of another width there is nothing to compare layer by layer.
        dense_alpha=q.alpha if q.teacher == "student" else 0.0)


def train_on_grid(student: DenseCheckpoint, teacher: DenseCheckpoint, recipe: Recipe, data: Path, folder: Path,
                  progress: Progress) -> None:
    """Train `student` on the grid in `folder`; continues from its last checkpoint. Leaves what stage.run leaves.

    `teacher` is what it is distilled from: the student itself, unquantized, or its teacher.
    """
    settings = replace(recipe.train, **own_settings(recipe, student.shape.hidden_size))
    device = choose_device(settings.device)
    schedule = Schedule.of(settings, student.shape.max_position_embeddings, 0, student.shape.hidden_size)
    plan = Plan(student.shape.hidden_size, schedule, device, choose_precision(settings.precision, device))
    processes.join(device).wait_for_everyone()
    torch.manual_seed(settings.seed)
    with out_of_memory_told(device, settings.micro_batch):
        clone = load_clone(teacher, plan.hidden_size, dtype=plan.dtype, device=device,
                           recompute=settings.gradient_checkpointing)
        clone.start_dense_phase()
        clone.initialize({name: student.tensor(name).float() for name in clone.trainable()})
        clone.start_quantized_phase()
        run(clone, teacher, settings, plan, PackedRows(data, schedule.seq_len, recipe.data.isolate_documents), data,
            folder, progress)
