"""The start stage: builds a student's start from rows of the training text, and stores it for the training stage."""
from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
from lrc_edge.train.start.depth import SCORING_TOKENS
from lrc_edge.train.start.layers import Layers
from lrc_edge.train.start.width import INITS

START_FILE, FIGURES_FILE = "start.safetensors", "start.json"
CALIBRATION_TOKENS = 16_384
WRITER = "writer."  # before the name of a weight: its projection


def make_start(teacher: Layers, student: ModelShape, train: Train, data: Path, folder: Path,
               progress: Callable[[str], None] = lambda text: None, choices: Choices | None = None) -> Start:
    """Return the start of a student of this shape, computed on rows of the training text. `folder`: for temporary
    files; `choices`: for comparisons. Raises UserError if the GPU's memory is too small."""
    rows_BL = calibration_rows(data, train, student)
    holds: Holds = "weights" if train.dense_share == 1 else "projections"
    choices = choices or Choices(width=INITS[train.init], refits=train.init == "pca", seed=train.seed)
    try:
        with temporary_streams(folder) as streams:
            return build_start(teacher, student, rows_BL, streams, holds, choices, progress)
    except torch.OutOfMemoryError as error:
        raise UserError(f"start: out of memory on {teacher.device} ({str(error).split('. ')[0]}); the embedding, the "
                        "LM head and one layer of the teacher must fit: use a larger GPU, or "
                        "--set train.device=cpu") from error


def stream_bytes(teacher: ModelShape, student: ModelShape) -> int:
    """Return the bytes of the temporary files that a start needs at its peak: the streams of both models and what each
    writer should reach; and, to choose layers, two streams per layer."""
    chooses = student.num_hidden_layers < teacher.num_hidden_layers
    search = 2 * teacher.num_hidden_layers * SCORING_TOKENS * teacher.hidden_size if chooses else 0
    return 4 * (CALIBRATION_TOKENS * (teacher.hidden_size + 3 * student.hidden_size) + search)


def calibration_rows(data: Path, train: Train, student: ModelShape) -> torch.Tensor:
    """Return rows (B, L) of the training text, chosen by train.seed."""
    rows = PackedRows(data, min(train.seq_len, student.max_position_embeddings))
    n_rows = max(1, CALIBRATION_TOKENS // rows.seq_len)
    picked = torch.randperm(len(rows), generator=torch.Generator().manual_seed(train.seed))[:n_rows]
    return torch.stack([rows[int(i)]["input_ids"] for i in picked])


@contextmanager
def temporary_streams(folder: Path) -> Iterator[Path]:
    """Yield an empty folder in `folder`, and remove it, as well as what a killed process left there."""
    own = folder / "streams"
    shutil.rmtree(own, ignore_errors=True)
    own.mkdir()
    try:
        yield own
    finally:
        shutil.rmtree(own, ignore_errors=True)


def save_start(start: Start, folder: Path) -> dict[str, Any]:
    """Write a start. Returns its figures, which are also in FIGURES_FILE: loss and KL on the calibration rows, the
    teacher's layers that stay, and, for each layer of the student, the teacher's heads that each head comes from
    (empty lists if all stay)."""
    tensors = start.tensors | {WRITER + name: p for name, p in start.writers.items()} | start.lineage.tensors()
    # Copies: a safetensors file refuses tensors that share memory.
    stored: set[int] = set()
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage()
        if storage.data_ptr() in stored or storage.nbytes() != tensor.nbytes or not tensor.is_contiguous():
            tensors[name] = tensor.clone(memory_format=torch.contiguous_format)
        stored.add(storage.data_ptr())
    save_file(tensors, folder / START_FILE, start.lineage.metadata(start.holds))
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
