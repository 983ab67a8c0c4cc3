"""Matrices in an ONNX graph: as float32, or as llama.cpp's blocks in MatMulNBits.

llama.cpp's Q4_0 and Q8_0 and MatMulNBits with 4 and 8 bits, block 32 and its default zero point are the same grids,
w = scale * (level - zero point): only the order of the nibbles and the sign of a byte differ. Shapes: O a linear's
outputs, I its inputs, N = ceil(I / 32) blocks a row.
"""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from gguf import GGMLQuantizationType, quants
from onnx import TensorProto

from lrc_edge.export.onnx_file import MICROSOFT, OnnxFile

BLOCK = 32  # weights that share a scale
CHUNK_WEIGHTS = 1 << 24  # quantized at one time; gguf's quantizer holds several copies of what it is given


@dataclass(frozen=True)
class Grid:
    """w = scale * (level - zero_point), 0 <= level < 2^bits, in blocks of 32 that llama.cpp calls `qtype`."""

    qtype: GGMLQuantizationType
    bits: int

    @property
    def zero_point(self) -> int:
        """MatMulNBits' default."""
        return 1 << (self.bits - 1)

    @property
    def bytes_per_weight(self) -> float:
        """Level and share of the block's float32 scale."""
        return self.bits / 8 + 4 / BLOCK

    def names(self, weight: str) -> tuple[str, str]:
        """A packed matrix is two initializers: its levels and their scales."""
        return f"{weight}.{self.qtype.name.lower()}", f"{weight}.scales"


Q4_0 = Grid(GGMLQuantizationType.Q4_0, 4)
Q8_0 = Grid(GGMLQuantizationType.Q8_0, 8)
GRIDS = (Q4_0, Q8_0)


class Float32:
    """Plain float32. Implements onnx_graph.WeightFormat."""

    def linear(self, file: OnnxFile, name: str, weight_OI: np.ndarray, x: str, output: str) -> str:
        return file.node("MatMul", [x, file.weight(name, weight_OI.T)], output)

    def embedding(self, file: OnnxFile, name: str, weight_OI: np.ndarray, ids: str, output: str) -> str:
        return file.node("Gather", [file.weight(name, weight_OI), ids], output)

    def head(self, file: OnnxFile, name: str, weight_OI: np.ndarray, x: str, output: str) -> str:
        return self.linear(file, name, weight_OI, x, output)

    def tied_head(self, file: OnnxFile, name: str, shape_OI: tuple[int, ...], x: str, output: str) -> str:
        # Transposes inside the product; a Transpose node would be folded into a second copy of the largest matrix.
        return file.node("FusedMatMul", [x, name], output, domain=MICROSOFT, transB=1)


