"""A GGUF file with random weights, to time a shape. Written without PyTorch, so that devices can do it, too."""
from __future__ import annotations

from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter

from lrc_edge.errors import UserError
from lrc_edge.families import EMBEDDING, HEAD, Architecture, Weight, family_of, weights_of
from lrc_edge.formats import TYPES, format_of
from lrc_edge.gguf_names import gguf_name
from lrc_edge.gguf_sizes import write_sizes
from lrc_edge.shape import ModelShape
from lrc_edge.targets.timing.random_values import PERIOD, SCALE, levels, normal


def write_random_gguf(shape: ModelShape, format_: str, path: Path) -> None:
    """Write a file of this shape and format: one of profile.PROFILE_FORMATS that is a GGUF. It has no tokenizer.

    Raises UserError for a family without a llama.cpp graph.
    """
    writer = GGUFWriter(path, _architecture(shape).name)
    writer.add_tokenizer_model("none")
    write_sizes(writer, shape, shape.max_position_embeddings, epsilon=1e-5)
    weights = list(weights_of(shape))
    for weight in weights:
        kind = _type(weight, format_)
        block, n_bytes = TYPES[kind.name]
        writer.add_tensor_info(gguf_name(weight), weight.shape, np.dtype(np.float32), weight.numel // block * n_bytes,
                               raw_dtype=kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    finally:
        writer.close()
    with path.open("ab") as file:
        for weight in weights:
            file.write(bytes(-file.tell() % writer.data_alignment))
            file.write(_data(weight, _type(weight, format_)))


def _architecture(shape: ModelShape) -> Architecture:
    for graph in family_of(shape.family).gguf:
        if not graph.square_attention or shape.q_size == shape.hidden_size:
            return graph
    raise UserError(f"{shape.family}: llama.cpp has no graph for it; time its ONNX file")


def _type(weight: Weight, format_: str) -> GGMLQuantizationType:
    """Return the type that llama.cpp's quantizer gives the weight: F16 where the blocks do not fit its rows."""
    if len(weight.shape) < 2:
        return GGMLQuantizationType.F32
    row = format_of(format_)
    if weight.shape[-1] % row.block:
        return GGMLQuantizationType.F16
    return GGMLQuantizationType[str(row.ends if weight.role in (EMBEDDING, HEAD) else row.type)]


# Type -> numpy's type of a block; levels are centred at 8 (Q4_0) and 0 (Q8_0).
_BLOCKS = {GGMLQuantizationType.Q4_0: np.dtype([("scale", "<f2"), ("levels", "u1", 16)]),
           GGMLQuantizationType.Q8_0: np.dtype([("scale", "<f2"), ("levels", "u1", 32)])}
_LARGEST = {GGMLQuantizationType.Q4_0: 8, GGMLQuantizationType.Q8_0: 127}
_PLAIN: dict[GGMLQuantizationType, np.dtype] = {
    GGMLQuantizationType.F32: np.dtype("<f4"), GGMLQuantizationType.F16: np.dtype("<f2")}


def _data(weight: Weight, kind: GGMLQuantizationType) -> bytes:
    """Return random values as they are stored; ones for vectors, which are mostly gains."""
    if len(weight.shape) < 2:
        return np.ones(weight.numel, _PLAIN[kind]).tobytes()
    if kind in _PLAIN:
        return normal(weight.numel, _PLAIN[kind]).tobytes()
    blocks = np.zeros(PERIOD, _BLOCKS[kind])
    blocks["levels"] = levels(blocks["levels"].size).reshape(blocks["levels"].shape)
    blocks["scale"] = 2 * SCALE / _LARGEST[kind]
    return np.resize(blocks, weight.numel // TYPES[kind.name][0]).tobytes()
