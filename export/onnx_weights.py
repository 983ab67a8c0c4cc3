"""Matrices in an ONNX graph: as float32, or as Q4_0 blocks in MatMulNBits.

Q4_0 and MatMulNBits(4 bits, block 32, zero point 8) are one grid, w = scale * (q - 8): only the order of the nibbles
differs. Shapes: O a linear's outputs, I its inputs, N = ceil(I / 32) blocks a row.
"""
from __future__ import annotations

import numpy as np
from gguf import GGMLQuantizationType, quants
from onnx import TensorProto

from lrc_edge.export.onnx_file import MICROSOFT, OnnxFile

BLOCK = 32  # weights that share a scale
ZERO_POINT = 8
PACKED, SCALES = ".q4_0", ".scales"  # a packed matrix is two initializers: its name with these
CHUNK_WEIGHTS = 1 << 24  # quantized at one time; gguf's quantizer holds several copies of what it is given


class Float32:
    """Plain float32. Implements onnx_graph.WeightFormat."""

    def linear(self, file: OnnxFile, name: str, weight_OI: np.ndarray, x: str, output: str) -> str:
        return file.node("MatMul", [x, file.weight(name, weight_OI.T)], output)

    def embedding(self, file: OnnxFile, name: str, weight_OI: np.ndarray, ids: str, output: str) -> str:
        return file.node("Gather", [file.weight(name, weight_OI), ids], output)

    def tied_linear(self, file: OnnxFile, name: str, shape_OI: tuple[int, int], x: str, output: str) -> str:
        # Transposes inside the product; a Transpose node would be folded into a second copy of the largest matrix.
        return file.node("FusedMatMul", [x, name], output, domain=MICROSOFT, transB=1)


class Int4:
    """4-bit blocks on llama.cpp's Q4_0 grid. Implements onnx_graph.WeightFormat.

    `accuracy_level` is MatMulNBits' own: 0 and 1 compute in float32, 4 rounds activations to int8.
    """

    def __init__(self, accuracy_level: int):
        self.accuracy_level = accuracy_level

    def linear(self, file: OnnxFile, name: str, weight_OI: np.ndarray, x: str, output: str) -> str:
        self._store(file, name, weight_OI)
        return self._product(file, name, weight_OI.shape, x, output)

    def embedding(self, file: OnnxFile, name: str, weight_OI: np.ndarray, ids: str, output: str) -> str:
        """Rows unpacked by standard operators: onnxruntime-web lacks GatherBlockQuantized."""
        packed, scales = self._store(file, name, weight_OI)
        bytes_ = file.node("Gather", [packed, ids], f"{output}/bytes")  # (B, T, N, 16)
        low = file.node("BitwiseAnd", [bytes_, file.constant(15, np.uint8)], f"{output}/low")
        high = file.node("BitShift", [bytes_, file.constant(4, np.uint8)], f"{output}/high", direction="RIGHT")
        pairs = [file.node("Unsqueeze", [half, file.constant([-1])], f"{half}/column") for half in (low, high)]
        nibbles = file.node("Concat", pairs, f"{output}/pairs", axis=-1)  # (B, T, N, 16, 2)
        blocks = file.node("Reshape", [nibbles, file.constant([0, 0, 0, BLOCK])], f"{output}/blocks")
        levels = file.node("Sub", [file.node("Cast", [blocks], f"{output}/float", to=TensorProto.FLOAT),
                                   file.constant(float(ZERO_POINT), np.float32)], f"{output}/levels")
        scale = file.node("Unsqueeze", [file.node("Gather", [scales, ids], f"{output}/row_scales"),
                                        file.constant([-1])], f"{output}/scale")
        weights = file.node("Mul", [levels, scale], f"{output}/weights")
        n_inputs = weight_OI.shape[1]
        if n_inputs % BLOCK == 0:
            return file.node("Reshape", [weights, file.constant([0, 0, n_inputs])], output)
        padded = file.node("Reshape", [weights, file.constant([0, 0, -1])], f"{output}/padded")
        return file.node("Slice", [padded, file.constant([0]), file.constant([n_inputs]), file.constant([2])], output)

    def tied_linear(self, file: OnnxFile, name: str, shape_OI: tuple[int, int], x: str, output: str) -> str:
        return self._product(file, name, shape_OI, x, output)

    def _store(self, file: OnnxFile, name: str, weight_OI: np.ndarray) -> tuple[str, str]:
        packed, scales = pack_q4_0(weight_OI)
        return file.weight(name + PACKED, packed), file.weight(name + SCALES, scales)

    def _product(self, file: OnnxFile, name: str, shape_OI: tuple[int, ...], x: str, output: str) -> str:
        return file.node("MatMulNBits", [x, name + PACKED, name + SCALES], output, domain=MICROSOFT,
                         N=shape_OI[0], K=shape_OI[1], bits=4, block_size=BLOCK, accuracy_level=self.accuracy_level)


def pack_q4_0(weight_OI: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Quantize to Q4_0 and order the nibbles as MatMulNBits wants them.

    Returns bytes (O, N, 16) uint8 and scales (O, N) float32, each of them a float16's value. A row that is no multiple
    of 32 is padded with zeros, which the grid holds exactly. ggml's block_q4_0 keeps weights 0-15 in the low nibbles
    and 16-31 in the high ones; MatMulNBits keeps neighbours in one byte, the even one low.
    """
    n_outputs, n_inputs = weight_OI.shape
    n_blocks = -(-n_inputs // BLOCK)
    packed = np.empty((n_outputs, n_blocks, BLOCK // 2), np.uint8)
    scales = np.empty((n_outputs, n_blocks), np.float32)
    rows = max(1, CHUNK_WEIGHTS // n_inputs)
    for start in range(0, n_outputs, rows):
        chunk = np.pad(weight_OI[start:start + rows], ((0, 0), (0, n_blocks * BLOCK - n_inputs)))
        blocks = quants.quantize(chunk, GGMLQuantizationType.Q4_0).reshape(len(chunk), n_blocks, 2 + BLOCK // 2)
        scales[start:start + rows] = blocks[..., :2].copy().view(np.float16)[..., 0]
        halves = blocks[..., 2:]
        levels = np.concatenate([halves & 15, halves >> 4], axis=-1)
        packed[start:start + rows] = levels[..., 0::2] | levels[..., 1::2] << 4
    return packed, scales
