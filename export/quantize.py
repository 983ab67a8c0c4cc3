"""The GGUF encodings, llama.cpp's quantizer, and what a finished file really holds."""
from __future__ import annotations

import ctypes
import difflib
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import llama_cpp
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader

from lrc_edge import llama_log
from lrc_edge.artifact import Fallback
from lrc_edge.errors import UserError

QType = GGMLQuantizationType

# Encodings whose name is not the name of their main tensor type, cut at the size letter. Source:
# llama_ftype_get_default_type in llama.cpp's src/llama-quant.cpp.
_MAIN_TYPES = {"iq2_s": QType.IQ2_XS, "iq2_m": QType.IQ2_S, "iq3_xs": QType.IQ3_S, "iq3_m": QType.IQ3_S}
# Put the whole model, or part of its mixture, into types that are garbage without an importance matrix; llama.cpp
# refuses them then. Source: tensor_requires_imatrix, ibidem.
_NEEDS_IMATRIX = {"iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq2_m", "iq3_xxs", "iq3_xs", "q2_k_s"}
# MXFP4_MOE is for experts, of which a dense model has none; NVFP4 has no quantizer.
_NOT_OFFERED = {"mxfp4_moe", "nvfp4"}
# What llama.cpp takes for a row that its super-block of 256 does not divide. Source: tensor_type_fallback, ibidem.
_SUBSTITUTES = {
    QType.Q2_K: QType.Q4_0, QType.Q3_K: QType.Q4_0, QType.TQ1_0: QType.Q4_0, QType.TQ2_0: QType.Q4_0,
    QType.Q4_K: QType.Q5_0, QType.Q5_K: QType.Q5_1, QType.Q6_K: QType.Q8_0,
    QType.IQ1_S: QType.IQ4_NL, QType.IQ1_M: QType.IQ4_NL, QType.IQ2_XXS: QType.IQ4_NL, QType.IQ2_XS: QType.IQ4_NL,
    QType.IQ2_S: QType.IQ4_NL, QType.IQ3_XXS: QType.IQ4_NL, QType.IQ3_S: QType.IQ4_NL, QType.IQ4_XS: QType.IQ4_NL,
}
# The k-quant that a mixture must have asked for where a file holds its substitute.
_SUBSTITUTED = {QType.Q8_0: QType.Q6_K, QType.Q5_1: QType.Q5_K, QType.Q5_0: QType.Q4_K, QType.Q4_0: QType.Q3_K}
_DIRECT = (QType.F32, QType.F16, QType.BF16)


@dataclass(frozen=True)
class Encoding:
    """One entry of llama.cpp's quantizer."""

    name: str  # "q4_k_m"
    ftype: int  # llama_ftype, and general.file_type of the file
    type: GGMLQuantizationType  # of most tensors; mixtures give some tensors another on purpose
    needs_imatrix: bool

    @property
    def direct(self) -> bool:
        """Written without the quantizer."""
        return self.type in _DIRECT

    @property
    def block(self) -> int:
        """Elements of a row that share a scale: a row must be a multiple of it."""
        return GGML_QUANT_SIZES[self.type][0]


def _encodings() -> dict[str, Encoding]:
    """From the llama_ftype constants of llama_cpp, without those whose tensor type the gguf package cannot read."""
    table = {}
    for constant, ftype in vars(llama_cpp.llama_cpp).items():
        for prefix in ("LLAMA_FTYPE_ALL_", "LLAMA_FTYPE_MOSTLY_"):
            if not constant.startswith(prefix):
                continue
            name = constant.removeprefix(prefix).lower()
            stem = name.upper() if name.upper() in QType.__members__ else name.upper().rsplit("_", 1)[0]
            main = _MAIN_TYPES.get(name) or QType.__members__.get(stem)
            if main is not None and name not in _NOT_OFFERED:
                table[name] = Encoding(name, ftype, main, name in _NEEDS_IMATRIX)
    return table


ENCODINGS = _encodings()


