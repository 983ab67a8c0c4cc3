"""The formats: one row for each encoding of a GGUF or an ONNX file, with every fact that other code needs about it.

`--formats` names a row: "gguf:q4_k_m". Code reads the row and never compares names. Facts that need llama.cpp (the
number of a file type, the quantizer) are in export/quantize/encodings.py under the same names; which runtimes read a
kind of file is in targets/runtimes/table.py.
"""
from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from typing import Any, Literal, get_args

from lrc_edge.errors import UserError

Kind = Literal["gguf", "onnx"]
KINDS: tuple[Kind, ...] = get_args(Kind)  # each also names the stage that writes it, and its folder
BLOCK = 32  # weights that share a scale in Q4_0 and Q8_0

# ggml's type of a matrix -> weights per block, bytes per block. Source: GGML_QUANT_SIZES.
TYPES = {
    "F32": (1, 4), "F16": (1, 2), "BF16": (1, 2), "Q4_0": (BLOCK, 18), "Q4_1": (32, 20), "Q5_0": (32, 22),
    "Q5_1": (32, 24), "Q8_0": (BLOCK, 34), "Q2_K": (256, 84), "Q3_K": (256, 110), "Q4_K": (256, 144),
    "Q5_K": (256, 176), "Q6_K": (256, 210), "IQ1_S": (256, 50), "IQ1_M": (256, 56), "IQ2_XXS": (256, 66),
    "IQ2_XS": (256, 74), "IQ2_S": (256, 82), "IQ3_XXS": (256, 98), "IQ3_S": (256, 110), "IQ4_XS": (256, 136),
    "IQ4_NL": (32, 18), "TQ1_0": (256, 54), "TQ2_0": (256, 66), "Q1_0": (128, 18)}
# Types with the limits of quantized files that are not names of encodings: types of mixtures, and types that are not
# written here. `verify` names a third-party GGUF after the type of most of its bytes.
QUANTIZED_TYPES = ("q3_k", "q4_k", "q5_k", "mxfp4", "nvfp4")
_LONGER_SCALES = {"gguf": 0, "onnx": 2}  # bytes per block beyond TYPES: float32 scales instead of float16
_MIXED = re.compile(r"[\d.]+bpw")


@dataclass(frozen=True, kw_only=True)
class Format:
    """One encoding. The three gates are names of limits in recipe.Gates."""

    kind: Kind
    encoding: str  # "q4_k_m"
    type: str  # of most matrices: a key of TYPES
    ends: str | None  # type of embedding and head; None: a mixture, whose types llama.cpp chooses
    file: str  # "{model}-Q4_K_M.gguf"; of ONNX the path in its folder, "onnx/model_q4.onnx"
    kl_gate: str
    device_kl_gate: str  # on a device
    top1_gate: str  # on a device
    also_judged: tuple[str, ...] = ()  # further metrics of the comparison with the student that are gates
    needs_imatrix: bool = False  # llama.cpp refuses to write it without an importance matrix
    trained_on_grid: bool = False  # written from the student that was trained on the Q4_0 grid, if there is one
    in_profiles: bool = False  # a device's profile may name it; targets/memory.py predicts its memory
    least_bits: float = 0.0  # bits per weight from which `verify` takes a third-party ONNX file for this encoding

    @property
    def name(self) -> str:
        """The name in `--formats`: "gguf:q4_k_m"."""
        return f"{self.kind}:{self.encoding}"

    @property
    def block(self) -> int:
        """Elements per block. A row whose length is not a multiple gets another type in GGUF and is padded in ONNX."""
        return TYPES[self.type][0]

    @property
    def block_bytes(self) -> tuple[int, int]:
        """(bytes of a block of a linear, of embedding and LM head). Raises ValueError for a mixture of types."""
        if self.ends is None:
            raise ValueError(f"{self.name}: a mixture, in which llama.cpp chooses the type of every tensor")
        longer = _LONGER_SCALES[self.kind] if self.block > 1 else 0
        return TYPES[self.type][1] + longer, TYPES[self.ends][1] + longer

    @property
    def bytes_per_weight(self) -> float:
        """Bytes per weight of most matrices, including GGUF's scales."""
        block, n_bytes = TYPES[self.type]
        return n_bytes / block


def _gates(kl: str, top1: str, device_kl: str = "") -> dict[str, Any]:
    return {"kl_gate": kl, "device_kl_gate": device_kl or kl, "top1_gate": top1}


def _gguf(encoding: str, type: str, ends: str | None, **facts: Any) -> Format:
    return Format(kind="gguf", encoding=encoding, type=type, ends=ends,
                  file=f"{{model}}-{encoding.upper()}.gguf", **facts)


def _mixture(encoding: str, type: str, needs_imatrix: bool = False) -> Format:
    """A quantized GGUF in which llama.cpp chooses the types of some tensors."""
    return _gguf(encoding, type, None, needs_imatrix=needs_imatrix, **_QUANTIZED)


