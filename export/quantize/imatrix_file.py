"""The importance matrix as a file: llama.cpp's imatrix GGUF, which llama-quantize and llama-imatrix read as well.

For each tensor the file has `<name>.in_sum2`, the sums of squares of its inputs, and `<name>.counts`, the tokens.
Format: tools/imatrix and common/imatrix-loader.cpp in llama.cpp.
"""
from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from gguf import GGUFReader, GGUFType, GGUFWriter, Keys

from lrc_edge.checkpoint import DenseCheckpoint
from lrc_edge.errors import UserError, one_line
from lrc_edge.export.quantize.imatrix import measured_weights
from lrc_edge.gguf_names import gguf_name

SUMS, COUNTS = ".in_sum2", ".counts"


def write_imatrix(file: Path, checkpoint: DenseCheckpoint, importance: Mapping[str, np.ndarray], n_rows: int,
                  row_len: int, dataset: str) -> None:
    """Write imatrix.collect's mean squares of `n_rows` rows of `row_len` tokens, under GGUF's tensor names.

    dataset: identifies the text. Not a path: the file is published, and llama.cpp copies this into what it quantizes.
    """
    writer = GGUFWriter(file, "")
    writer.add_type(GGUFType.IMATRIX)
    writer.add_array(Keys.IMatrix.DATASETS, [dataset])
    writer.add_uint32(Keys.IMatrix.CHUNK_COUNT, n_rows)
    writer.add_uint32(Keys.IMatrix.CHUNK_SIZE, row_len)
    n_tokens = n_rows * row_len
    for weight in sorted(measured_weights(checkpoint), key=gguf_name):
        sums = importance[weight.name].astype(np.float64) * n_tokens
        writer.add_tensor(gguf_name(weight) + SUMS, sums.astype(np.float32))
        writer.add_tensor(gguf_name(weight) + COUNTS, np.array([n_tokens], np.float32))
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def read_imatrix(file: Path, checkpoint: DenseCheckpoint) -> dict[str, np.ndarray]:
    """Return weight name -> mean square of its inputs, (in_features,) float32, bit for bit as llama-quantize reads it.

    Raises UserError when the file is not the imatrix of this checkpoint's matrices.
    """
    try:
        tensors = {tensor.name: np.array(tensor.data) for tensor in GGUFReader(file).tensors}
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise UserError(f"{file}: not an imatrix GGUF ({one_line(error)}); make it again") from error
    importance = {}
    for weight in measured_weights(checkpoint):
        sums, counts = (tensors.pop(gguf_name(weight) + suffix, None) for suffix in (SUMS, COUNTS))
        if (sums is None or counts is None or sums.shape != weight.shape[1:] or counts.shape != (1,)
                or {sums.dtype, counts.dtype} != {np.dtype(np.float32)} or not counts[0] > 0):
            raise UserError(f"{file}: {gguf_name(weight)} has sums {getattr(sums, 'shape', None)} of counts {counts}, "
                            f"need {weight.shape[1:]} and one above 0; give the imatrix of this model")
        with np.errstate(all="ignore"):
            importance[weight.name] = mean = sums / counts[0]
        if not (np.isfinite(mean) & (mean >= 0)).all():
            raise UserError(f"{file}: {gguf_name(weight)} has sums from {sums.min()} to {sums.max()} of {counts[0]} "
                            "tokens, need mean squares that are finite and not negative; make it again")
    if tensors:
        raise UserError(f"{file}: {min(tensors)} is of no matrix of {checkpoint.name}; give the imatrix of this model")
    return importance
