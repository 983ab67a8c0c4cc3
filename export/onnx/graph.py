"""The decoder as an ONNX graph with a KV cache, for every family, built from the tables of families.py.

Every weight is placed by its role (never by its shape) and exactly once. Values are named after the module that
makes them. Rows of a batch may be padded on the right only: GroupQueryAttention counts a row's tokens from its start.
Activations and cache have the weights' type, float32 or float16. Norms are computed in float32; logits are float32.
Shapes: B batch, T new tokens, P past tokens, S = P + T; O a linear's outputs, I its inputs.
"""
from __future__ import annotations

import math
from collections.abc import Callable
from importlib import import_module
from typing import Protocol

import numpy as np
import torch
from onnx import TensorProto
from transformers import AutoConfig, PretrainedConfig

from lrc_edge.checkpoint import DenseCheckpoint
from lrc_edge.errors import UserError
from lrc_edge.export.onnx.file import MICROSOFT, OnnxFile
from lrc_edge.export.onnx.weights import array_of
from lrc_edge.families import family_of

INT64, FLOAT = TensorProto.INT64, TensorProto.FLOAT
ROPE_TABLES = ("rope.cos", "rope.sin")
HEAD_DIM_MULTIPLE = 8  # GroupQueryAttention takes no other head_dim
FIXED_ROPE_TYPES = ("default", "linear", "llama3", "yarn")  # whose angles depend on the position alone


class WeightFormat(Protocol):
    """How matrices are stored in the graph: plain or packed."""

    type: np.dtype  # of activations, cache, biases and RoPE's tables
    onnx_type: int  # the same as ONNX names it

    def linear(self, file: OnnxFile, name: str, weight_OI: torch.Tensor, x: str, output: str) -> str:
        """x (..., I) -> x W^T (..., O)."""
        ...

    def embedding(self, file: OnnxFile, name: str, weight_OI: torch.Tensor, ids: str, output: str) -> str:
        """ids (...) -> rows of W (..., I)."""
        ...

    def head(self, file: OnnxFile, name: str, weight_OI: torch.Tensor, x: str, output: str) -> str:
        """Like `linear`, for the LM head."""
        ...

    def tied_head(self, file: OnnxFile, name: str, shape_OI: tuple[int, ...], x: str, output: str) -> str:
        """Like `head`, with the matrix that `embedding` has stored under the same name."""
        ...


def check_supported(checkpoint: DenseCheckpoint) -> None:
    """Raise UserError for a model that the graph cannot represent.

    Not supported: a head_dim that is not a multiple of 8, and RoPE angles that depend on the length of the text.
    """
    where = checkpoint.path / "config.json"
    if checkpoint.shape.head_dim % HEAD_DIM_MULTIPLE:
        raise UserError(f"{where}: head_dim {checkpoint.shape.head_dim} has no ONNX form: onnxruntime's attention "
                        f"needs a multiple of {HEAD_DIM_MULTIPLE}; leave the onnx formats out")
    scaling = checkpoint.rope.scaling
    if scaling and scaling["rope_type"] not in FIXED_ROPE_TYPES:
        raise UserError(f"{where}: rope_type {scaling['rope_type']!r} has no ONNX form; "
                        f"supported: {', '.join(FIXED_ROPE_TYPES)}; leave the onnx formats out")


def rope_tables(checkpoint: DenseCheckpoint) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cos and sin of every position, each (max_position_embeddings, head_dim / 2), from transformers' module."""
    config = AutoConfig.from_pretrained(checkpoint.path)
    family = config.model_type
    module = import_module(f"transformers.models.{family}.modeling_{family}")
    rotary = getattr(module, f"{family.capitalize()}RotaryEmbedding")(config)
    cos, sin = rotary(torch.zeros(1), torch.arange(checkpoint.shape.max_position_embeddings)[None])
    half = checkpoint.shape.head_dim // 2
    return cos[0, :, :half], sin[0, :, :half]


