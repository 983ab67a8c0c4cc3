"""An ONNX folder with random weights, to time a shape. Written without PyTorch, so that devices can do it, too."""
from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from lrc_edge.families import EMBEDDING, HEAD, Weight
from lrc_edge.formats import BLOCK, format_of
from lrc_edge.onnx_graph.decoder import DecoderGraph, check_heads
from lrc_edge.onnx_graph.file import OnnxFile
from lrc_edge.onnx_graph.genai_config import genai_config
from lrc_edge.onnx_graph.matrices import Grid, blocks_per_row, matrices_of
from lrc_edge.shape import ModelShape
from lrc_edge.targets.timing.random_values import SCALE, levels, normal

# onnxruntime-genai opens no folder without a tokenizer. Ids are timed, so it may have a single token.
TOKENIZER = {"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}


def write_random_onnx(shape: ModelShape, format_: str, path: Path) -> None:
    """Write a graph of this shape and format, its data file, and in the folder above what onnxruntime-genai reads.

    path: ends as the exporter's files do, in "onnx/model_q4.onnx". Raises UserError for a shape without an ONNX form.
    """
    check_heads(shape, format_)
    row = format_of(format_)
    with OnnxFile(path) as file:
        DecoderGraph(file, RandomSource(shape), matrices_of(row)).write()
        file.save("random", {})
    config = genai_config(shape, row.file, bos=0, eos=[shape.vocab_size - 1], pad=0, sampling={"do_sample": False})
    for name, table in {"genai_config.json": config, "tokenizer.json": TOKENIZER,
                        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast"}}.items():
        (path.parents[1] / name).write_text(json.dumps(table))


class RandomSource:
    """Random weights as the source of a graph. Implements lrc_edge.onnx_graph.matrices.Source.

    The last token ends a text for onnxruntime-genai, which would then stop. Its logit is 0, so others are larger. A
    sliding window is left out, because a shape has none.
    """

    epsilon = 1e-5

    def __init__(self, shape: ModelShape):
        self.shape = shape

    def window(self, layer: int) -> int | None:
        return None

    def rope_tables(self) -> tuple[np.ndarray, np.ndarray]:
        half = self.shape.head_dim // 2
        angles = np.arange(self.shape.max_position_embeddings)[:, None] * 10000.0 ** (-np.arange(half) / half)
        return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)

    def vector(self, weight: Weight, type: np.dtype) -> np.ndarray:
        return np.ones(weight.numel, type)  # most are gains

    def rows(self, weight: Weight, type: np.dtype, transposed: bool) -> Iterator[np.ndarray]:
        matrix = normal(weight.numel, type).reshape(weight.shape)
        _silence_last(matrix, weight)
        yield matrix.T if transposed else matrix

    def blocks(self, weight: Weight, grid: Grid) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        n_rows, n_blocks, n_bytes = weight.shape[0], blocks_per_row(weight), BLOCK * grid.bits // 8
        scales = np.full((n_rows, n_blocks), 2 * SCALE / grid.zero_point, np.float32)
        _silence_last(scales, weight)
        yield levels(n_rows * n_blocks * n_bytes).reshape(n_rows, n_blocks, n_bytes), scales


def _silence_last(rows: np.ndarray, weight: Weight) -> None:
    """Set the row of the last token to 0, in a matrix that has one row for each token."""
    if weight.role in (EMBEDDING, HEAD):
        rows[-1] = 0
