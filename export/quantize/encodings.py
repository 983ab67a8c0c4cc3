"""The GGUF encodings in llama.cpp, its quantizer, and the contents of a finished file."""
from __future__ import annotations

import ctypes
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import llama_cpp
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader

from lrc_edge import llama_log
from lrc_edge.artifact import Fallback
from lrc_edge.errors import UserError
from lrc_edge.formats import format_of, formats_of

QType = GGMLQuantizationType

# What llama.cpp uses for a row that is not a multiple of its super-block of 256. Source: tensor_type_fallback in
# llama.cpp's src/llama-quant.cpp.
_SUBSTITUTES = {
    QType.Q2_K: QType.Q4_0, QType.Q3_K: QType.Q4_0, QType.TQ1_0: QType.Q4_0, QType.TQ2_0: QType.Q4_0,
    QType.Q4_K: QType.Q5_0, QType.Q5_K: QType.Q5_1, QType.Q6_K: QType.Q8_0,
    QType.IQ1_S: QType.IQ4_NL, QType.IQ1_M: QType.IQ4_NL, QType.IQ2_XXS: QType.IQ4_NL, QType.IQ2_XS: QType.IQ4_NL,
    QType.IQ2_S: QType.IQ4_NL, QType.IQ3_XXS: QType.IQ4_NL, QType.IQ3_S: QType.IQ4_NL, QType.IQ4_XS: QType.IQ4_NL,
}
# Substitute -> the k-quant that the mixture must have asked for.
_SUBSTITUTED = {QType.Q8_0: QType.Q6_K, QType.Q5_1: QType.Q5_K, QType.Q5_0: QType.Q4_K, QType.Q4_0: QType.Q3_K}
_DIRECT = (QType.F32, QType.F16, QType.BF16)
_TENSOR_LINE = re.compile(r"\[ *\d+/ *\d+\] +(\S+) +- \[")  # of the quantizer's log, one a tensor
_END_TENSORS = ("token_embd.weight", "output.weight")


@dataclass(frozen=True)
class Encoding:
    """One entry of llama.cpp's quantizer."""

    name: str  # "q4_k_m"
    ftype: int  # llama_ftype, and general.file_type of the file
    type: GGMLQuantizationType  # of most tensors; mixtures give some tensors another on purpose
    needs_imatrix: bool
    ends: GGMLQuantizationType | None = None  # of embedding and head, where we choose it; None: llama.cpp chooses
    trained_on_grid: bool = False
    tensor_types: tuple[tuple[str, GGMLQuantizationType], ...] = ()  # mixed precision: every matrix and its own type

    @property
    def direct(self) -> bool:
        """Written without the quantizer."""
        return self.type in _DIRECT

    @property
    def block(self) -> int:
        """Elements per block: a row must be a multiple of it."""
        return GGML_QUANT_SIZES[self.type][0]


def _encodings() -> dict[str, Encoding]:
    """Return the GGUF rows of FORMATS with llama.cpp's numbers, except types that this llama.cpp or gguf lacks."""
    table = {}
    for name, row in formats_of("gguf").items():
        prefix = "LLAMA_FTYPE_ALL" if name == "f32" else "LLAMA_FTYPE_MOSTLY"
        ftype, type = getattr(llama_cpp, f"{prefix}_{name.upper()}", None), QType.__members__.get(row.type)
        if ftype is not None and type is not None:
            ends = QType.__members__[row.ends] if row.ends and row.ends != row.type else None
            table[name] = Encoding(name, ftype, type, row.needs_imatrix, ends, row.trained_on_grid)
    return table


ENCODINGS = _encodings()


def parse_encoding(text: str) -> Encoding:
    """Return the encoding named `text`, ignoring case. Raises UserError with the nearest name."""
    name = format_of(f"gguf:{text.strip()}").encoding
    if name not in ENCODINGS:
        raise UserError(f"GGUF encoding {name}: this llama.cpp or gguf package does not have it; install newer ones")
    return ENCODINGS[name]


def check_imatrix(encoding: Encoding, has_importance: bool) -> None:
    """Raise UserError when the encoding needs an importance matrix and none is given."""
    if encoding.needs_imatrix and not has_importance:
        raise UserError(f"GGUF encoding {encoding.name} is garbage without an importance matrix, and there is none; "
                        "set export.calibration_tokens above 0 or take q2_k, q3_k_s, iq4_xs or a larger type")