_QUANTIZED = _gates("quantized_kl", "quantized_top1")
_ROWS = (
    # In the order of llama.cpp's numbers.
    _gguf("f32", "F32", "F32", also_judged=("top1",), **_gates("gguf_f32_kl", "unquantized_top1", "gguf_f16_kl")),
    _gguf("f16", "F16", "F16", in_profiles=True, **_gates("gguf_f16_kl", "unquantized_top1")),
    # Embedding and head in Q8_0 is our choice, so that ONNX can hold the same blocks. llama.cpp's own Q4_0 gives the
    # head Q6_K and, with an importance matrix, some of ffn_down Q4_1.
    _gguf("q4_0", "Q4_0", "Q8_0", trained_on_grid=True, in_profiles=True, **_QUANTIZED),
    _mixture("q4_1", "Q4_1"),
    _gguf("q8_0", "Q8_0", "Q8_0", in_profiles=True, **_gates("gguf_q8_0_kl", "q8_top1")),
    _mixture("q5_0", "Q5_0"), _mixture("q5_1", "Q5_1"), _mixture("q2_k", "Q2_K"), _mixture("q3_k_s", "Q3_K"),
    _mixture("q3_k_m", "Q3_K"), _mixture("q3_k_l", "Q3_K"), _mixture("q4_k_s", "Q4_K"), _mixture("q4_k_m", "Q4_K"),
    _mixture("q5_k_s", "Q5_K"), _mixture("q5_k_m", "Q5_K"), _mixture("q6_k", "Q6_K"),
    # An importance matrix is needed where the model, or part of the mixture, has types that are garbage without one.
    # Source: tensor_requires_imatrix in llama.cpp's src/llama-quant.cpp.
    _mixture("iq2_xxs", "IQ2_XXS", needs_imatrix=True), _mixture("iq2_xs", "IQ2_XS", needs_imatrix=True),
    _mixture("q2_k_s", "Q2_K", needs_imatrix=True), _mixture("iq3_xs", "IQ3_S", needs_imatrix=True),
    _mixture("iq3_xxs", "IQ3_XXS", needs_imatrix=True), _mixture("iq1_s", "IQ1_S", needs_imatrix=True),
    _mixture("iq4_nl", "IQ4_NL"), _mixture("iq3_s", "IQ3_S"), _mixture("iq3_m", "IQ3_S"),
    _mixture("iq2_s", "IQ2_XS", needs_imatrix=True), _mixture("iq2_m", "IQ2_S", needs_imatrix=True),
    _mixture("iq4_xs", "IQ4_XS"), _mixture("iq1_m", "IQ1_M", needs_imatrix=True),
    _gguf("bf16", "BF16", "BF16", **_gates("gguf_bf16_kl", "unquantized_top1")),
    _mixture("tq1_0", "TQ1_0"), _mixture("tq2_0", "TQ2_0"), _mixture("q1_0", "Q1_0"),
    # The largest first. The names of the files are transformers.js's.
    Format(kind="onnx", encoding="fp32", type="F32", ends="F32", file="onnx/model.onnx", least_bits=24,
           also_judged=("max_abs",), **_gates("onnx_fp32_kl", "unquantized_top1", "gguf_f16_kl")),
    Format(kind="onnx", encoding="fp16", type="F16", ends="F16", file="onnx/model_fp16.onnx", least_bits=12,
           **_gates("onnx_fp16_kl", "unquantized_top1")),
    Format(kind="onnx", encoding="q8", type="Q8_0", ends="Q8_0", file="onnx/model_quantized.onnx", least_bits=7,
           in_profiles=True, **_gates("onnx_q8_kl", "q8_top1")),
    Format(kind="onnx", encoding="q4", type="Q4_0", ends="Q8_0", file="onnx/model_q4.onnx", trained_on_grid=True,
           in_profiles=True, **_QUANTIZED))
FORMATS = {row.name: row for row in _ROWS}


def format_of(text: str) -> Format:
    """Return the row named `text`, ignoring case. Raises UserError with the nearest name."""
    name = text.strip().lower()
    if name not in FORMATS:
        near = difflib.get_close_matches(name, FORMATS, n=1, cutoff=0.0)[0]
        raise UserError(f"format {text!r} is unknown; did you mean {near}? Known: {', '.join(FORMATS)}")
    return FORMATS[name]


def formats_of(kind: Kind) -> dict[str, Format]:
    """Return encoding -> row for the rows of one kind, in the table's order."""
    return {row.encoding: row for row in FORMATS.values() if row.kind == kind}


def mixed_encoding(bits_per_weight: float) -> str:
    """Return the encoding of a mixed-precision file: 4.25 -> "4.25bpw". It has no row of its own."""
    return f"{bits_per_weight:g}bpw"


def judged_as(name: str) -> Format:
    """Return the row whose gates apply to a file: the file's own row, if there is one.

    Mixed precision and QUANTIZED_TYPES use the gates of gguf:q4_0. Raises UserError for any other type, since no gate
    applies to it.
    """
    kind, _, encoding = name.partition(":")
    if kind == "gguf" and (encoding in QUANTIZED_TYPES or _MIXED.fullmatch(encoding)):
        name = "gguf:q4_0"
    if name not in FORMATS:
        raise UserError(f"{name}: no gate is for such a file; known: {', '.join([*FORMATS, *QUANTIZED_TYPES])}")
    return FORMATS[name]


def onnx_format_of(bits_per_weight: float) -> Format:
    """Choose the row of a third-party ONNX file, which names no encoding, by its bits per weight, scales included.

    Raises UserError if no row has so few.
    """
    for row in formats_of("onnx").values():
        if bits_per_weight >= row.least_bits:
            return row
    raise UserError(f"an ONNX file with {bits_per_weight:.3g} bits per weight: no gate is for such a file")
