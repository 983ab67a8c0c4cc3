"""Starts of tiny students: simple values for a clone, and the product's own start in a temporary folder."""
from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from lrc_edge.checkpoint import DenseCheckpoint
from lrc_edge.lineage import Holds
from lrc_edge.train import lowrank
from lrc_edge.train.clone import Clone
from lrc_edge.train.start.build import Choices, Start, build_start
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
        return build_start(teacher, replace(teacher.shape, **sizes), rows_BL, Path(folder), holds, choices)


def plain(init: str = "pca") -> Choices:
    return Choices(width=INITS[init], refits=False)