def quantize_file(source: Path, target: Path, encoding: Encoding, threads: int | None = None,
                  importance: Mapping[str, np.ndarray] | None = None, n_chunks: int | None = None,
                  progress: Callable[[str], None] = lambda _: None) -> None:
    """Let llama.cpp quantize the GGUF `source` (F32, F16 or BF16) to `target`.

    threads: at most the machine's processors, which is also the default. importance: GGUF tensor name -> weight of each
    input channel (row length,) float32, above 0; n_chunks, its number of sequences of text, is only recorded in the
    file.
    progress: is called with the name of each tensor when llama.cpp begins with it. Raises UserError with llama.cpp's
    reason.
    """
    check_imatrix(encoding, bool(importance))
    processors = os.cpu_count() or 1
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = encoding.ftype
    params.nthread = min(threads or processors, processors)
    overrides = _overrides(source, encoding)
    if overrides is not None:
        params.tt_overrides = ctypes.cast(overrides, type(params.tt_overrides))
    if encoding.ends is not None:
        params.pure = True
        if _embedding_row(source) % GGML_QUANT_SIZES[encoding.ends][0] == 0:  # llama.cpp would not check, and abort
            params.token_embedding_type = params.output_tensor_type = encoding.ends
    if importance:
        matrix, notes = _imatrix(importance), _imatrix_metadata(len(importance), n_chunks)
        params.imatrix = ctypes.cast(matrix, type(params.imatrix))
        params.kv_overrides = ctypes.cast(notes, type(params.kv_overrides))
    llama_log.listen()

    def hear(text: str) -> None:
        if match := _TENSOR_LINE.match(text):
            progress(match[1])

    with llama_log.heard_by(hear):
        status = llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(target), ctypes.byref(params))
    if status:
        raise UserError(f"{target.name}: llama.cpp could not quantize to {encoding.name}: "
                        f"{llama_log.errors() or f'status {status}'}")


