"""Progressive cuts: the student in several steps, each cut from the trained student of the step before (a hop).

The losses compare every student with the same teacher, through the composed lineage.
"""
from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from lrc_edge import recipe as recipes
from lrc_edge.checkpoint import DenseCheckpoint
from lrc_edge.recipe import Recipe
from lrc_edge.shape import ModelShape
from lrc_edge.train.clone import config_of
from lrc_edge.train.data.rows import PackedRows
from lrc_edge.train.device import choose_device
from lrc_edge.train.loop import processes
from lrc_edge.train.loop.stage import SUMMARY_FILE, train
from lrc_edge.train.loop.trainer import TRAINED_FILE, Progress
from lrc_edge.train.start.build import Choices, Start
from lrc_edge.train.start.layers import Layers
from lrc_edge.train.start.stage import (
    FIGURES_FILE,
    calibration_rows,
    load_start,
    make_start,
    save_start,
    temporary_streams,
)
from lrc_edge.workspace import replace_tree


def train_in_hops(teacher: DenseCheckpoint, recipe: Recipe, shapes: list[ModelShape], first: Path, data: Path,
                  folder: Path, progress: Progress, choices: Choices | None = None) -> None:
    """Train students of these shapes, one after another: the last one in `folder`, the others in `folder/hop-N`.

    first: the folder of the first one's start; choices: of the other starts, for comparisons. Finished hops are not
    repeated. Under torchrun every process calls it with the same arguments. Raises UserError.
    """
    settings = hop_settings(recipe.train, PackedRows(data, recipe.train.seq_len).n_tokens, len(shapes) - 1)
    device, start = choose_device(recipe.train.device), load_start(first)
    ranks = processes.join(device)
    ranks.wait_for_everyone()  # until the first process has cleared what another run left
    for hop, (shape, own) in enumerate(zip(shapes, settings, strict=True)):
        if hop:
            before = folder / f"hop-{hop}"
            if ranks.is_main_process and not (before / "next").exists():
                _save_next(_next_start(start, before, teacher, shape, own, data, device, choices), before)
            ranks.wait_for_everyone()
            start = load_start(before / "next")
        here = folder / f"hop-{hop + 1}" if shape is not shapes[-1] else folder
        if not processes.agreed(here != folder and (here / SUMMARY_FILE).exists(), ranks):
            here.mkdir(parents=True, exist_ok=True)
            train(teacher, replace(recipe, train=own), start, data, here, progress)


def hop_settings(train: recipes.Train, n_tokens: int, n_hops: int) -> list[recipes.Train]:
    """Return the settings of each hop and of the last student: their shares of the budget, each its own order of the
    data."""
    budget = train.tokens or n_tokens
    of_hop = round(budget * train.hop_share / n_hops) if n_hops else 0
    budgets = [of_hop] * n_hops + [budget - n_hops * of_hop]
    return [replace(train, tokens=tokens, seed=train.seed + hop) for hop, tokens in enumerate(budgets)] \
        if n_hops else [train]


def _next_start(start: Start, trained: Path, teacher: DenseCheckpoint, shape: ModelShape, settings: recipes.Train,
                data: Path, device: torch.device, choices: Choices | None) -> Start:
    """Return the start of a student of this shape, cut from the student that `start` was trained to."""
    lineage = start.lineage
    with safe_open(trained / TRAINED_FILE, framework="pt") as file:
        model = Layers(config_of(teacher.check_config(), lineage), lineage.student,
                       lambda weight: file.get_tensor(weight.name), device)
        cut = make_start(model, shape, settings, data, trained, choices=choices)
    with temporary_streams(trained) as streams:
        rows_BL = calibration_rows(data, settings, shape)
        return start.then(cut, Layers.of(teacher, device), rows_BL, streams)


def _save_next(start: Start, hop: Path) -> None:
    partial = hop / ".next"
    partial.mkdir(exist_ok=True)
    save_start(start, partial)
    replace_tree(partial, hop / "next")


def hop_summaries(folder: Path) -> list[dict[str, Any]]:
    """Return the summaries of the finished hops, in their order; each with the start of the next student as `next`."""
    files = sorted(folder.glob(f"hop-*/{SUMMARY_FILE}"), key=lambda file: int(file.parent.name.removeprefix("hop-")))
    return [json.loads(file.read_text()) | {"next": json.loads((file.parent / "next" / FIGURES_FILE).read_text())}
            for file in files]
