"""Describe an ONNX file: interface, operators, and bits per weight, without reading the external data."""
from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lrc_edge.errors import UserError, one_line
from lrc_edge.figures import visible

_FLOATS = ("FLOAT", "DOUBLE", "FLOAT16", "BFLOAT16")


def describe_onnx(path: Path) -> dict[str, Any]:
    """Describe the graph at `path` and check the data files that it names.

    `bits_per_weight` counts the bytes that store weights: packed blocks with their scales and zero points, and plain
    tensors. RoPE tables and constants do not count. Raises UserError on a corrupt file, or missing or short data.
    """
    model = load_model(path)
    try:
        return _describe(path, model)
    except (ValueError, LookupError, ArithmeticError, TypeError, RecursionError, OSError) as error:
        raise UserError(f"{path}: its graph is inconsistent ({visible(str(error))[:200]}); "
                        "write or download the file again") from error


def _describe(path: Path, model: Any) -> dict[str, Any]:
    graph = model.graph
    tensors = {t.name: _tensor(t) for t in graph.initializer}
    data_files = check_data_files(path, graph.initializer)
    nodes = list(all_nodes(graph))
    n_params, weight_bytes = _weights(nodes, tensors)
    return {
        "kind": "onnx", "path": str(path), "name": graph.name,
        "bytes": path.stat().st_size + sum(file.stat().st_size for file in data_files),
        "data_files": [file.name for file in data_files], "ir_version": model.ir_version,
        "producer": f"{model.producer_name} {model.producer_version}".strip(),
        "opsets": {entry.domain or "ai.onnx": entry.version for entry in model.opset_import},
        "metadata": {entry.key: entry.value for entry in model.metadata_props},
        "inputs": [_value(v) for v in graph.input if v.name not in tensors],
        "outputs": [_value(v) for v in graph.output],
        "ops": dict(Counter(f"{n.domain}.{n.op_type}".lstrip(".") for n in nodes).most_common()),
        "tensors": [{"name": name, **tensor} for name, tensor in tensors.items()], "n_params": n_params,
        "bits_per_weight": 8 * weight_bytes / n_params if n_params else None}


def load_model(path: Path) -> Any:
    """Load the graph at `path` without the data files. Raises UserError on a corrupt file."""
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load(path, load_external_data=False)
    except (DecodeError, ValueError) as error:
        raise UserError(f"{path}: truncated or corrupt ({one_line(error)}); "
                        "write or download the file again") from error
    if not model.graph.node:  # an empty file is a valid protobuf
        raise UserError(f"{path}: contains no ONNX graph ({path.stat().st_size:,} bytes); "
                        "write or download the file again")
    return model


def _tensor(tensor: Any) -> dict[str, Any]:
    from onnx import TensorProto

    dtype = TensorProto.DataType.Name(tensor.data_type)
    shape = [int(d) for d in tensor.dims]
    return {"dtype": dtype, "shape": shape, "bytes": math.ceil(math.prod(shape) * _bits(dtype) / 8)}


def _bits(dtype: str) -> int:
    """FLOAT8E4M3FN -> 8, UINT4 -> 4."""
    digits = re.search(r"\d+", dtype)
    return int(digits[0]) if digits else {"FLOAT": 32, "DOUBLE": 64, "STRING": 0}.get(dtype, 8)


def check_data_files(path: Path, initializers: Any) -> list[Path]:
    """Return the external data files. Raises UserError if one is missing or too short for its tensors."""
    needed: dict[str, int] = {}
    for tensor in initializers:
        place = {entry.key: entry.value for entry in tensor.external_data}
        if "location" in place:
            end = _count(path, place.get("offset", "0")) + _count(path, place.get("length") or _tensor(tensor)["bytes"])
            needed[place["location"]] = max(end, needed.get(place["location"], 0))
    found = []
    for name, size in needed.items():
        file = path.parent / name
        if not file.resolve().is_relative_to(path.parent.resolve()):
            raise UserError(f"{path}: names a data file outside its folder: {visible(name)}; get an intact copy")
        if not file.is_file():
            raise UserError(f"{path}: its data file {visible(name)} is missing; put it next to the .onnx file")
        if file.stat().st_size < size:
            raise UserError(f"{file}: truncated ({file.stat().st_size:,} bytes, {path.name} needs {size:,}); "
                            "write or download it again")
        found.append(file)
    return found


