"""The start stage: builds a student's start from rows of the training text, and stores it for the training stage."""
from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from lrc_edge.errors import UserError
from lrc_edge.lineage import Holds, is_map, read_lineage
from lrc_edge.recipe import Train
from lrc_edge.shape import ModelShape
from lrc_edge.train.data.rows import PackedRows
from lrc_edge.train.start.build import Choices, Start, build_start
from lrc_edge.train.start.layers import Layers
from lrc_edge.train.start.width import INITS

START_FILE, FIGURES_FILE = "start.safetensors", "start.json"
CALIBRATION_TOKENS = 16_384
WRITER = "writer."  # before the name of a weight: its projection


def make_start(teacher: Layers, student: ModelShape, train: Train, data: Path, folder: Path,
               progress: Callable[[str], None] = lambda text: None, choices: Choices | None = None) -> Start:
    """Return the start of a student of this shape, computed on rows of the training text. `folder`: for temporary
    files; `choices`: for comparisons. Raises UserError if the GPU's memory is too small."""
    rows = PackedRows(data, min(train.seq_len, student.max_position_embeddings))
    n_rows = max(1, CALIBRATION_TOKENS // rows.seq_len)
    picked = torch.randperm(len(rows), generator=torch.Generator().manual_seed(train.seed))[:n_rows]
    sample_BL = torch.stack([rows[int(i)]["input_ids"] for i in picked])
    holds: Holds = "weights" if train.dense_share == 1 else "projections"
    choices = choices or Choices(width=INITS[train.init], seed=train.seed)
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix="streams-") as streams:
            return build_start(teacher, student, sample_BL, Path(streams), holds, choices, progress)
    except torch.OutOfMemoryError as error:
        raise UserError(f"start: out of memory on {teacher.device} ({str(error).split('. ')[0]}); the embedding, the "
                        "LM head and one layer of the teacher must fit: use a larger GPU, or "
                        "--set train.device=cpu") from error


def save_start(start: Start, folder: Path) -> dict[str, Any]:
    """Write a start. Returns its figures, which are also in FIGURES_FILE: loss and KL on the calibration rows, the
    teacher's layers that stay, and, for each layer of the student, the teacher's heads that each head comes from
    (empty lists if all stay)."""
    tensors = start.tensors | {WRITER + name: p for name, p in start.writers.items()} | start.lineage.tensors()
    # Copies: a safetensors file refuses tensors that share memory.
    copies = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    save_file(copies, folder / START_FILE, start.lineage.metadata(start.holds))
    heads = {name: [block_map.index_JM.tolist() for block_map in start.lineage.maps.get(axis, ())]
             for name, axis in (("query_heads", "q_size"), ("key_value_heads", "k_size"))}
    figures = {"kl": start.kl, "loss": start.loss, "layers": start.lineage.layers, **heads}
    (folder / FIGURES_FILE).write_text(json.dumps(figures))
    return figures


def load_start(folder: Path) -> Start:
    """Read what `save_start` wrote. Raises UserError."""
    try:
        figures = json.loads((folder / FIGURES_FILE).read_text())
        loss, kl = float(figures["loss"]), float(figures["kl"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / FIGURES_FILE}: cannot be read ({error}); remove {folder} to compute it again") \
            from error
    with safe_open(folder / START_FILE, framework="pt") as file:
        lineage, holds = read_lineage(file, folder / START_FILE)
        tensors = {name: file.get_tensor(name) for name in file.keys() if not is_map(name)}
    writers = {name.removeprefix(WRITER): tensors.pop(name) for name in list(tensors) if name.startswith(WRITER)}
    return Start(lineage, holds, tensors, writers, loss, kl)
