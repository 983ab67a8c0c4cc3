"""Starts of tiny students: simple values for a clone, and the product's own start in a temporary folder."""
from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from lrc_edge.checkpoint import DenseCheckpoint
from lrc_edge.lineage import Holds
from lrc_edge.recipe import Recipe
from lrc_edge.shape import ModelShape
from lrc_edge.train import lowrank
from lrc_edge.train.clone import Clone
from lrc_edge.train.loop.processes import join
from lrc_edge.train.start.build import Choices, Start, build_start
from lrc_edge.train.start.layers import Layers
from lrc_edge.train.start.stage import FIGURES_FILE, make_start, save_start
from lrc_edge.train.start.width import INITS


def gaussian_values(clone: Clone, seed: int) -> dict[str, torch.Tensor]:
    """P ~ N(0, 0.02) and norms 1."""
    generator, lineage = torch.Generator().manual_seed(seed), clone.lineage
    return {w.name: torch.ones(w.shape) if w.role.is_norm else
            lowrank.gaussian(lineage.teacher.hidden_size, lineage.student.hidden_size, generator)
            for w in clone.weights if not w.role.is_inner}


def identity_values(clone: Clone) -> dict[str, torch.Tensor]:
    """P = I and the teacher's norms, for a student as wide as its teacher."""
    return {w.name: clone.teacher_of(w).detach().clone() if w.role.is_norm else
            torch.eye(clone.lineage.teacher.hidden_size) for w in clone.weights if not w.role.is_inner}


def start_of(teacher: DenseCheckpoint, rows_BL: torch.Tensor, holds: Holds = "projections",
             choices: Choices | None = None, **sizes: int) -> Start:
    """The start of a student with these sizes."""
    with tempfile.TemporaryDirectory() as folder:
        layers, student = Layers.of(teacher, torch.device("cpu")), replace(teacher.shape, **sizes)
        return build_start(layers, student, rows_BL, Path(folder), holds, choices)


def plain(init: str = "pca") -> Choices:
    return Choices(width=INITS[init], refits=False)


def started(model: DenseCheckpoint, shape: ModelShape, recipe: Recipe, data: Path, folder: Path) -> Path:
    """Store the start of a student of this shape in `folder`, by the first process that trains; return `folder`."""
    here = join(torch.device("cpu"))
    if here.is_main_process and not (folder / FIGURES_FILE).exists():
        folder.mkdir(exist_ok=True, parents=True)
        save_start(make_start(Layers.of(model, torch.device("cpu")), shape, recipe.train, data, folder), folder)
    here.wait_for_everyone()
    return folder
