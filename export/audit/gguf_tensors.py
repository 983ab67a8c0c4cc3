"""Compare the tensors of a GGUF file with a checkpoint's: names, shapes, values, and the row order of q and k.

Large tensors are compared by 256 rows each (values.py), so that 1.5B parameters take seconds. All values are searched
for NaN and infinity.
"""
from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from lrc_edge.checkpoint import DenseCheckpoint
from lrc_edge.export.audit.values import relative_error, rounded_before, sample_rows
from lrc_edge.export.gguf.metadata import llama3_rope_factors
from lrc_edge.export.gguf.to_gguf import ROPE_FACTORS, interleave_rotary
from lrc_edge.export.quantize.encodings import dequantize
from lrc_edge.families import EMBEDDING, HEAD, Weight
from lrc_edge.finding import SHOWN, Finding, Severity
from lrc_edge.gguf_header import GgufHeader, StoredTensor
from lrc_edge.gguf_names import gguf_name

QType = GGMLQuantizationType

SEARCH_ROWS = 8  # rows by which the tensor is found that a place holds instead of its own
PIECE = 1 << 20  # values that are looked at for NaN at once
# The largest relative RMS error that rounding to a type may cost: about 1.5 times what llama.cpp's quantizer costs on
# the worst of normal, Laplace, Student's t (3 degrees), uniform and unevenly scaled values, with and without an
# importance matrix. Any other tensor of the same kind is 1.2 or more away.
LIMITS = {
    QType.F64: 1e-6, QType.F32: 1e-6, QType.F16: 6e-4, QType.BF16: 4e-3, QType.Q8_0: 0.015, QType.Q8_K: 0.015,
    QType.Q6_K: 0.05, QType.Q5_K: 0.08, QType.Q5_1: 0.08, QType.Q5_0: 0.11, QType.Q4_K: 0.16, QType.Q4_1: 0.17,
    QType.IQ4_NL: 0.17, QType.IQ4_XS: 0.17, QType.Q4_0: 0.2, QType.MXFP4: 0.3, QType.NVFP4: 0.3, QType.Q3_K: 0.3,
    QType.IQ3_S: 0.42, QType.IQ3_XXS: 0.5, QType.Q2_K: 0.55, QType.IQ2_S: 0.8, QType.IQ2_XS: 0.8, QType.IQ2_XXS: 0.9,
    QType.IQ1_S: 0.95, QType.IQ1_M: 0.95, QType.TQ1_0: 1.1, QType.TQ2_0: 1.1, QType.Q1_0: 1.1}
_FLOATS: dict[QType, np.dtype] = {QType.F16: np.dtype("<f2"), QType.F32: np.dtype("<f4"), QType.F64: np.dtype("<f8")}
_BITS: dict[QType, tuple[str, int]] = {  # integers of the same size, and the exponent's bits
    QType.F16: ("<u2", 0x7c00), QType.BF16: ("<u2", 0x7f80), QType.F32: ("<u4", 0x7f800000)}
_UNREADABLE = " is not readable here: judged by its logits only"
_HEAD_TENSOR = gguf_name(Weight(HEAD.weight, HEAD, None, ()))
_ROTATED = ("attn_q", "attn_k", "attn_q_bias", "attn_k_bias")


@dataclass(frozen=True)
class _Problem:
    """A fault in one tensor. Equal faults of several layers become one finding."""

    name: str  # of the finding
    where: str  # "attn_q.weight"
    layer: int | None
    text: str  # {error} becomes the largest of the group
    severity: Severity = "fault"
    error: float = 0.0


def audit_tensors(header: GgufHeader, checkpoint: DenseCheckpoint, permuted: bool) -> list[Finding]:
    """`permuted`: whether the file's architecture rotates neighbouring rows of q and k (llama), not the two halves."""
    return _grouped(_Tensors(header, checkpoint, permuted).problems())


