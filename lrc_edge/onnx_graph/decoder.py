"""The decoder as an ONNX graph with a KV cache, for every family, built from the tables of families.py.

Every weight is placed by its role (never by its shape) and exactly once. Values are named after the module that
makes them. Rows of a batch may be padded on the right only: GroupQueryAttention counts a row's tokens from its start.
Activations and cache have the weights' type, float32 or float16. Norms are computed in float32; logits are float32.
Shapes: B batch, T new tokens, P past tokens, S = P + T; O a linear's outputs, I its inputs.
"""
from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from onnx import TensorProto

from lrc_edge.errors import UserError
from lrc_edge.families import Weight, weights_of
from lrc_edge.onnx_graph.file import MICROSOFT, OnnxFile
from lrc_edge.onnx_graph.matrices import Matrices, Source
from lrc_edge.shape import ModelShape

INT64, FLOAT = TensorProto.INT64, TensorProto.FLOAT
ROPE_TABLES = ("rope.cos", "rope.sin")
HEAD_DIM_MULTIPLE = 8  # GroupQueryAttention takes no other head_dim


def check_heads(shape: ModelShape, where: Path | str) -> None:
    """Raise UserError, whose text starts with `where`, for a head_dim that is not a multiple of 8."""
    if shape.head_dim % HEAD_DIM_MULTIPLE:
        raise UserError(f"{where}: head_dim {shape.head_dim} has no ONNX form: onnxruntime's attention needs a "
                        f"multiple of {HEAD_DIM_MULTIPLE}; leave the onnx formats out")


