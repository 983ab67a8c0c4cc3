"""Compare an ONNX graph with a checkpoint: inputs, outputs, heads, RoPE's tables, epsilon, and the named weights.

Each writer has its own names and packing. Matrices with Hugging Face's names are compared here; errors in others show
in the logits. Large tensors are compared by a sample of rows (values.py); all float tensors are searched for NaN.
"""
from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from onnx import TensorProto, numpy_helper

from lrc_edge.checkpoint import DenseCheckpoint
from lrc_edge.errors import UserError, one_line
from lrc_edge.export.audit.values import relative_error, rounded_before, sample_rows
from lrc_edge.export.onnx.rope import rope_tables
from lrc_edge.families import Weight, family_of
from lrc_edge.finding import Finding, differs
from lrc_edge.inspect.onnx_files import all_nodes, check_data_files, load_model

DEFAULT_NAMES = {"input_ids": "input_ids", "attention_mask": "attention_mask", "position_ids": "position_ids",
                 "past_key_names": "past_key_values.%d.key", "past_value_names": "past_key_values.%d.value",
                 "logits": "logits", "present_key_names": "present.%d.key", "present_value_names": "present.%d.value"}
# Further inputs that some runtime feeds.
_KNOWN_INPUTS = {"position_ids", "cache_position", "num_logits_to_keep", "use_cache_branch", "past_sequence_length",
                 "total_sequence_length", "current_sequence_length"}
_NORMS = ("SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization", "RMSNormalization")
_FLOATS: dict[int, tuple[np.dtype, float]] = {
    TensorProto.FLOAT: (np.dtype("<f4"), 1e-6), TensorProto.FLOAT16: (np.dtype("<f2"), 6e-4),
    TensorProto.BFLOAT16: (np.dtype("<u2"), 4e-3)}  # stored type, and the relative error that rounding costs
_EXPONENT = {TensorProto.FLOAT: 0x7f800000, TensorProto.FLOAT16: 0x7c00, TensorProto.BFLOAT16: 0x7f80}
_PIECE = 1 << 22  # values searched for NaN at once
_ANGLE = 2e-2  # of cos and sin: writers round positions' angles in float32


def audit_graph(path: Path, checkpoint: DenseCheckpoint, names: Mapping[str, str]) -> list[Finding]:
    """Return the differences. `names`: the names of inputs and outputs, as in DEFAULT_NAMES or genai_config.json.

    Raises UserError for a corrupt file, and for data files that are missing or too short.
    """
    model = load_model(path)
    try:
        check_data_files(path, model.graph.initializer)
        return list(_Graph(path, model, checkpoint, names).findings())
    except (ValueError, TypeError, IndexError, KeyError, OverflowError, AttributeError, OSError) as error:
        # A damaged protobuf may hold anything: lengths that do not fit shapes, types that do not exist.
        raise UserError(f"{path}: corrupt ({one_line(error)}); write or download the file again") from error


