"""A GGUF file written again with other metadata or tensors: what damaged files, and other writers' files, are like."""
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, GGUFValueType, GGUFWriter

Metadata = dict[str, Any]  # key -> value; a new key's GGUF type follows from the value
Tensors = dict[str, tuple[np.ndarray, Any]]  # name -> (stored data, type)


def rewrite(source: Path, target: Path, metadata: Callable[[Metadata], Any] = lambda table: None,
            tensors: Callable[[Tensors], Any] = lambda table: None) -> Path:
    """Write `source` again to `target`, its metadata and tensors edited in place by the two functions."""
    reader = GGUFReader(source)
    fields = {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    values: Metadata = {name: field.contents() for name, field in fields.items()}
    data: Tensors = {tensor.name: (np.array(tensor.data), tensor.tensor_type) for tensor in reader.tensors}
    metadata(values)
    tensors(data)
    writer = GGUFWriter(target, values.pop("general.architecture"))
    for name, value in values.items():
        same = name in fields and isinstance(value, list) == isinstance(fields[name].contents(), list)
        types = list(fields[name].types) if same else _types(value)
        writer.add_key_value(name, value, types[0], types[1] if len(types) > 1 else None)
    for name, (array, kind) in data.items():
        writer.add_tensor(name, np.ascontiguousarray(array), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def _types(value: Any) -> list[GGUFValueType]:
    if isinstance(value, list):
        return [GGUFValueType.ARRAY, *_types(value[0])]
    return [{bool: GGUFValueType.BOOL, int: GGUFValueType.UINT32, float: GGUFValueType.FLOAT32,
             str: GGUFValueType.STRING}[type(value)]]
