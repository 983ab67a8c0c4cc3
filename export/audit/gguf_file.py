"""Verify, without running it, that a GGUF file from any writer describes the model of a Hugging Face directory.

The file is not trusted: hyperparameters, RoPE, tokenizer, chat template and tensors are compared as llama.cpp would
read them. A missing key counts as llama.cpp's default. Notes report differences that have no effect.
"""
from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lrc_edge.checkpoint import DenseCheckpoint
from lrc_edge.errors import UserError
from lrc_edge.export.audit.gguf_tensors import audit_tensors
from lrc_edge.export.audit.gguf_vocabulary import audit_vocabulary
from lrc_edge.export.gguf.metadata import architectures, check_rope, yarn_attention_factor
from lrc_edge.families import ARCHITECTURES
from lrc_edge.finding import Finding, differs
from lrc_edge.gguf_header import GgufHeader, read_header

DEFAULT_ROPE_BASE = 10000.0
# Keys of an architecture that change what is computed, and the value with which they do not.
_NEUTRAL = {"attention.causal": True, "expert_count": 0, "expert_used_count": 0, "nextn_predict_layers": 0,
            "rope.scaling.alpha": 0.0}


def audit_gguf(path: Path, checkpoint: DenseCheckpoint) -> list[Finding]:
    """Return every difference between the file and the checkpoint; without a fault, the file describes this model.

    Large tensors are compared by 256 rows each (gguf_tensors.py), and all are searched for NaN. Whether llama.cpp then
    computes the same logits is tested in the runtime. Raises UserError for a file that is not GGUF, is truncated, or is
    one part of several.
    """
    header = read_header(path)
    parts = header.metadata.get("split.count", 0)
    if isinstance(parts, int) and parts > 1:
        raise UserError(f"{path}: one of {parts} parts of a model; join them with llama-gguf-split --merge")
    graph = ARCHITECTURES.get(_architecture(header), architectures(checkpoint)[0])
    return [*_audit_hyperparameters(header, checkpoint), *audit_vocabulary(header, checkpoint),
            *audit_tensors(header, checkpoint, graph.permutes_qk), *_audit_identity(header, checkpoint)]


def _architecture(header: GgufHeader) -> str:
    return str(header.metadata.get("general.architecture", ""))


def _audit_hyperparameters(header: GgufHeader, checkpoint: DenseCheckpoint) -> Iterator[Finding]:
    shape, arch = checkpoint.shape, _architecture(header)
    possible = [graph.name for graph in architectures(checkpoint)]
    if arch not in possible:
        yield differs("architecture", arch, " or ".join(possible))
    if arch in ARCHITECTURES and ARCHITECTURES[arch].square_attention and shape.q_size != shape.hidden_size:
        yield differs("architecture", arch, "llama", f"llama.cpp's {arch} needs heads * head size = hidden size")
    values = _Values(header, arch)
    heads = values.number("attention.head_count", None)
    width = values.number("embedding_length", None)
    head_size = width // heads if isinstance(width, int) and isinstance(heads, int) and heads > 0 else None
    key_size = values.number("attention.key_length", head_size)
    numbers = [
        ("layers", values.number("block_count", None), shape.num_hidden_layers),
        ("hidden size", width, shape.hidden_size),
        ("feed-forward size", values.number("feed_forward_length", None), shape.intermediate_size),
        ("attention heads", heads, shape.num_attention_heads),
        ("key/value heads", values.number("attention.head_count_kv", heads), shape.num_key_value_heads),
        ("head size", key_size, shape.head_dim),
        ("head size of values", values.number("attention.value_length", head_size), shape.head_dim),
        ("rotated dimensions", values.number("rope.dimension_count", key_size), shape.head_dim),
        ("vocabulary size", values.number("vocab_size", shape.vocab_size), shape.vocab_size),
        ("norm epsilon", values.number("attention.layer_norm_rms_epsilon", None),
         float(checkpoint.config.get("rms_norm_eps", 1e-6))),
        ("rope base", values.number("rope.freq_base", DEFAULT_ROPE_BASE), checkpoint.rope.theta)]
    for name, found, expected in numbers:
        if not same_number(found, expected):
            yield differs(name, found, expected)
    for key, neutral in _NEUTRAL.items():
        if (found := values.number(key, neutral)) != neutral:
            yield differs(key, found, neutral)
    yield from _audit_rope_scaling(values, checkpoint)
    yield from _audit_context(values, checkpoint)