class DecoderGraph:
    """Writes one checkpoint's graph into `file`. Use `write` once."""

    def __init__(self, file: OnnxFile, checkpoint: DenseCheckpoint, weights: WeightFormat,
                 progress: Callable[[str], None] | None = None):
        self.file, self.checkpoint, self.shape, self.weights = file, checkpoint, checkpoint.shape, weights
        self.config: PretrainedConfig = AutoConfig.from_pretrained(checkpoint.path)
        self.progress = progress or (lambda _: None)
        self._unplaced = {(weight.role.name, weight.layer): weight for weight in checkpoint.weights()}

    def write(self) -> None:
        """Write all inputs, nodes and outputs. Raises ValueError if a weight of the checkpoint was not used."""
        self._inputs()
        self._rope_tables()
        embedding = self._unplaced[("token_embd", None)]
        hidden = self.weights.embedding(self.file, embedding.name, self._take("token_embd", None), "input_ids",
                                        "model.embed_tokens")
        for layer in range(self.shape.num_hidden_layers):
            hidden = self._layer(hidden, layer)
        hidden = self._norm(hidden, "output_norm", None)
        logits = "logits" if self.weights.onnx_type == FLOAT else "lm_head"
        if self.shape.tied:
            self.weights.tied_head(self.file, embedding.name, embedding.shape, hidden, logits)
        else:
            head = self._name("output", None)
            self.weights.head(self.file, head, self._take("output", None), hidden, logits)
        if logits != "logits":
            self.file.node("Cast", [logits], "logits", to=FLOAT)
        self.file.output("logits", FLOAT, ["batch_size", "sequence_length", self.shape.vocab_size])
        for layer in range(self.shape.num_hidden_layers):
            for kind in ("key", "value"):
                self.file.output(f"present.{layer}.{kind}", self.weights.onnx_type,
                                 self._cache_shape("total_sequence_length"))
        if self._unplaced:
            raise ValueError(f"{self.file.path}: no place for {sorted(w.name for w in self._unplaced.values())}")

    def _take(self, role: str, layer: int | None) -> torch.Tensor:
        """Return the weight of this role as the checkpoint stores it. Each weight can be taken only once."""
        weight = self._unplaced.pop((role, layer))
        self.progress(weight.name)
        return self.checkpoint.tensor(weight.name)

    def _vector(self, role: str, layer: int | None, type: np.dtype) -> str:
        """Add a norm or bias as an initializer."""
        name = self._name(role, layer)
        return self.file.weight(name, array_of(self._take(role, layer), type, name))

    def _name(self, role: str, layer: int | None) -> str:
        """Return Hugging Face's name of a weight that has not been taken yet."""
        return self._unplaced[(role, layer)].name

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
                file.input(f"past_key_values.{layer}.{kind}", self.weights.onnx_type,
                           self._cache_shape("past_sequence_length"))
        # GroupQueryAttention wants each row's S - 1, and S, both as int32.
        lengths = file.node("ReduceSum", [mask, file.constant([1])], "mask.lengths", keepdims=0)
        last = file.node("Sub", [lengths, file.constant([1])], "mask.last")
        file.node("Cast", [last], "seqlens_k", to=TensorProto.INT32)
        size = file.node("Shape", [mask], "mask.shape", start=1, end=2)
        total = file.node("Squeeze", [size], "mask.total")
        file.node("Cast", [total], "total_sequence_length.int32", to=TensorProto.INT32)

    def _rope_tables(self) -> None:
        for name, table in zip(ROPE_TABLES, rope_tables(self.checkpoint), strict=True):
            self.file.weight(name, array_of(table, self.weights.type, name))

    def _layer(self, hidden: str, layer: int) -> str:
        attention = self._attention(self._norm(hidden, "attn_norm", layer), layer)
        hidden = self.file.node("Add", [hidden, attention], f"model.layers.{layer}.after_attention")
        mlp = self._mlp(self._norm(hidden, "ffn_norm", layer), layer)
        return self.file.node("Add", [hidden, mlp], f"model.layers.{layer}")

    def _linear(self, x: str, role: str, layer: int) -> str:
        """Add x W^T, plus b if the family has that bias."""
        name = self._name(role, layer)
        module = name.removesuffix(".weight")
        bias = f"{role}_bias"
        if (bias, layer) not in self._unplaced:
            return self.weights.linear(self.file, name, self._take(role, layer), x, module)
        product = self.weights.linear(self.file, name, self._take(role, layer), x, f"{module}/product")
        return self.file.node("Add", [product, self._vector(bias, layer, self.weights.type)], module)

    def _norm(self, x: str, role: str, layer: int | None) -> str:
        """Add an RMS norm over the last axis in standard operators, which onnxruntime fuses when it loads the graph.

        Always in float32: in float16 the square of a number above 256 is infinite.
        """
        file = self.file
        module = self._name(role, layer).removesuffix(".weight")
        epsilon = file.constant(float(self.config.rms_norm_eps), np.float32)
        is_float = self.weights.onnx_type == FLOAT
        if not is_float:
            x = file.node("Cast", [x], f"{module}/float", to=FLOAT)
        square = file.node("Pow", [x, file.constant(2.0, np.float32)], f"{module}/square")
        mean = file.node("ReduceMean", [square, file.constant([-1])], f"{module}/mean")
        root = file.node("Sqrt", [file.node("Add", [mean, epsilon], f"{module}/mean_eps")], f"{module}/root")
        normal = file.node("Div", [x, root], f"{module}/normal")
        factors = [normal, self._vector(role, layer, np.dtype(np.float32))]
        if is_float:
            return file.node("Mul", factors, module)
        return file.node("Cast", [file.node("Mul", factors, f"{module}/scaled")], module, to=self.weights.onnx_type)

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
            scale=1 / math.sqrt(shape.head_dim), local_window_size=self._window(layer))
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

    def _window(self, layer: int) -> int:
        """Return how many tokens a query sees, itself included; -1 for all."""
        return family_of(self.shape.family).window_of_layer(self.config, layer) or -1