def _count(path: Path, text: Any) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise UserError(f"{path}: the offset or length of a tensor is {visible(text)!r}, need a number; "
                        "get an intact copy") from error


def all_nodes(graph: Any) -> Iterator[Any]:
    """Yield all nodes, including those of branches and loops."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in [attribute.g, *attribute.graphs] if attribute.HasField("g") else attribute.graphs:
                yield from all_nodes(inner)


def _value(value: Any) -> dict[str, Any]:
    from onnx import TensorProto

    tensor = value.type.tensor_type
    shape = [d.dim_value if d.HasField("dim_value") else d.dim_param or "?" for d in tensor.shape.dim]
    return {"name": value.name, "dtype": TensorProto.DataType.Name(tensor.elem_type), "shape": shape}


def _weights(nodes: list[Any], tensors: dict[str, dict[str, Any]]) -> tuple[int, int]:
    """Return (number of parameters, bytes that store them)."""
    packed, helpers, tables = _packed(nodes, tensors)
    n_params = n_bytes = 0
    for name, tensor in tensors.items():
        n = math.prod(tensor["shape"])
        if name in tables or (name not in packed and name not in helpers and (n <= 1 or not _holds_weights(tensor))):
            continue
        n_bytes += tensor["bytes"]
        n_params += 0 if name in helpers else packed.get(name, n)
    return n_params, n_bytes


def _holds_weights(tensor: dict[str, Any]) -> bool:
    return tensor["dtype"] in _FLOATS or _bits(tensor["dtype"]) <= 8


def _packed(nodes: list[Any], tensors: dict[str, dict[str, Any]]) -> tuple[dict[str, int], set[str], set[str]]:
    """Return (packed initializer -> number of weights in it, scales and zero points, RoPE tables)."""
    packed: dict[str, int] = {}
    helpers: set[str] = set()
    tables: set[str] = set()
    for node in nodes:
        attributes = {a.name: a.i for a in node.attribute}
        if node.op_type == "MatMulNBits":  # A, B, scales, zero_points, g_idx, bias
            packed[node.input[1]] = attributes.get("N", 0) * attributes.get("K", 0)
            helpers.update(node.input[2:5])
        elif node.op_type == "GatherBlockQuantized" and node.input[0] in tensors:  # data, indices, scales, zero_points
            data = tensors[node.input[0]]
            per_element = 8 // attributes.get("bits", 4) if data["dtype"] == "UINT8" else 1
            packed.setdefault(node.input[0], math.prod(data["shape"]) * per_element)
            helpers.update(node.input[2:4])
        elif node.op_type == "DequantizeLinear":  # x, scale, zero_point
            helpers.update(node.input[1:3])
        elif node.op_type == "RotaryEmbedding":
            tables.update(node.input[1:])
        elif node.op_type == "GroupQueryAttention":
            tables.update(node.input[7:9])
    for name, scales, per_byte in _gathered_blocks(nodes, tensors):
        packed.setdefault(name, per_byte * math.prod(tensors[name]["shape"]))
        helpers.add(scales)
    return packed, helpers - {""}, tables - {""}


def _gathered_blocks(nodes: list[Any], tensors: dict[str, dict[str, Any]]) -> Iterator[tuple[str, str, int]]:
    """Yield (bytes, scales, weights per byte) of embeddings that standard operators gather and unpack by row."""
    gathers = [n for n in nodes if n.op_type == "Gather" and n.input[0] in tensors]
    shifted = {name for n in nodes if n.op_type == "BitShift" for name in n.input}
    for rows in gathers:
        levels = tensors[rows.input[0]]
        for other in gathers:
            same_rows = other.input[1] == rows.input[1] and tensors[other.input[0]]["shape"] == levels["shape"][:-1]
            if same_rows and levels["dtype"] == "UINT8":
                yield rows.input[0], other.input[0], 2 if rows.output[0] in shifted else 1
