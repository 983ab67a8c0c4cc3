"""The forms of matrices in an ONNX graph: float32, float16, or llama.cpp's blocks in MatMulNBits.

llama.cpp's Q4_0 and Q8_0 and MatMulNBits with 4 and 8 bits, block 32 and its default zero point are the same grids,
w = scale * (level - zero point): only the order of the nibbles and the sign of a byte differ. Shapes: O a linear's
outputs, I its inputs, N = ceil(I / 32) blocks per row, R rows of a part.
"""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from onnx import TensorProto, helper

from lrc_edge.families import Weight
from lrc_edge.formats import BLOCK, Format
from lrc_edge.onnx_graph.file import MICROSOFT, OnnxFile
from lrc_edge.shape import ModelShape

# int8 activations, as in llama.cpp. Measured on a trained model of 9M parameters: KL to float32 0.00197 instead of
# 0.00192, at 7.0 times the decoding speed (2.0 times with a 4-bit head, see Blocks).
DEFAULT_ACCURACY_LEVEL = 4


@dataclass(frozen=True)
class Grid:
    """w = scale * (level - zero_point), 0 <= level < 2^bits, in blocks of 32 whose type is `type` in ggml."""

    type: str
    bits: int

    @property
    def zero_point(self) -> int:
        """Return MatMulNBits' default zero point."""
        return 1 << (self.bits - 1)

    def names(self, weight: str) -> tuple[str, str]:
        """Return the names of a packed matrix's two initializers: levels and scales."""
        return f"{weight}.{self.type.lower()}", f"{weight}.scales"


Q4_0, Q8_0 = Grid("Q4_0", 4), Grid("Q8_0", 8)
GRIDS = {grid.type: grid for grid in (Q4_0, Q8_0)}
PLAIN_TYPES: dict[str, np.dtype] = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16)}  # by ggml's names


