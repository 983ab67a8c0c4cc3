"""Matrices in an ONNX graph: as float32, or as Q4_0 blocks in MatMulNBits."""
from __future__ import annotations

import numpy as np

from lrc_edge.export.onnx_file import MICROSOFT, OnnxFile


class Float32:
    """Plain float32. Implements onnx_graph.WeightFormat."""

    tensor_type = "F32"

    def linear(self, file: OnnxFile, name: str, weight_OI: np.ndarray, x: str, output: str) -> str:
        return file.node("MatMul", [x, file.weight(name, weight_OI.T)], output)

    def embedding(self, file: OnnxFile, name: str, weight_OI: np.ndarray, ids: str, output: str) -> str:
        return file.node("Gather", [file.weight(name, weight_OI), ids], output)

    def tied_linear(self, file: OnnxFile, name: str, shape_OI: tuple[int, ...], x: str, output: str) -> str:
        # Transposes inside the product; a Transpose node would be folded into a second copy of the largest matrix.
        return file.node("FusedMatMul", [x, name], output, domain=MICROSOFT, transB=1)