def parse_encoding(text: str) -> Encoding:
    """The encoding of a name in any case. Raises UserError with the nearest name when it is unknown."""
    name = text.strip().lower()
    if name not in ENCODINGS:
        near = difflib.get_close_matches(name, ENCODINGS, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(f"GGUF encoding {text!r} is unknown; {hint}known: {', '.join(ENCODINGS)}")
    return ENCODINGS[name]


def quantize_file(source: Path, target: Path, encoding: Encoding, threads: int | None = None,
                  importance: Mapping[str, np.ndarray] | None = None) -> None:
    """Let llama.cpp quantize the GGUF `source` (F32, F16 or BF16) to `target`.

    threads: at most the machine's processors, which is also the default. importance: GGUF tensor name -> weight of each
    input channel (row length,) float32. Raises UserError with llama.cpp's reason.
    """
    if encoding.needs_imatrix and not importance:
        raise UserError(f"GGUF encoding {encoding.name} is garbage without an importance matrix, and there is none; "
                        "set export.calibration_tokens above 0 or take q2_k, q3_k_s, iq4_xs or a larger type")
    processors = os.cpu_count() or 1
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = encoding.ftype
    params.nthread = min(threads or processors, processors)
    overrides = _overrides(source, encoding)
    if overrides is not None:
        params.tt_overrides = ctypes.cast(overrides, type(params.tt_overrides))
    matrix = _imatrix(importance) if importance else None
    if matrix is not None:
        params.imatrix = ctypes.cast(matrix, type(params.imatrix))
    llama_log.listen()
    status = llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(target), ctypes.byref(params))
    if status:
        raise UserError(f"{target.name}: llama.cpp could not quantize to {encoding.name}: "
                        f"{llama_log.errors() or f'status {status}'}")


def _imatrix(importance: Mapping[str, np.ndarray]) -> ctypes.Array:
    """The array that llama_model_quantize_params.imatrix points to; it ends with an entry without a name.

    It points into `importance`, which must outlive it.
    """
    kind = llama_cpp.llama_cpp.llama_model_imatrix_data
    pointer = ctypes.POINTER(ctypes.c_float)
    for name, values in importance.items():
        if values.dtype != np.float32 or values.ndim != 1 or not values.flags.c_contiguous:
            raise ValueError(f"imatrix: {name} is {values.dtype} {values.shape}, need contiguous float32 (row length,)")
    return (kind * (len(importance) + 1))(
        *(kind(name.encode(), values.ctypes.data_as(pointer), values.size) for name, values in importance.items()))


def _overrides(source: Path, encoding: Encoding) -> ctypes.Array | None:
    """llama.cpp knows no substitute for block sizes other than 32 and 256 (Q1_0 has 128) and gives up: say F16."""
    if encoding.block in (32, 256):
        return None
    names = [tensor.name for tensor in GGUFReader(source).tensors
             if len(tensor.shape) > 1 and int(tensor.shape[0]) % encoding.block]
    kind = llama_cpp.llama_cpp.llama_model_tensor_override
    # The list ends with an entry without a pattern.
    return (kind * (len(names) + 1))(*(kind(f"^{name}$".encode(), QType.F16) for name in names))


@dataclass(frozen=True)
class Contents:
    """What a GGUF file holds."""

    tensor_types: dict[str, int]  # type -> number of tensors
    data_bytes: int  # of all tensors, padding left out
    fallbacks: tuple[Fallback, ...]


def read_contents(file: Path, encoding: Encoding) -> Contents:
    """Read a finished file back and judge every tensor's type against the encoding."""
    tensors = GGUFReader(file).tensors
    counts = Counter(tensor.tensor_type.name for tensor in tensors)
    found = (judge_type(tensor.name, [int(n) for n in tensor.shape], tensor.tensor_type, encoding)
             for tensor in tensors)
    return Contents(dict(sorted(counts.items())), sum(int(tensor.n_bytes) for tensor in tensors),
                    tuple(fallback for fallback in found if fallback))


def judge_type(name: str, shape: Sequence[int], got: GGMLQuantizationType, encoding: Encoding) -> Fallback | None:
    """A Fallback when the tensor has another type than the encoding would give it if only its rows allowed.

    shape: GGUF's order, row length first. A mixture's own choices (Q4_K_M holds some tensors in Q6_K, most encodings
    the output in Q6_K) are no fallbacks: there the row is a multiple of the super-block and llama.cpp chose freely.
    """
    row = shape[0]
    if len(shape) < 2 or got == encoding.type or encoding.direct:
        return None
    wanted = encoding.type
    if _SUBSTITUTES.get(wanted) != got:
        wanted = _SUBSTITUTED.get(got, wanted)
    block = GGML_QUANT_SIZES[wanted][0]
    if row % block == 0:
        return None
    kind = "super-block" if block == 256 else "block"
    return Fallback(name, wanted.name, got.name, f"row of {row} is not a multiple of {block} ({wanted.name} {kind})")