class Source(Protocol):
    """The numbers of a model whose graph is written. Each weight is read once; parts are consecutive rows."""

    shape: ModelShape
    epsilon: float  # of the RMS norms

    def window(self, layer: int) -> int | None:
        """Return how many tokens a query of this layer sees, itself included; None: all."""
        ...

    def rope_tables(self) -> tuple[np.ndarray, np.ndarray]:
        """Return cos and sin of every position, each (max_position_embeddings, head_dim / 2) float32."""
        ...

    def vector(self, weight: Weight, type: np.dtype) -> np.ndarray:
        """Return a norm's gain or a bias in this type."""
        ...

    def rows(self, weight: Weight, type: np.dtype, transposed: bool) -> Iterator[np.ndarray]:
        """Yield the matrix (O, I), or its transpose, in parts of this type."""
        ...

    def blocks(self, weight: Weight, grid: Grid) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield the matrix in parts on this grid: levels (R, N, 4 * bits) uint8 in MatMulNBits' order, and scales
        (R, N) float32."""
        ...


class Plain:
    """Every matrix in one type, float32 or float16, in which the graph then computes."""

    def __init__(self, type: np.dtype):
        self.type = type  # also of activations, cache, biases and RoPE's tables
        self.onnx_type: int = helper.np_dtype_to_tensor_dtype(type)

    def linear(self, file: OnnxFile, source: Source, weight: Weight, x: str, output: str) -> str:
        """x (..., I) -> x W^T (..., O)."""
        return file.node("MatMul", [x, self._store(file, source, weight, transposed=True)], output)

    def embedding(self, file: OnnxFile, source: Source, weight: Weight, ids: str, output: str) -> str:
        """ids (...) -> rows of W (..., I)."""
        return file.node("Gather", [self._store(file, source, weight, transposed=False), ids], output)

    def head(self, file: OnnxFile, source: Source, weight: Weight, x: str, output: str) -> str:
        """Like `linear`, for the LM head."""
        return self.linear(file, source, weight, x, output)

    def tied_head(self, file: OnnxFile, embedding: Weight, x: str, output: str) -> str:
        """Like `head`, with the matrix that `embedding` has stored."""
        # Transposes inside the product; a Transpose node would be folded into a second copy of the largest matrix.
        return file.node("FusedMatMul", [x, embedding.name], output, domain=MICROSOFT, transB=1)

    def _store(self, file: OnnxFile, source: Source, weight: Weight, transposed: bool) -> str:
        shape = weight.shape[::-1] if transposed else weight.shape
        return file.weight_in_parts(weight.name, shape, self.type, source.rows(weight, self.type, transposed))


class Blocks:
    """Linears on one grid, embedding and LM head on another. Has Plain's methods; the graph computes in float32.

    Embedding and LM head in 4 bits cost a large part of the quality. KL to float32 on 2,048 tokens of TinyStories, with
    both on Q4_0 and with both on Q8_0: a llama of 9M parameters 0.0057 and 0.0019; stories260K 0.142 and 0.109; a
    student of stories260K, half as wide, 0.203 and 0.155.

    `accuracy_level` is MatMulNBits' own: 0 and 1 compute in float32, 4 rounds activations to int8. 8 bits in float32
    are exact but slow in onnxruntime 1.31: 97 ms for a head of 32,000 x 1024 and one token on one thread, against
    0.9 ms at level 4, 3.4 ms in plain float32 and 1.3 ms with 4 bits.
    """

    type: np.dtype = np.dtype(np.float32)
    onnx_type: int = TensorProto.FLOAT

    def __init__(self, linears: Grid, ends: Grid, accuracy_level: int):
        self.linears, self.ends, self.accuracy_level = linears, ends, accuracy_level

    def linear(self, file: OnnxFile, source: Source, weight: Weight, x: str, output: str) -> str:
        self._store(file, source, self.linears, weight)
        return self._product(file, self.linears, weight, x, output)

    def embedding(self, file: OnnxFile, source: Source, weight: Weight, ids: str, output: str) -> str:
        """Add an embedding that standard operators unpack, since onnxruntime-web lacks GatherBlockQuantized."""
        packed, scales = self._store(file, source, self.ends, weight)
        bytes_ = file.node("Gather", [packed, ids], f"{output}/bytes")  # (B, T, N, 32)
        levels = file.node("Sub", [file.node("Cast", [bytes_], f"{output}/float", to=TensorProto.FLOAT),
                                   file.constant(float(self.ends.zero_point), np.float32)], f"{output}/levels")
        scale = file.node("Unsqueeze", [file.node("Gather", [scales, ids], f"{output}/row_scales"),
                                        file.constant([-1])], f"{output}/scale")
        weights = file.node("Mul", [levels, scale], f"{output}/weights")
        n_inputs = weight.shape[1]
        if n_inputs % BLOCK == 0:
            return file.node("Reshape", [weights, file.constant([0, 0, n_inputs])], output)
        padded = file.node("Reshape", [weights, file.constant([0, 0, -1])], f"{output}/padded")
        return file.node("Slice", [padded, file.constant([0]), file.constant([n_inputs]), file.constant([2])], output)

    def head(self, file: OnnxFile, source: Source, weight: Weight, x: str, output: str) -> str:
        self._store(file, source, self.ends, weight)
        return self._product(file, self.ends, weight, x, output)

    def tied_head(self, file: OnnxFile, embedding: Weight, x: str, output: str) -> str:
        return self._product(file, self.ends, embedding, x, output)

    def _product(self, file: OnnxFile, grid: Grid, weight: Weight, x: str, output: str) -> str:
        return file.node("MatMulNBits", [x, *grid.names(weight.name)], output, domain=MICROSOFT, N=weight.shape[0],
                         K=weight.shape[1], bits=grid.bits, block_size=BLOCK, accuracy_level=self.accuracy_level)

    def _store(self, file: OnnxFile, source: Source, grid: Grid, weight: Weight) -> tuple[str, str]:
        """Write levels as they are made, then the scales (an eighth of a byte per weight)."""
        levels_name, scales_name = grid.names(weight.name)
        scales_ON = []

        def levels() -> Iterator[np.ndarray]:
            for part, scales_RN in source.blocks(weight, grid):
                scales_ON.append(scales_RN)
                yield part

        shape = (weight.shape[0], blocks_per_row(weight), BLOCK * grid.bits // 8)
        file.weight_in_parts(levels_name, shape, np.dtype(np.uint8), levels())
        return levels_name, file.weight(scales_name, np.concatenate(scales_ON))


Matrices = Plain | Blocks


def blocks_per_row(matrix: Weight) -> int:
    """Return how many blocks a row takes. Its last block is padded."""
    return -(-matrix.shape[1] // BLOCK)


def matrices_of(row: Format, accuracy_level: int = DEFAULT_ACCURACY_LEVEL) -> Matrices:
    """Return the matrices of an ONNX format. `accuracy_level`: of Blocks. Raises KeyError for types without a form."""
    if row.type in PLAIN_TYPES:
        return Plain(PLAIN_TYPES[row.type])
    return Blocks(GRIDS[row.type], GRIDS[str(row.ends)], accuracy_level)