def quantize_matrix(weight_OI: np.ndarray, type: GGMLQuantizationType, importance_I: np.ndarray | None = None
                    ) -> np.ndarray:
    """Return llama.cpp's blocks of one matrix: (O, bytes of a row) uint8. Each row is quantized separately.

    importance_I: as in quantize_file, (I,) float32. Raises ValueError for input on which ggml would abort, and
    UserError when the blocks are not finite.
    """
    weight_OI = np.ascontiguousarray(weight_OI, dtype=np.float32)
    n_rows, row = weight_OI.shape
    block, block_bytes = GGML_QUANT_SIZES[type]
    ggml = _ggml()
    if type not in {encoding.type for encoding in ENCODINGS.values() if not encoding.direct}:
        raise ValueError(f"quantize: llama.cpp has no quantizer for {type.name}")
    if row % block:
        raise ValueError(f"quantize: row of {row} is not a multiple of {block} ({type.name} block)")
    if importance_I is not None:
        _check_importance("importance", importance_I, row)
    elif ggml.ggml_quantize_requires_imatrix(type):
        raise ValueError(f"quantize: {type.name} needs an importance")
    blocks = np.empty((n_rows, row // block * block_bytes), np.uint8)
    ggml.ggml_quantize_chunk(type, weight_OI.ctypes.data, blocks.ctypes.data, 0, n_rows, row,
                             None if importance_I is None else importance_I.ctypes.data)
    if not ggml.ggml_validate_row_data(type, blocks.ctypes.data, blocks.nbytes):
        raise UserError(f"weights that {type.name} cannot hold: NaN, infinite or too large; check the checkpoint")
    return blocks


def dequantize(blocks: np.ndarray, type: GGMLQuantizationType, n: int) -> np.ndarray | None:
    """Decode contiguous uint8 blocks to float32 (n,) with llama.cpp's own code; None for a type it cannot read.

    Raises ValueError unless the blocks hold exactly n values.
    """
    block, block_bytes = GGML_QUANT_SIZES[type]
    if not blocks.flags.c_contiguous or n % block or blocks.nbytes != n // block * block_bytes:
        raise ValueError(f"dequantize: {blocks.nbytes} bytes of {type.name} are not {n} values")
    function = getattr(_ggml(), f"dequantize_row_{type.name.lower().replace('_k', '_K')}", None)
    if function is None:
        return None
    values = np.empty(n, np.float32)
    function(ctypes.c_void_p(blocks.ctypes.data), ctypes.c_void_p(values.ctypes.data), ctypes.c_int64(n))
    return values


@cache
def _ggml() -> ctypes.CDLL:
    """Return ggml's quantizer from the loaded libllama, since a second copy of the library could differ."""
    library = llama_cpp.llama_cpp._lib
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    for name, result, arguments in (
            ("ggml_quantize_chunk", ctypes.c_size_t, [ctypes.c_int, pointer, pointer, count, count, count, pointer]),
            ("ggml_quantize_requires_imatrix", ctypes.c_bool, [ctypes.c_int]),
            ("ggml_validate_row_data", ctypes.c_bool, [ctypes.c_int, pointer, ctypes.c_size_t])):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def _imatrix(importance: Mapping[str, np.ndarray]) -> ctypes.Array:
    """Return the array for llama_model_quantize_params.imatrix, which ends with an entry without a name.

    It points into `importance`, which must outlive it.
    """
    kind = llama_cpp.llama_cpp.llama_model_imatrix_data
    pointer = ctypes.POINTER(ctypes.c_float)
    for name, values in importance.items():
        _check_importance(name, values, values.size)
    return (kind * (len(importance) + 1))(
        *(kind(name.encode(), values.ctypes.data_as(pointer), values.size) for name, values in importance.items()))


def _check_importance(name: str, values: np.ndarray, row: int) -> None:
    """Raise ValueError for an invalid importance. All-zero importance would make the quantizer write zeros."""
    if values.dtype != np.float32 or values.shape != (row,) or not values.flags.c_contiguous:
        raise ValueError(f"imatrix: {name} is {values.dtype} {values.shape}, need contiguous float32 ({row},)")
    if not (np.isfinite(values) & (values > 0)).all():
        raise ValueError(f"imatrix: {name} has {values.min()} to {values.max()}, need finite values above 0")


def _imatrix_metadata(n_entries: int, n_chunks: int | None) -> ctypes.Array:
    """Return the keys that llama-quantize records in the file, except the local paths of matrix and text.

    The list ends with an entry without a key. Source: tools/quantize/quantize.cpp in llama.cpp.
    """
    counts = {"entries_count": n_entries} | ({"chunks_count": n_chunks} if n_chunks else {})
    kind, value = llama_cpp.llama_cpp.llama_model_kv_override, llama_cpp.llama_cpp.llama_model_kv_override_value
    return (kind * (len(counts) + 1))(
        *(kind(llama_cpp.LLAMA_KV_OVERRIDE_TYPE_INT, f"quantize.imatrix.{name}".encode(), value(val_i64=n))
          for name, n in counts.items()))


def _overrides(source: Path, encoding: Encoding) -> ctypes.Array | None:
    """Return types of single tensors: those of mixed precision, and F16 where llama.cpp would fail.

    llama.cpp has no fallback type for block sizes other than 32 and 256 (Q1_0 has 128).
    """
    types = dict(encoding.tensor_types)
    if not types and encoding.block not in (32, 256):
        types = {tensor.name: QType.F16 for tensor in GGUFReader(source).tensors
                 if len(tensor.shape) > 1 and int(tensor.shape[0]) % encoding.block}
    if not types:
        return None
    kind = llama_cpp.llama_cpp.llama_model_tensor_override
    # Patterns are regular expressions. The list ends with an entry without one.
    return (kind * (len(types) + 1))(*(kind(f"^{re.escape(name)}$".encode(), type) for name, type in types.items()))


def _embedding_row(source: Path) -> int:
    return next(int(tensor.shape[0]) for tensor in GGUFReader(source).tensors if tensor.name == _END_TENSORS[0])


@dataclass(frozen=True)
class Contents:
    """The contents of a GGUF file."""

    tensor_types: dict[str, int]  # type -> number of tensors
    data_bytes: int  # of all tensors, padding left out
    fallbacks: tuple[Fallback, ...]


def read_contents(file: Path, encoding: Encoding) -> Contents:
    """Read a finished file back and compare every tensor's type with the encoding's."""
    tensors = GGUFReader(file).tensors
    counts = Counter(tensor.tensor_type.name for tensor in tensors)
    found = (judge_type(tensor.name, [int(n) for n in tensor.shape], tensor.tensor_type, encoding)
             for tensor in tensors)
    return Contents(dict(sorted(counts.items())), sum(int(tensor.n_bytes) for tensor in tensors),
                    tuple(fallback for fallback in found if fallback))


def judge_type(name: str, shape: Sequence[int], got: GGMLQuantizationType, encoding: Encoding) -> Fallback | None:
    """Return a Fallback if the tensor has another type than the encoding asks for because its rows do not divide.

    shape: GGUF's order, row length first. A mixture's own choices (Q4_K_M holds some tensors in Q6_K, most encodings
    the LM head in Q6_K) are not fallbacks: there the row is a multiple of the super-block.
    """
    row = shape[0]
    if encoding.tensor_types:
        asked = dict(encoding.tensor_types).get(name, got)
        return None if got == asked else Fallback(name, asked.name, got.name, "llama.cpp chose it")
    wanted = encoding.ends if encoding.ends is not None and name in _END_TENSORS else encoding.type
    if len(shape) < 2 or got == wanted or encoding.direct:
        return None
    if encoding.ends is None and _SUBSTITUTES.get(wanted) != got:
        wanted = _SUBSTITUTED.get(got, wanted)
    block = GGML_QUANT_SIZES[wanted][0]
    if row % block == 0:
        return None
    kind = "super-block" if block == 256 else "block"
    return Fallback(name, wanted.name, got.name, f"row of {row} is not a multiple of {block} ({wanted.name} {kind})")