class _Tensors:
    """The file's tensors and the checkpoint's weights, and which tensor holds which weight."""

    def __init__(self, header: GgufHeader, checkpoint: DenseCheckpoint, permuted: bool):
        self.checkpoint, self.shape, self.permuted = checkpoint, checkpoint.shape, permuted
        self.stored = header.tensors
        self.bytes = np.memmap(header.path, np.uint8, mode="r")
        self.weights = {gguf_name(weight): weight for weight in checkpoint.weights()}

    def problems(self) -> Iterator[_Problem]:
        unused = set(self.stored)
        for weight in self.weights.values():
            tensor, first_row = self._place(weight)
            if tensor is None:
                instead = "; llama.cpp would use token_embd instead" if weight.role is HEAD else ""
                yield self._problem("missing tensor", weight, "is missing" + instead)
                continue
            unused.discard(tensor.name)
            yield from self._judge(weight, tensor, first_row)
        for name in sorted(unused):
            yield from self._extra(self.stored[name])
        yield from self._rope_factors()

    def _problem(self, name: str, weight: Weight, text: str, severity: Severity = "fault", error: float = 0.0
                 ) -> _Problem:
        where = gguf_name(weight).removeprefix(f"blk.{weight.layer}.")
        return _Problem(name, where, weight.layer, text, severity, error)

    def _place(self, weight: Weight) -> tuple[StoredTensor | None, int]:
        """Return the tensor that holds the weight, and its first row there (q, k and v may share a tensor)."""
        name = gguf_name(weight)
        role, _, suffix = name.rpartition(".")
        fused = self.stored.get(f"blk.{weight.layer}.attn_qkv.{suffix}")
        starts = {"attn_q": 0, "attn_k": self.shape.q_size, "attn_v": self.shape.q_size + self.shape.kv_size}
        part = role.rpartition(".")[2]
        if name not in self.stored and fused is not None and part in starts:
            return fused, starts[part]
        return self.stored.get(name), 0

    def _judge(self, weight: Weight, tensor: StoredTensor, first_row: int) -> Iterator[_Problem]:
        expected = weight.shape
        if "attn_qkv" in tensor.name:
            expected = (self.shape.q_size + 2 * self.shape.kv_size, *weight.shape[1:])
        if _without_ones(tensor.shape) != _without_ones(expected):
            yield self._problem("tensor shape", weight, f"is {list(tensor.shape)}, expected {list(expected)}")
            return
        if tensor.type is None or f"{tensor.name.removesuffix('.weight')}.scale" in self.stored:
            kind = f"type {tensor.type_id}" if tensor.type is None else f"{tensor.type.name} with a scale of its own"
            yield self._problem("tensor type", weight, kind + _UNREADABLE, "note")
            return
        finite = self._finite(tensor) if tensor.type in LIMITS else None
        if finite is None:
            yield self._problem("tensor type", weight, tensor.type.name + _UNREADABLE, "note")
        elif not finite:
            yield self._problem("tensor not finite", weight, "holds NaN or infinity")
        else:
            yield from self._compare(weight, tensor, first_row)

    def _finite(self, tensor: StoredTensor) -> bool | None:
        """Whether all values are finite; None for a type that cannot be read."""
        assert tensor.type is not None
        data, (block, block_bytes) = self._data(tensor), GGML_QUANT_SIZES[tensor.type]
        step = PIECE // block * block_bytes
        for start in range(0, tensor.n_bytes, step):
            finite = _all_finite(data[start:start + step], tensor.type)
            if not finite:
                return finite
        return True

    def _data(self, tensor: StoredTensor) -> np.ndarray:
        return self.bytes[tensor.offset:tensor.offset + tensor.n_bytes]

    def _compare(self, weight: Weight, tensor: StoredTensor, first_row: int) -> Iterator[_Problem]:
        assert tensor.type is not None
        rows = sample_rows(gguf_name(weight), weight.shape)
        found = self._rows(tensor, rows + first_row, weight.shape)
        limit = LIMITS[tensor.type]
        expected = self._expected(weight, rows, self.permuted)
        error = relative_error(found, expected)
        if error <= limit:
            return
        if tensor.type in _FLOATS and rounded_before(found, expected, limit / 10):
            yield self._problem("tensor rounding", weight, f"{tensor.type.name}, but rounded to 16 bits before", "note")
        elif weight.role.name in _ROTATED and relative_error(found, self._expected(weight, rows, not self.permuted)
                                                              ) <= limit:
            text = "rows are not permuted" if self.permuted else "rows are permuted"
            yield self._problem("tensor rows", weight, f"{text} for the rotary embedding, as this architecture "
                                f"{'needs' if self.permuted else 'does not want'}")
        elif other := self._found_elsewhere(weight, found[:SEARCH_ROWS], rows[:SEARCH_ROWS], limit):
            yield self._problem("tensor swapped", weight, f"holds {self._called(other, weight)} instead")
        else:
            yield self._problem("tensor values", weight, "differs from the model's by {error} of its RMS; rounding to "
                                f"{tensor.type.name} costs at most {limit:g}", error=error)

    def _rows(self, tensor: StoredTensor, rows: np.ndarray, shape: tuple[int, ...]) -> torch.Tensor:
        """Return these rows of the file in float32; a vector is one row."""
        assert tensor.type is not None
        n_rows = _without_ones(tensor.shape)[0] if len(shape) > 1 else 1
        data = self._data(tensor).reshape(n_rows, -1)
        if len(shape) == 1:  # of a fused bias
            size = data.shape[1] // tensor.shape[-1]
            data, rows = data.reshape(-1, size)[rows[0]:rows[0] + shape[0]].reshape(1, -1), np.zeros(1, int)
        values = _values(np.ascontiguousarray(data[rows]), tensor.type)
        assert values is not None
        return torch.from_numpy(values.astype(np.float32)).reshape(len(rows), -1)

    def _expected(self, weight: Weight, rows: np.ndarray, permuted: bool) -> torch.Tensor:
        """Return the values that the checkpoint has for these rows of the file, in float32."""
        if len(weight.shape) == 1:
            return self._ordered(weight, self.checkpoint.tensor(weight.name).float(), permuted)[None]
        index = self._ordered(weight, torch.arange(weight.shape[0]), permuted)[torch.from_numpy(rows)]
        if len(rows) == weight.shape[0]:
            return self.checkpoint.tensor(weight.name).float()[index]
        return self.checkpoint.rows(weight.name, index.tolist())

    def _ordered(self, weight: Weight, rows: torch.Tensor, permuted: bool) -> torch.Tensor:
        if not permuted or weight.role.name not in _ROTATED:
            return rows
        queries = weight.role.name.startswith("attn_q")
        return interleave_rotary(rows, self.shape.num_attention_heads if queries else self.shape.num_key_value_heads)

    def _found_elsewhere(self, weight: Weight, found: torch.Tensor, rows: np.ndarray, limit: float) -> Weight | None:
        """Return another weight of this shape that contains these rows; None if there is none."""
        for other in self.weights.values():
            if other.shape == weight.shape and other is not weight:
                if relative_error(found, self._expected(other, rows, self.permuted)) <= limit:
                    return other
        return None

    def _called(self, other: Weight, weight: Weight) -> str:
        """"ffn_up.weight of the same layer"; "blk.3.ffn_gate.weight"."""
        name = gguf_name(other)
        if other.layer is not None and other.layer == weight.layer:
            return f"{name.removeprefix(f'blk.{other.layer}.')} of the same layer"
        return name

    def _extra(self, tensor: StoredTensor) -> Iterator[_Problem]:
        """Report a tensor that the model does not have."""
        if tensor.name == ROPE_FACTORS or tensor.name.endswith((".scale", ".input_scale")):
            return
        if tensor.name == _HEAD_TENSOR:
            twin = Weight(EMBEDDING.weight, HEAD, None, (self.shape.vocab_size, self.shape.hidden_size))
            found = [problem for problem in self._judge(twin, tensor, 0) if problem.severity == "fault"]
            yield from found or [_Problem("tied head", tensor.name, None, "stores the embedding again", "note")]
            return
        zeros = tensor.name.endswith(".bias") and tensor.type is not None and self._zero(tensor)
        text = "is all zeros, which changes nothing" if zeros else f"is not a tensor of this {self.shape.family}"
        in_layer = re.fullmatch(r"blk\.([0-9]{1,5})\.(.+)", tensor.name)
        where, layer = (in_layer[2], int(in_layer[1])) if in_layer else (tensor.name, None)
        yield _Problem("extra tensor", where, layer, text, "note" if zeros else "fault")

    def _zero(self, tensor: StoredTensor) -> bool:
        values = _values(self._data(tensor), tensor.type)
        return values is not None and not values.any()

    def _rope_factors(self) -> Iterator[_Problem]:
        """Check llama3's RoPE scaling: a tensor by which llama.cpp divides the frequencies."""
        tensor, expected = self.stored.get(ROPE_FACTORS), llama3_rope_factors(self.checkpoint)
        if tensor is None and expected is None:
            return
        if tensor is None:
            yield _Problem("rope scaling", ROPE_FACTORS, None, "is missing: llama3's RoPE scaling would not be applied")
            return
        values = _values(self._data(tensor), tensor.type)
        wanted = np.ones(self.shape.head_dim // 2) if expected is None else expected.numpy()
        if values is None or values.shape != wanted.shape or not np.allclose(values, wanted, rtol=1e-3):
            text = "scales RoPE, which this model does not" if expected is None else "is another llama3 RoPE scaling"
            yield _Problem("rope scaling", ROPE_FACTORS, None, text)


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Remove leading ones, which GGUF's shapes may have."""
    while len(shape) > 1 and shape[0] == 1:
        shape = shape[1:]
    return shape


def _all_finite(data: np.ndarray, type: GGMLQuantizationType) -> bool | None:
    """Whether stored bytes hold neither NaN nor infinity; None for a type that cannot be read."""
    if type in _BITS:
        bits, exponent = _BITS[type]
        return not bool((data.view(np.dtype(bits)) & exponent == exponent).any())
    values = _values(data, type)
    return None if values is None else bool(np.isfinite(values).all())


def _values(data: np.ndarray, type: GGMLQuantizationType | None) -> np.ndarray | None:
    """Return stored bytes as a flat array of numbers; None for a type that cannot be read."""
    data = np.ascontiguousarray(data).reshape(-1)
    if type is None:
        return None
    if type in _FLOATS:
        return data.view(_FLOATS[type])
    if type == QType.BF16:
        return (data.view("<u2").astype(np.uint32) << 16).view(np.float32)
    block, block_bytes = GGML_QUANT_SIZES[type]
    return dequantize(data, type, data.nbytes // block_bytes * block)


def _grouped(problems: Iterator[_Problem]) -> list[Finding]:
    """Combine equal problems of several layers into one finding."""
    groups: dict[tuple[str, str, str, Severity], list[_Problem]] = {}
    for problem in problems:
        groups.setdefault((problem.name, problem.where, problem.text, problem.severity), []).append(problem)
    findings = []
    for (name, where, text, severity), members in groups.items():
        text = text.replace("{error}", f"{max(member.error for member in members):.3g}")
        layers = _layers([member.layer for member in members])
        findings.append(Finding(name, f"{name}: {where[:SHOWN]}{layers} {text}", severity))
    return findings


def _layers(layers: Sequence[int | None]) -> str:
    """" of layers 0..4"; "" for a tensor outside the layers."""
    numbers = sorted(layer for layer in layers if layer is not None)
    if not numbers:
        return ""
    if len(numbers) == 1:
        return f" of layer {numbers[0]}"
    if numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f" of layers {numbers[0]}..{numbers[-1]}"
    some = ", ".join(map(str, numbers[:8]))
    return f" of layers {some}" + (f" and {len(numbers) - 8} more" if len(numbers) > 8 else "")
