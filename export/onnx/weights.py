"""A checkpoint's weights in the forms of an ONNX graph.

The blocks of Q4_0 and Q8_0 come from llama.cpp's own quantizer, so that a GGUF of the same checkpoint and importance
holds the same numbers. Matrices are read, converted and written some rows at a time. Shapes: I a linear's inputs,
N = ceil(I / 32) blocks per row, R rows of a part.
"""
from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import torch
from gguf import GGMLQuantizationType
from transformers import AutoConfig

from lrc_edge.checkpoint import DenseCheckpoint
from lrc_edge.errors import UserError
from lrc_edge.export.onnx.rope import rope_tables
from lrc_edge.export.quantize.encodings import quantize_matrix
from lrc_edge.families import Weight, family_of
from lrc_edge.formats import BLOCK
from lrc_edge.onnx_graph.matrices import Grid

PART_WEIGHTS = 1 << 20  # converted at once
Result = TypeVar("Result")


class CheckpointSource:
    """A checkpoint as the source of a graph. Implements lrc_edge.onnx_graph.matrices.Source.

    `importance`: imatrix.collect's. `threads`: for quantizing; the result does not depend on their number.
    `trained_on_grid`: count the blocks that hold exactly the trained weights (`identical_blocks`). `progress`: called
    with the name of each weight. Needs memory for one tensor as the checkpoint stores it.
    """

    def __init__(self, checkpoint: DenseCheckpoint, importance: Mapping[str, np.ndarray] | None, threads: int | None,
                 progress: Callable[[str], None], trained_on_grid: bool = False):
        self.checkpoint, self.shape, self._progress = checkpoint, checkpoint.shape, progress
        self._config = AutoConfig.from_pretrained(checkpoint.path)
        self.epsilon = float(self._config.rms_norm_eps)
        self._importance, self._threads = importance or {}, threads or os.cpu_count() or 1
        self._trained_on_grid = trained_on_grid
        self._identical: list[np.ndarray] = []

    @property
    def identical_blocks(self) -> float | None:
        """Share of blocks with exactly the trained weights, once all are read; None without QAT."""
        return float(np.concatenate(self._identical).mean()) if self._trained_on_grid else None

    def window(self, layer: int) -> int | None:
        return family_of(self.shape.family).window_of_layer(self._config, layer)

    def rope_tables(self) -> tuple[np.ndarray, np.ndarray]:
        return rope_tables(self.checkpoint)

    def vector(self, weight: Weight, type: np.dtype) -> np.ndarray:
        return array_of(self._read(weight), type, weight.name)

    def rows(self, weight: Weight, type: np.dtype, transposed: bool) -> Iterator[np.ndarray]:
        matrix = self._read(weight)
        return (array_of(rows, type, weight.name) for rows in _parts(matrix.T if transposed else matrix))

    def blocks(self, weight: Weight, grid: Grid) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        importance_I = self._importance.get(weight.name)

        def packed(rows_RI: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
            weight_RI = array_of(rows_RI, np.dtype(np.float32), weight.name)
            try:
                part, scales_RN = pack(weight_RI, grid, importance_I)
            except UserError as error:
                raise UserError(f"{weight.name}: {error}") from error
            if self._trained_on_grid:  # rows are whole blocks then
                equal = unpack(part, scales_RN, grid) == weight_RI.reshape(*scales_RN.shape, BLOCK)
                self._identical.append(equal.all(-1).reshape(-1))
            return part, scales_RN

        return _in_order(packed, _parts(self._read(weight)), self._threads)

    def _read(self, weight: Weight) -> torch.Tensor:
        self._progress(weight.name)
        return self.checkpoint.tensor(weight.name)


def array_of(tensor: torch.Tensor, type: np.dtype, name: str) -> np.ndarray:
    """Return the tensor in float32 or float16. Raises UserError if a value exceeds the range of float16."""
    with np.errstate(over="ignore"):
        array: np.ndarray = tensor.float().numpy().astype(type, copy=False)
    if type == np.float16 and not np.isfinite(array).all():
        raise UserError(f"{name} has values beyond float16's largest, 65504; use onnx:fp32, onnx:q8 or onnx:q4 "
                        "instead of onnx:fp16")
    return array


def _parts(matrix: torch.Tensor) -> Iterator[torch.Tensor]:
    return iter(matrix.split(max(1, PART_WEIGHTS // matrix.shape[1])))


def _in_order(function: Callable[[torch.Tensor], Result], parts: Iterable[torch.Tensor], threads: int
              ) -> Iterator[Result]:
    """Like map, in threads; at most 2 * threads results wait at a time."""
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for part in parts:
            waiting.append(pool.submit(function, part))
            if len(waiting) > 2 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def pack(weight_RI: np.ndarray, grid: Grid, importance_I: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Return llama.cpp's blocks of each row, with the levels in MatMulNBits' order.

    block_q8_0 stores int8, MatMulNBits the same plus 128. block_q4_0 stores weights 0-15 in the low nibbles and 16-31
    in the high ones, MatMulNBits neighbours in one byte, the even one in the low nibble.

    Returns bytes (R, N, 4 * bits) uint8 and scales (R, N) float32, each of them a float16's value. A row that is not a
    multiple of 32 is padded with zeros, which the grids hold exactly.
    """
    padding = -weight_RI.shape[1] % BLOCK
    if padding:
        weight_RI = np.pad(weight_RI, ((0, 0), (0, padding)))
        if importance_I is not None:  # for zeros any importance works
            importance_I = np.pad(importance_I, (0, padding), constant_values=1)
    rows = quantize_matrix(weight_RI, GGMLQuantizationType[grid.type], importance_I)
    words = rows.view("<u2").reshape(len(rows), weight_RI.shape[1] // BLOCK, 1 + BLOCK * grid.bits // 16)
    scales = words[..., 0].copy().view(np.float16).astype(np.float32)
    if grid.bits == 8:
        return (words[..., 1:] ^ 0x8080).view(np.uint8), scales
    pairs = words[..., 1:]  # of neighbouring bytes
    low, high = pairs & 0x0F | pairs >> 4 & 0xF0, pairs >> 4 & 0x0F | pairs >> 8 & 0xF0
    return np.concatenate([low, high], axis=-1).astype(np.uint8), scales


def unpack(packed: np.ndarray, scales: np.ndarray, grid: Grid) -> np.ndarray:
    """Return the weights that `pack` has stored: (R, N, 32) float32."""
    levels = packed if grid.bits == 8 else np.stack([packed & 15, packed >> 4], -1).reshape(*scales.shape, BLOCK)
    weights: np.ndarray = scales[..., None] * (levels.astype(np.float32) - np.float32(grid.zero_point))
    return weights
