"""An ONNX model on its way to disk: nodes in memory, weights straight into the `_data` file beside it.

Weights never meet in memory, so writing needs room for the largest tensor, not for the model, and the 2 GB limit of a
protobuf is out of reach. `<file>.onnx_data` is the name that onnxruntime-web's users expect (transformers.js).
"""
from __future__ import annotations

from collections.abc import Sequence
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


class OnnxFile:
    """Collects one graph. `save` finishes it; used as a context manager, which closes the data file."""

    def __init__(self, path: Path):
        self.path = path
        self.data_path = path.with_name(path.name + "_data")
        self.written: dict[str, int] = {}  # name of each weight in the data file -> bytes
        self._data = self.data_path.open("wb")
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
        """Add a node, named like its first output, and return that output. An empty input name leaves an input out."""
        outputs = [output] if isinstance(output, str) else list(output)
        self._nodes.append(helper.make_node(op, list(inputs), outputs, name=outputs[0], domain=domain, **attributes))
        return outputs[0]

    def weight(self, name: str, array: np.ndarray) -> str:
        """Append the array to the data file as the initializer `name` and return the name."""
        alignment = PAGE if array.nbytes >= PAGE_ALIGNED_BYTES else 64
        self._data.write(b"\0" * (-self._data.tell() % alignment))
        tensor = TensorProto(name=name, dims=array.shape, data_type=helper.np_dtype_to_tensor_dtype(array.dtype),
                             data_location=TensorProto.EXTERNAL)
        place = {"location": self.data_path.name, "offset": self._data.tell(), "length": array.nbytes}
        for key, value in place.items():
            tensor.external_data.add(key=key, value=str(value))
        self._data.write(np.ascontiguousarray(array).data)
        self._add(tensor)
        self.written[name] = array.nbytes
        return name

    def constant(self, value: int | float | Sequence[int], dtype: type = np.int64) -> str:
        """A small constant inside the graph; equal ones are one."""
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