class DecoderGraph:
    """Writes the graph of one model, with the weights that it reads from `source`, into `file`. Use `write` once."""

    def __init__(self, file: OnnxFile, source: Source, matrices: Matrices):
        self.file, self.source, self.shape, self.matrices = file, source, source.shape, matrices
        self._unplaced = {(weight.role.name, weight.layer): weight for weight in weights_of(self.shape)}

    def write(self) -> None:
        """Write all inputs, nodes and outputs. Raises ValueError if a weight of the model was not used."""
        self._inputs()
        self._rope_tables()
        embedding = self._take("token_embd", None)
        hidden = self.matrices.embedding(self.file, self.source, embedding, "input_ids", "model.embed_tokens")
        for layer in range(self.shape.num_hidden_layers):
            hidden = self._layer(hidden, layer)
        hidden = self._norm(hidden, "output_norm", None)
        logits = "logits" if self.matrices.onnx_type == FLOAT else "lm_head"
        if self.shape.tied:
            self.matrices.tied_head(self.file, embedding, hidden, logits)
        else:
            self.matrices.head(self.file, self.source, self._take("output", None), hidden, logits)
        if logits != "logits":
            self.file.node("Cast", [logits], "logits", to=FLOAT)
        self.file.output("logits", FLOAT, ["batch_size", "sequence_length", self.shape.vocab_size])
        for layer in range(self.shape.num_hidden_layers):
            for kind in ("key", "value"):
                self.file.output(f"present.{layer}.{kind}", self.matrices.onnx_type,
                                 self._cache_shape("total_sequence_length"))
        if self._unplaced:
            raise ValueError(f"{self.file.path}: no place for {sorted(w.name for w in self._unplaced.values())}")

    def _take(self, role: str, layer: int | None) -> Weight:
        """Return the weight of this role. Each weight can be taken only once."""
        return self._unplaced.pop((role, layer))

    def _vector(self, weight: Weight, type: np.dtype) -> str:
        """Add a norm or bias as an initializer."""
        return self.file.weight(weight.name, self.source.vector(weight, type))

    def _cache_shape(self, length: str) -> list[int | str]:
        # Numbers, not symbols: transformers.js allocates the first, empty cache from them.
        return ["batch_size", self.shape.num_key_value_heads, length, self.shape.head_dim]

    def _inputs(self) -> None:
        file = self.file
        file.input("input_ids", INT64, ["batch_size", "sequence_length"])
        mask = file.input("attention_mask", INT64, ["batch_size", "total_sequence_length"])
        file.input("position_ids", INT64, ["batch_size", "sequence_length"])
        # Key and value alternate: ORTModelForCausalLM pairs them by order.
        for layer in range(self.shape.num_hidden_layers):
            for kind in ("key", "value"):
                file.input(f"past_key_values.{layer}.{kind}", self.matrices.onnx_type,
                           self._cache_shape("past_sequence_length"))
        # GroupQueryAttention wants each row's S - 1, and S, both as int32.
        lengths = file.node("ReduceSum", [mask, file.constant([1])], "mask.lengths", keepdims=0)
        last = file.node("Sub", [lengths, file.constant([1])], "mask.last")
        file.node("Cast", [last], "seqlens_k", to=TensorProto.INT32)
        size = file.node("Shape", [mask], "mask.shape", start=1, end=2)
        total = file.node("Squeeze", [size], "mask.total")
        file.node("Cast", [total], "total_sequence_length.int32", to=TensorProto.INT32)

    def _rope_tables(self) -> None:
        for name, table in zip(ROPE_TABLES, self.source.rope_tables(), strict=True):
            self.file.weight(name, table.astype(self.matrices.type))

    def _layer(self, hidden: str, layer: int) -> str:
        attention = self._attention(self._norm(hidden, "attn_norm", layer), layer)
        hidden = self.file.node("Add", [hidden, attention], f"model.layers.{layer}.after_attention")
        mlp = self._mlp(self._norm(hidden, "ffn_norm", layer), layer)
        return self.file.node("Add", [hidden, mlp], f"model.layers.{layer}")

    def _linear(self, x: str, role: str, layer: int) -> str:
        """Add x W^T, plus b if the family has that bias."""
        weight, bias = self._take(role, layer), (f"{role}_bias", layer)
        if bias not in self._unplaced:
            return self.matrices.linear(self.file, self.source, weight, x, weight.module)
        product = self.matrices.linear(self.file, self.source, weight, x, f"{weight.module}/product")
        return self.file.node("Add", [product, self._vector(self._take(*bias), self.matrices.type)], weight.module)

    def _norm(self, x: str, role: str, layer: int | None) -> str:
        """Add an RMS norm over the last axis in standard operators, which onnxruntime fuses when it loads the graph.

        Always in float32: in float16 the square of a number above 256 is infinite.
        """
        file, gain = self.file, self._take(role, layer)
        module = gain.module
        epsilon = file.constant(self.source.epsilon, np.float32)
        is_float = self.matrices.onnx_type == FLOAT
        if not is_float:
            x = file.node("Cast", [x], f"{module}/float", to=FLOAT)
        square = file.node("Pow", [x, file.constant(2.0, np.float32)], f"{module}/square")
        mean = file.node("ReduceMean", [square, file.constant([-1])], f"{module}/mean")
        root = file.node("Sqrt", [file.node("Add", [mean, epsilon], f"{module}/mean_eps")], f"{module}/root")
        normal = file.node("Div", [x, root], f"{module}/normal")
        factors = [normal, self._vector(gain, np.dtype(np.float32))]
        if is_float:
            return file.node("Mul", factors, module)
        return file.node("Cast", [file.node("Mul", factors, f"{module}/scaled")], module, to=self.matrices.onnx_type)

    def _mlp(self, x: str, layer: int) -> str:
        """down(silu(gate(x)) * up(x))"""
        file, module = self.file, f"model.layers.{layer}.mlp"
        gate = self._linear(x, "ffn_gate", layer)
        sigmoid = file.node("Sigmoid", [gate], f"{module}.sigmoid")
        silu = file.node("Mul", [gate, sigmoid], f"{module}.silu")
        product = file.node("Mul", [silu, self._linear(x, "ffn_up", layer)], f"{module}.product")
        return self._linear(product, "ffn_down", layer)

    def _attention(self, x: str, layer: int) -> str:
        shape, module = self.shape, f"model.layers.{layer}.self_attn"
        query, key, value = (self._linear(x, f"attn_{kind}", layer) for kind in "qkv")
        query = self._positioned(query, "q", shape.num_attention_heads, layer)
        key = self._positioned(key, "k", shape.num_key_value_heads, layer)
        attended = self.file.node(
            "GroupQueryAttention",
            [query, key, value, f"past_key_values.{layer}.key", f"past_key_values.{layer}.value", "seqlens_k",
             "total_sequence_length.int32"],
            [module + ".attended", f"present.{layer}.key", f"present.{layer}.value"], domain=MICROSOFT,
            num_heads=shape.num_attention_heads, kv_num_heads=shape.num_key_value_heads,
            scale=1 / math.sqrt(shape.head_dim), local_window_size=self.source.window(layer) or -1)
        return self._linear(attended, "attn_output", layer)

    def _positioned(self, x: str, kind: str, heads: int, layer: int) -> str:
        """Add q/k norm (qwen3) and RoPE to query or key (B, T, heads * head_dim).

        The attention operator can apply RoPE itself, but only for a head_dim that is a multiple of 16, and measurements
        showed no gain in speed.
        """
        file, role = self.file, f"attn_{kind}_norm"
        module = f"model.layers.{layer}.self_attn.{kind}"
        if (role, layer) in self._unplaced:
            split = file.node("Reshape", [x, file.constant([0, 0, heads, self.shape.head_dim])], f"{module}.heads")
            x = file.node("Reshape", [self._norm(split, role, layer), file.constant([0, 0, -1])], f"{module}.normal")
        return file.node("RotaryEmbedding", [x, "position_ids", *ROPE_TABLES], f"{module}.rotated",
                         domain=MICROSOFT, num_heads=heads, interleaved=0)
