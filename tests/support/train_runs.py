"""A training run of the tiny model, as the tests of training start it: here, in a child, or under torchrun."""
from __future__ import annotations

import sys
from pathlib import Path

import torch
from starts import started

from lrc_edge.checkpoint import DenseCheckpoint
from lrc_edge.lineage import Lineage
from lrc_edge.recipe import load_recipe
from lrc_edge.student import student_of
from lrc_edge.train.loop.processes import join, leave
from lrc_edge.train.loop.quantized_stage import train_on_grid
from lrc_edge.train.loop.stage import train
from lrc_edge.train.start.stage import load_start

SETTINGS = ["train.seq_len=64", "train.batch_tokens=256", "train.tokens=5120", "train.eval_every=5",
            "train.log_every=1", "train.checkpoint_every=4", "train.device=cpu", "student.hidden_size=32"]


def run(teacher: Path, data: Path, folder: Path, *settings: str) -> list[dict[str, float]]:
    """Train in `folder`, on the grid where `settings` give tokens for that; returns the rows that were logged."""
    recipe = load_recipe(None, [*SETTINGS, *settings])
    model = DenseCheckpoint.open(teacher)
    rows: list[dict[str, float]] = []
    folder.mkdir(exist_ok=True, parents=True)
    if recipe.quantize.tokens:
        train_on_grid(model, model, Lineage.of(model.shape, model.shape), recipe, data, folder, rows.append)
    else:
        shape = student_of(recipe, model.shape, "tiny")[0]
        start = load_start(started(model, shape, recipe, data, folder.with_name(f"{folder.name}-start")))
        train(model, recipe, start, data, folder, rows.append)
    return rows


if __name__ == "__main__":
    run(*map(Path, sys.argv[1:4]), *sys.argv[4:])
    leave(join(torch.device("cpu")))