class _Graph:
    def __init__(self, path: Path, model: Any, checkpoint: DenseCheckpoint, names: Mapping[str, str]):
        self.path, self.graph, self.checkpoint, self.names = path, model.graph, checkpoint, names
        self.shape = checkpoint.shape
        self.tensors = {tensor.name: tensor for tensor in model.graph.initializer}
        self.nodes = list(all_nodes(model.graph))

    def findings(self) -> Iterator[Finding]:
        yield from self._interface()
        yield from self._attention()
        yield from self._rope()
        yield from self._epsilon()
        yield from self._values()

    def _interface(self) -> Iterator[Finding]:
        shape, layers = self.shape, range(self.shape.num_hidden_layers)
        inputs = {value.name: _dims(value) for value in self.graph.input if value.name not in self.tensors}
        outputs = {value.name: _dims(value) for value in self.graph.output}
        caches = [_numbered(self.names[key], i) for key in ("past_key_names", "past_value_names") for i in layers]
        presents = [_numbered(self.names[key], i) for key in ("present_key_names", "present_value_names")
                    for i in layers]
        needed = {"graph input": (inputs, [self.names["input_ids"], self.names["attention_mask"], *caches]),
                  "graph output": (outputs, [self.names["logits"], *presents])}
        for what, (there, wanted) in needed.items():
            if missing := [name for name in wanted if name not in there]:
                yield Finding(what, f"{what}: {missing[0]} is missing"
                              + (f", and {len(missing) - 1} more" if len(missing) > 1 else ""))
        extra = inputs.keys() - {*needed["graph input"][1], self.names["position_ids"], *_KNOWN_INPUTS}
        if extra:
            yield Finding("graph input", f"graph input: {min(extra)} is fed by no runtime ({len(extra)} such)")
        for name in caches:
            cache = inputs.get(name)
            if cache is not None and len(cache) == 4:
                for place, expected, key in ((1, shape.num_key_value_heads, "key/value heads"),
                                             (3, shape.head_dim, "head size")):
                    if isinstance(cache[place], int) and cache[place] != expected:
                        yield differs(key, cache[place], expected, f"of the input {name}")
        logits = outputs.get(self.names["logits"])
        if logits and isinstance(logits[-1], int) and logits[-1] != shape.vocab_size:
            yield differs("vocabulary size", logits[-1], shape.vocab_size, "of the logits")

    def _attention(self) -> Iterator[Finding]:
        """Compare GroupQueryAttention's attributes, which are equal in all layers of a correct file."""
        window = self.checkpoint.sliding_window
        expected = {"num_heads": ("attention heads", self.shape.num_attention_heads),
                    "kv_num_heads": ("key/value heads", self.shape.num_key_value_heads),
                    "scale": ("attention scale", 1 / math.sqrt(self.shape.head_dim)),
                    "softcap": ("softcap", 0.0)}
        if window is None or family_of(self.shape.family).window == "all":  # others may have one in some layers only
            expected["local_window_size"] = ("sliding window", window or -1)
        seen = set()
        for node in (node for node in self.nodes if node.op_type == "GroupQueryAttention"):
            found = {a.name: a.f if a.type == a.FLOAT else a.i for a in node.attribute}
            for key, (name, value) in expected.items():
                there = found.get(key, {"local_window_size": -1}.get(key, 0))
                default = key == "scale" and there == 0
                if not default and not math.isclose(there, value, rel_tol=1e-4) and name not in seen:
                    seen.add(name)
                    yield differs(name, there, value, "in the graph")
            if found.get("do_rotary") and found.get("rotary_interleaved") and "rope pairs" not in seen:
                seen.add("rope pairs")
                yield Finding("rope pairs", "rope pairs: the graph rotates neighbouring rows of q and k, Hugging Face "
                              "two halves of a head; sound only if the weights are permuted: see the logits", "note")

    def _rope(self) -> Iterator[Finding]:
        tables = {name for node in self.nodes for name in _rope_inputs(node) if any(name)}
        known = [pair for pair in sorted(tables) if all(name in self.tensors for name in pair)]
        if not known:
            yield Finding("rope", "rope: the graph computes its angles itself: judged by its logits only", "note")
            return
        expected = rope_tables(self.checkpoint)
        for pair in known:
            for name, wanted in zip(pair, expected, strict=True):
                found = self._floats(self.tensors[name])
                half = self.shape.head_dim // 2
                if found is None or found.ndim != 2 or found.shape[1] not in (half, 2 * half):
                    yield Finding("rope", f"rope: the table {name[:60]} is not of {half} angles a position")
                    continue
                n = min(len(found), len(wanted))
                if len(found) < len(wanted):
                    yield differs("context length", len(found), len(wanted), f"positions in the table {name[:60]}")
                error = np.abs(np.asarray(found[:n, :half], np.float32) - wanted[:n])
                if not (error <= _ANGLE).all():
                    position = int((~(error <= _ANGLE)).any(1).argmax())
                    yield Finding("rope tables", f"rope tables: {name[:60]} differs from position {position} on, by up "
                                  f"to {error.max():.3g}: another RoPE base or scaling than the model's "
                                  f"({self.checkpoint.rope.theta:g}, {self.checkpoint.rope.scaling or 'none'})")

    def _epsilon(self) -> Iterator[Finding]:
        expected = float(self.checkpoint.config.get("rms_norm_eps", 1e-6))
        means = {output for node in self.nodes if node.op_type == "ReduceMean" for output in node.output}
        for found in sorted({*self._epsilon_attributes(), *self._epsilon_constants(means)}):
            if not math.isclose(found, expected, rel_tol=1e-3):
                yield differs("norm epsilon", found, expected, "in the graph")

    def _epsilon_attributes(self) -> Iterator[float]:
        for node in self.nodes:
            if node.op_type in _NORMS:
                yield from (a.f for a in node.attribute if a.name == "epsilon")

    def _epsilon_constants(self, means: set[str]) -> Iterator[float]:
        """Yield the constants that are added to the mean of squares."""
        constants = {node.output[0]: a.t for node in self.nodes if node.op_type == "Constant" and node.output
                     for a in node.attribute if a.name == "value"}
        for node in self.nodes:
            if node.op_type == "Add" and means & set(node.input):
                for name in set(node.input) - means:
                    tensor = self.tensors.get(name, constants.get(name))
                    if tensor is not None and math.prod(tensor.dims) == 1:
                        value = self._floats(tensor)
                        if value is not None:
                            yield float(np.float32(value.reshape(-1)[0]))

    def _values(self) -> Iterator[Finding]:
        for name, tensor in self.tensors.items():
            if tensor.data_type in _FLOATS and not self._finite(tensor):
                yield Finding("tensor not finite", f"tensor not finite: {name[:60]} holds NaN or infinity")
        weights = list(self.checkpoint.weights())
        named = [weight for weight in weights if weight.name in self.tensors
                 and self.tensors[weight.name].data_type in _FLOATS]
        for weight in named:
            yield from self._weight(weight, self.tensors[weight.name])
        if len(named) < len(weights):
            yield Finding("tensors", f"tensors: {len(named)} of {len(weights)} are compared by name, the others by "
                          "their logits only", "note")

    def _weight(self, weight: Weight, tensor: Any) -> Iterator[Finding]:
        """Compare a matrix, which may be stored transposed."""
        dims, limit = tuple(tensor.dims), _FLOATS[tensor.data_type][1]
        if dims not in (weight.shape, weight.shape[::-1]):
            yield differs("tensor shape", list(dims), list(weight.shape), weight.name)
            return
        stored = self._floats(tensor)
        assert stored is not None
        rows = sample_rows(weight.name, weight.shape)
        expected = (self.checkpoint.tensor(weight.name).float()[None] if len(weight.shape) == 1
                    else self.checkpoint.rows(weight.name, rows.tolist()))
        errors = []
        for matrix in {id(view): view for view in (stored, stored.T) if view.shape == weight.shape}.values():
            part = matrix[None] if matrix.ndim == 1 else matrix[rows]
            found = torch.from_numpy(np.array(part, np.float32))
            if rounded_before(found, expected, limit / 10):
                return
            errors.append(relative_error(found, expected))
        if errors and not min(errors) <= limit:
            yield Finding("tensor values", f"tensor values: {weight.name} differs from the model's by "
                          f"{min(errors):.3g} of its RMS; rounding costs at most {limit:g}")

    def _floats(self, tensor: Any) -> np.ndarray | None:
        """Return the values of a float tensor, reading only the part that is used; None for other types."""
        raw = self._raw(tensor)
        if raw is None:
            return None
        if tensor.data_type == TensorProto.BFLOAT16:
            return (raw.astype(np.uint32) << 16).view(np.float32)
        return raw

    def _raw(self, tensor: Any) -> np.ndarray | None:
        if tensor.data_type not in _FLOATS:
            return None
        dtype, dims = _FLOATS[tensor.data_type][0], tuple(tensor.dims)
        place = {entry.key: entry.value for entry in tensor.external_data}
        if "location" not in place:
            values = numpy_helper.to_array(tensor)
            return values.view(np.uint16) if tensor.data_type == TensorProto.BFLOAT16 else values
        if not math.prod(dims):
            return np.empty(dims, dtype)
        return np.memmap(self.path.parent / place["location"], dtype, "r", int(place.get("offset", 0)), dims)

    def _finite(self, tensor: Any) -> bool:
        raw = self._raw(tensor)
        assert raw is not None
        exponent, flat = _EXPONENT[tensor.data_type], raw.reshape(-1)
        bits = flat.view(f"<u{flat.dtype.itemsize}")
        return not any(bool((bits[i:i + _PIECE] & exponent == exponent).any()) for i in range(0, len(bits), _PIECE))


def _dims(value: Any) -> list[int | str]:
    return [d.dim_value if d.HasField("dim_value") else d.dim_param for d in value.type.tensor_type.shape.dim]


def _numbered(name: str, layer: int) -> str:
    return name.replace("%d", str(layer))


def _rope_inputs(node: Any) -> list[tuple[str, str]]:
    """Return the (cos, sin) tables that the node reads."""
    inputs = [*node.input, *[""] * 9]
    if node.op_type == "RotaryEmbedding":
        return [(inputs[2], inputs[3])] if node.domain == "com.microsoft" else [(inputs[1], inputs[2])]
    return [(inputs[7], inputs[8])] if node.op_type == "GroupQueryAttention" and inputs[7] else []
