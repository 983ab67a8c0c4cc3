"""Write an ONNX model: nodes are collected in memory; weights are written directly to data files.

Writing needs memory for one tensor, not for the model, and the graph never reaches protobuf's limit of 2 GB.
transformers.js looks for `<file>.onnx_data`, `<file>.onnx_data_1` ....
"""
from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from lrc_edge import __version__

OPSET = 21
IR_VERSION = 10
MICROSOFT = "com.microsoft"  # onnxruntime's own operators
PAGE = 4096  # onnxruntime maps a tensor from the file, instead of copying it, when it starts at a page
PAGE_ALIGNED_BYTES = 1 << 18  # below this, padding would cost more than mapping saves
SHARD_BYTES = 2_000_000_000  # a browser reads a data file into one buffer, which ends at 2 GiB


class OnnxFile:
    """Collects one graph. `save` finishes it. Use it as a context manager, which closes the data file.

    A data file holds at most `shard_bytes`, unless a single weight is larger, because ONNX cannot split a tensor.
    """

    def __init__(self, path: Path, shard_bytes: int = SHARD_BYTES):
        self.path = path
        self.shard_bytes = shard_bytes
        self.data_paths = [path.with_name(path.name + "_data")]
        self.written: dict[str, tuple[np.dtype, int]] = {}  # name of each weight in the data files -> type, bytes
        self._data = self.data_paths[0].open("wb")
        self._nodes: list[onnx.NodeProto] = []
        self._initializers: dict[str, TensorProto] = {}
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []

    def __enter__(self) -> OnnxFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self._data.close()

    def input(self, name: str, dtype: int, shape: Sequence[int | str]) -> str:
        self._inputs.append(helper.make_tensor_value_info(name, dtype, shape))
        return name

    def output(self, name: str, dtype: int, shape: Sequence[int | str]) -> None:
        self._outputs.append(helper.make_tensor_value_info(name, dtype, shape))

    def node(self, op: str, inputs: Sequence[str], output: str | Sequence[str], *, domain: str = "",
             **attributes: Any) -> str:
        """Add a node, named after its first output, and return that output. An empty input name omits an input."""
        outputs = [output] if isinstance(output, str) else list(output)
        self._nodes.append(helper.make_node(op, list(inputs), outputs, name=outputs[0], domain=domain, **attributes))
        return outputs[0]

    def weight(self, name: str, array: np.ndarray) -> str:
        """Append the array to the data as the initializer `name` and return the name."""
        return self.weight_in_parts(name, array.shape, array.dtype, [array])

    def weight_in_parts(self, name: str, shape: Sequence[int], dtype: np.dtype, parts: Iterable[np.ndarray]) -> str:
        """Like `weight`, for an array in parts: consecutive rows or elements."""
        n_bytes = math.prod(shape) * dtype.itemsize
        offset = self._place_for(n_bytes)
        tensor = TensorProto(name=name, dims=shape, data_type=helper.np_dtype_to_tensor_dtype(dtype),
                             data_location=TensorProto.EXTERNAL)
        for key, value in {"location": self.data_paths[-1].name, "offset": offset, "length": n_bytes}.items():
            tensor.external_data.add(key=key, value=str(value))
        for part in parts:
            self._data.write(np.ascontiguousarray(part, dtype).data)
        if self._data.tell() != offset + n_bytes:
            raise ValueError(f"{self.path}: {name} has {self._data.tell() - offset} bytes, need {n_bytes}")
        self._add(tensor)
        self.written[name] = dtype, n_bytes
        return name

    def _place_for(self, n_bytes: int) -> int:
        """Return the offset, in the last data file or a new one, at which the next n_bytes are written."""
        alignment = PAGE if n_bytes >= PAGE_ALIGNED_BYTES else 64
        end = self._data.tell()
        padding = -end % alignment
        if end and end + padding + n_bytes > self.shard_bytes:
            self._data.close()
            self.data_paths.append(self.path.with_name(f"{self.path.name}_data_{len(self.data_paths)}"))
            self._data = self.data_paths[-1].open("wb")
            return 0
        self._data.write(b"\0" * padding)
        return end + padding

    def constant(self, value: int | float | Sequence[int], dtype: type = np.int64) -> str:
        """Add a small constant to the graph; equal constants are shared."""
        array: np.ndarray = np.asarray(value, dtype=dtype)
        name = f"const.{array.dtype}.{'x'.join(map(str, array.reshape(-1).tolist()))}" + (".scalar" * (array.ndim == 0))
        if name not in self._initializers:
            self._add(numpy_helper.from_array(array, name))
        return name

    def _add(self, tensor: TensorProto) -> None:
        if tensor.name in self._initializers:
            raise ValueError(f"{self.path}: initializer {tensor.name} written twice")
        self._initializers[tensor.name] = tensor

    def save(self, name: str, metadata: dict[str, str]) -> None:
        """Write the graph and have onnx check it. Raises ValueError on an initializer that no node reads."""
        read = {value for node in self._nodes for value in node.input}
        if unused := self._initializers.keys() - read:
            raise ValueError(f"{self.path}: no node reads {sorted(unused)}")
        graph = helper.make_graph(self._nodes, name, self._inputs, self._outputs, list(self._initializers.values()))
        model = helper.make_model(
            graph, ir_version=IR_VERSION, producer_name="lrc-edge", producer_version=__version__,
            opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(MICROSOFT, 1)])
        helper.set_model_props(model, metadata)
        self._data.flush()
        onnx.save(model, self.path)
        onnx.checker.check_model(str(self.path))