class _Values:
    """The hyperparameters of the file, as llama.cpp reads them."""

    def __init__(self, header: GgufHeader, arch: str):
        self.metadata, self.arch = header.metadata, arch

    def number(self, key: str, default: Any) -> Any:
        """Return the value; of a list with one value per layer, the value that all layers share."""
        value = self.metadata.get(f"{self.arch}.{key}", default)
        if isinstance(value, list) and value and all(item == value[0] for item in value):
            return value[0]
        return value

    def rope_scaling(self) -> str:
        """"none", "linear, factor 2" or "yarn, factor 4, original context 64, attention factor 1"."""
        kind = self.number("rope.scaling.type", "linear")
        factor = self.number("rope.scaling.factor", self.number("rope.scale_linear", 0.0))
        if kind == "none" or (kind == "linear" and factor in (0, 1)):
            return "none"
        if kind == "yarn":
            return _yarn(factor, self.number("rope.scaling.original_context_length", self.number("context_length", 0)),
                         self.number("rope.scaling.attn_factor", 1.0))
        return f"{kind}, factor {_short(factor)}"


def _audit_rope_scaling(values: _Values, checkpoint: DenseCheckpoint) -> Iterator[Finding]:
    scaling, found = checkpoint.rope.scaling or {}, values.rope_scaling()
    try:
        check_rope(checkpoint)
    except UserError as error:
        yield Finding("rope scaling", f"rope scaling: no GGUF can hold this model: {error}", "fault", found, scaling)
        return
    kind = scaling.get("rope_type")
    expected = "none"  # also of llama3, which is a tensor of its own
    if kind == "linear":
        expected = f"linear, factor {_short(scaling['factor'])}" if scaling["factor"] != 1 else "none"
    elif kind == "yarn":
        expected = _yarn(scaling["factor"], scaling["original_max_position_embeddings"],
                         yarn_attention_factor(scaling))
    elif kind == "llama3" and not (values.arch in ARCHITECTURES and ARCHITECTURES[values.arch].llama3_rope):
        yield differs("rope scaling", f"architecture {values.arch}", "llama",
                      "llama.cpp scales RoPE as llama3 does in that architecture only")
    if found != expected:
        yield differs("rope scaling", found, expected)


def _yarn(factor: Any, original: Any, attention: Any) -> str:
    return f"yarn, factor {_short(factor)}, original context {original}, attention factor {_short(attention)}"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else repr(value)


def _audit_context(values: _Values, checkpoint: DenseCheckpoint) -> Iterator[Finding]:
    found, longest = values.number("context_length", None), checkpoint.shape.max_position_embeddings
    bound = checkpoint.context_length
    if same_number(found, bound):
        return
    if same_number(found, longest):
        yield differs("context length", found, bound, "beyond it llama.cpp lacks this model's sliding window", "note")
    else:
        yield differs("context length", found, bound)


def _audit_identity(header: GgufHeader, checkpoint: DenseCheckpoint) -> Iterator[Finding]:
    name = header.metadata.get("general.name")
    if isinstance(name, str) and _letters(name) != _letters(checkpoint.name):
        yield differs("name", name, checkpoint.name, severity="note")


def _letters(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())


def same_number(found: Any, expected: float) -> bool:
    """Whether both numbers are equal in float32."""
    if isinstance(found, bool) or not isinstance(found, int | float):
        return False
    return math.isclose(found, expected, rel_tol=1e-6)