class Int4:
    """Linears on the Q4_0 grid, embedding and head on the Q8_0 one. Implements onnx_graph.WeightFormat.

    4 bits in those two cost most of the quality. KL to float32 on 2,048 tokens of TinyStories with both on Q4_0, and
    as they are: llama of 9M parameters 0.0057, 0.0019 (llama.cpp's Q4_0: 0.0021); stories260K 0.142, 0.109; a student
    of it half as wide 0.203, 0.155.

    `accuracy_level` is MatMulNBits' own: 0 and 1 compute in float32, 4 rounds activations to int8. 8 bits in float32
    are exact but slow in onnxruntime 1.31: 97 ms for a head of 32,000 x 1024 and one token on one thread, against
    0.9 ms at level 4, 3.4 ms in plain float32 and 1.3 ms with 4 bits.
    """

    def __init__(self, accuracy_level: int):
        self.accuracy_level = accuracy_level

    def linear(self, file: OnnxFile, name: str, weight_OI: np.ndarray, x: str, output: str) -> str:
        _store(file, Q4_0, name, weight_OI)
        return self._product(file, Q4_0, name, weight_OI.shape, x, output)

    def embedding(self, file: OnnxFile, name: str, weight_OI: np.ndarray, ids: str, output: str) -> str:
        """Rows unpacked by standard operators: onnxruntime-web lacks GatherBlockQuantized."""
        packed, scales = _store(file, Q8_0, name, weight_OI)
        bytes_ = file.node("Gather", [packed, ids], f"{output}/bytes")  # (B, T, N, 32)
        levels = file.node("Sub", [file.node("Cast", [bytes_], f"{output}/float", to=TensorProto.FLOAT),
                                   file.constant(float(Q8_0.zero_point), np.float32)], f"{output}/levels")
        scale = file.node("Unsqueeze", [file.node("Gather", [scales, ids], f"{output}/row_scales"),
                                        file.constant([-1])], f"{output}/scale")
        weights = file.node("Mul", [levels, scale], f"{output}/weights")
        n_inputs = weight_OI.shape[1]
        if n_inputs % BLOCK == 0:
            return file.node("Reshape", [weights, file.constant([0, 0, n_inputs])], output)
        padded = file.node("Reshape", [weights, file.constant([0, 0, -1])], f"{output}/padded")
        return file.node("Slice", [padded, file.constant([0]), file.constant([n_inputs]), file.constant([2])], output)

    def head(self, file: OnnxFile, name: str, weight_OI: np.ndarray, x: str, output: str) -> str:
        _store(file, Q8_0, name, weight_OI)
        return self._product(file, Q8_0, name, weight_OI.shape, x, output)

    def tied_head(self, file: OnnxFile, name: str, shape_OI: tuple[int, ...], x: str, output: str) -> str:
        return self._product(file, Q8_0, name, shape_OI, x, output)

    def _product(self, file: OnnxFile, grid: Grid, name: str, shape_OI: tuple[int, ...], x: str, output: str) -> str:
        return file.node("MatMulNBits", [x, *grid.names(name)], output, domain=MICROSOFT, N=shape_OI[0],
                         K=shape_OI[1], bits=grid.bits, block_size=BLOCK, accuracy_level=self.accuracy_level)


def _store(file: OnnxFile, grid: Grid, name: str, weight_OI: np.ndarray) -> tuple[str, str]:
    levels_name, scales_name = grid.names(name)
    packed, scales = pack(weight_OI, grid)
    return file.weight(levels_name, packed), file.weight(scales_name, scales)


def pack(weight_OI: np.ndarray, grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    """Quantize as llama.cpp does and order the levels as MatMulNBits wants them.

    Returns bytes (O, N, 4 * bits) uint8 and scales (O, N) float32, each of them a float16's value. A row that is no
    multiple of 32 is padded with zeros, which the grids hold exactly.
    """
    n_outputs, n_inputs = weight_OI.shape
    n_blocks = -(-n_inputs // BLOCK)
    packed = np.empty((n_outputs, n_blocks, BLOCK * grid.bits // 8), np.uint8)
    scales = np.empty((n_outputs, n_blocks), np.float32)
    rows = max(1, CHUNK_WEIGHTS // n_inputs)
    for start in range(0, n_outputs, rows):
        chunk = np.pad(weight_OI[start:start + rows], ((0, 0), (0, n_blocks * BLOCK - n_inputs)))
        blocks = quants.quantize(chunk, grid.qtype).reshape(len(chunk), n_blocks, 2 + packed.shape[2])
        scales[start:start + rows] = blocks[..., :2].copy().view(np.float16)[..., 0]
        packed[start:start + rows] = _reordered(blocks[..., 2:], grid)
    return packed, scales


def _reordered(levels: np.ndarray, grid: Grid) -> np.ndarray:
    """Bytes of ggml's blocks (..., 4 * bits) as MatMulNBits'.

    block_q8_0 keeps int8, MatMulNBits that plus 128. block_q4_0 keeps weights 0-15 in the low nibbles and 16-31 in the
    high ones, MatMulNBits neighbours in one byte, the even one low.
    """
    if grid.bits == 8:
        return levels ^ 128
    nibbles = np.concatenate([levels & 15, levels >> 4], axis=-1)
    return nibbles[..., 0::2] | nibbles[..., 1::2] << 4
