"""Matrices in an ONNX graph: float32, float16, or llama.cpp's blocks in MatMulNBits.

llama.cpp's Q4_0 and Q8_0 and MatMulNBits with 4 and 8 bits, block 32 and its default zero point are the same grids,
w = scale * (level - zero point): only the order of the nibbles and the sign of a byte differ. The blocks come from
llama.cpp's own quantizer, so that a GGUF of the same checkpoint and importance holds the same numbers. Matrices are
read, converted and written some rows at a time. Shapes: O a linear's outputs, I its inputs, N = ceil(I / 32) blocks per
row, R rows of a part.
"""
from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from gguf import GGMLQuantizationType
from onnx import TensorProto, helper

from lrc_edge.errors import UserError
from lrc_edge.export.onnx.file import MICROSOFT, OnnxFile
from lrc_edge.export.quantize.encodings import quantize_matrix
from lrc_edge.formats import BLOCK

PART_WEIGHTS = 1 << 20  # converted at once
Result = TypeVar("Result")


@dataclass(frozen=True)
class Grid:
    """w = scale * (level - zero_point), 0 <= level < 2^bits, in blocks of 32 that llama.cpp calls `qtype`."""

    qtype: GGMLQuantizationType
    bits: int

    @property
    def zero_point(self) -> int:
        """Return MatMulNBits' default zero point."""
        return 1 << (self.bits - 1)

    def names(self, weight: str) -> tuple[str, str]:
        """Return the names of a packed matrix's two initializers: levels and scales."""
        return f"{weight}.{self.qtype.name.lower()}", f"{weight}.scales"


Q4_0 = Grid(GGMLQuantizationType.Q4_0, 4)
Q8_0 = Grid(GGMLQuantizationType.Q8_0, 8)
GRIDS = (Q4_0, Q8_0)
PLAIN_TYPES = {np.dtype(np.float32): "F32", np.dtype(np.float16): "F16"}  # as GGUF calls them


class Plain:
    """Every matrix in one type, float32 or float16, in which the graph then computes. Implements WeightFormat."""

    def __init__(self, type: np.dtype):
        self.type = type
        self.onnx_type: int = helper.np_dtype_to_tensor_dtype(type)

    def linear(self, file: OnnxFile, name: str, weight_OI: torch.Tensor, x: str, output: str) -> str:
        return file.node("MatMul", [x, self._store(file, name, weight_OI.T)], output)

    def embedding(self, file: OnnxFile, name: str, weight_OI: torch.Tensor, ids: str, output: str) -> str:
        return file.node("Gather", [self._store(file, name, weight_OI), ids], output)

    def head(self, file: OnnxFile, name: str, weight_OI: torch.Tensor, x: str, output: str) -> str:
        return self.linear(file, name, weight_OI, x, output)

    def tied_head(self, file: OnnxFile, name: str, shape_OI: tuple[int, ...], x: str, output: str) -> str:
        # Transposes inside the product; a Transpose node would be folded into a second copy of the largest matrix.
        return file.node("FusedMatMul", [x, name], output, domain=MICROSOFT, transB=1)

    def _store(self, file: OnnxFile, name: str, matrix: torch.Tensor) -> str:
        parts = (array_of(rows, self.type, name) for rows in _parts(matrix))
        return file.weight_in_parts(name, matrix.shape, self.type, parts)


class Blocks:
    """Linears on one grid, embedding and LM head on another. Implements WeightFormat; the graph computes in float32.

    Embedding and LM head in 4 bits cost a large part of the quality. KL to float32 on 2,048 tokens of TinyStories, with
    both on Q4_0 and with both on Q8_0: a llama of 9M parameters 0.0057 and 0.0019; stories260K 0.142 and 0.109; a
    student of stories260K, half as wide, 0.203 and 0.155.

    `accuracy_level` is MatMulNBits' own: 0 and 1 compute in float32, 4 rounds activations to int8. 8 bits in float32
    are exact but slow in onnxruntime 1.31: 97 ms for a head of 32,000 x 1024 and one token on one thread, against
    0.9 ms at level 4, 3.4 ms in plain float32 and 1.3 ms with 4 bits.

    `importance`: imatrix.collect's. `threads`: for quantizing; the result does not depend on their number.
    `trained_on_grid`: count the blocks that hold exactly the trained weights (`identical_blocks`).
    """

    type: np.dtype = np.dtype(np.float32)
    onnx_type: int = TensorProto.FLOAT

    def __init__(self, linears: Grid, ends: Grid, accuracy_level: int,
                 importance: Mapping[str, np.ndarray] | None = None, threads: int | None = None,
                 trained_on_grid: bool = False):
        self.trained_on_grid = trained_on_grid
        self._identical: list[np.ndarray] = []
        self.linears, self.ends, self.accuracy_level = linears, ends, accuracy_level
        self.importance, self.threads = importance or {}, threads or os.cpu_count() or 1

    @property
    def identical_blocks(self) -> float | None:
        """Share of blocks with exactly the trained weights, once all are stored; None without QAT."""
        return float(np.concatenate(self._identical).mean()) if self.trained_on_grid else None

    def linear(self, file: OnnxFile, name: str, weight_OI: torch.Tensor, x: str, output: str) -> str:
        self._store(file, self.linears, name, weight_OI)
        return self._product(file, self.linears, name, weight_OI.shape, x, output)

    def embedding(self, file: OnnxFile, name: str, weight_OI: torch.Tensor, ids: str, output: str) -> str:
        """Add an embedding that standard operators unpack, since onnxruntime-web lacks GatherBlockQuantized."""
        packed, scales = self._store(file, self.ends, name, weight_OI)
        bytes_ = file.node("Gather", [packed, ids], f"{output}/bytes")  # (B, T, N, 32)
        levels = file.node("Sub", [file.node("Cast", [bytes_], f"{output}/float", to=TensorProto.FLOAT),
                                   file.constant(float(self.ends.zero_point), np.float32)], f"{output}/levels")
        scale = file.node("Unsqueeze", [file.node("Gather", [scales, ids], f"{output}/row_scales"),
                                        file.constant([-1])], f"{output}/scale")
        weights = file.node("Mul", [levels, scale], f"{output}/weights")
        n_inputs = weight_OI.shape[1]
        if n_inputs % BLOCK == 0:
            return file.node("Reshape", [weights, file.constant([0, 0, n_inputs])], output)
        padded = file.node("Reshape", [weights, file.constant([0, 0, -1])], f"{output}/padded")
        return file.node("Slice", [padded, file.constant([0]), file.constant([n_inputs]), file.constant([2])], output)

    def head(self, file: OnnxFile, name: str, weight_OI: torch.Tensor, x: str, output: str) -> str:
        self._store(file, self.ends, name, weight_OI)
        return self._product(file, self.ends, name, weight_OI.shape, x, output)

    def tied_head(self, file: OnnxFile, name: str, shape_OI: tuple[int, ...], x: str, output: str) -> str:
        return self._product(file, self.ends, name, shape_OI, x, output)

    def _product(self, file: OnnxFile, grid: Grid, name: str, shape_OI: tuple[int, ...], x: str, output: str) -> str:
        return file.node("MatMulNBits", [x, *grid.names(name)], output, domain=MICROSOFT, N=shape_OI[0],
                         K=shape_OI[1], bits=grid.bits, block_size=BLOCK, accuracy_level=self.accuracy_level)

    def _store(self, file: OnnxFile, grid: Grid, name: str, weight_OI: torch.Tensor) -> tuple[str, str]:
        """Write levels as they are made, then the scales (an eighth of a byte per weight)."""
        levels_name, scales_name = grid.names(name)
        n_outputs, n_blocks = weight_OI.shape[0], -(-weight_OI.shape[1] // BLOCK)
        importance_I, scales_ON = self.importance.get(name), []

        def packed(rows_RI: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
            weight_RI = array_of(rows_RI, np.dtype(np.float32), name)
            try:
                part, scales_RN = pack(weight_RI, grid, importance_I)
            except UserError as error:
                raise UserError(f"{name}: {error}") from error
            if self.trained_on_grid:  # rows are whole blocks then
                equal = unpack(part, scales_RN, grid) == weight_RI.reshape(*scales_RN.shape, BLOCK)
                self._identical.append(equal.all(-1).reshape(-1))
            return part, scales_RN

        def levels() -> Iterator[np.ndarray]:
            for part, scales_RN in _in_order(packed, _parts(weight_OI), self.threads):
                scales_ON.append(scales_RN)
                yield part

        shape = (n_outputs, n_blocks, BLOCK * grid.bits // 8)
        file.weight_in_parts(levels_name, shape, np.dtype(np.uint8), levels())
        return levels_name, file.weight(scales_name, np.concatenate(scales_ON))


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
    rows = quantize_matrix(weight_RI, grid.qtype, importance_I)
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
