"""The supported model families: one record each, with every fact that differs between them.

A new family is a row of FAMILIES and a parity test. Other code reads the record and never branches on a family's name.
Hugging Face's names of tensors and modules occur only here and in the ONNX writer, which names its nodes after them.
"""
from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from lrc_edge.errors import UserError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from lrc_edge.shape import ModelShape

RESIDUAL = "hidden_size"  # the axis of the residual stream


@dataclass(frozen=True)
class Role:
    """One kind of weight.

    `axes` names the sizes of ModelShape, outermost first. Nothing else decides how the weight is treated. Two axes make
    a matrix (outputs, inputs). A matrix reads the residual stream if its inputs are the residual width, and writes to
    it if its outputs are. A vector over the residual width is a norm's gain; any other vector (a bias, the gain of a
    q/k norm) does not depend on that width.
    """

    name: str
    weight: str  # the Hugging Face name; {i} is the layer
    axes: tuple[str, ...]
    norm: str = ""  # role of the norm whose output this matrix reads; empty if it does not read one

    @property
    def module(self) -> str:
        """Return the path of its module: in the layer, or in the model if the weight is outside the layers."""
        return self.weight.rpartition(".")[0].removeprefix(_LAYER)

    @property
    def is_matrix(self) -> bool:
        return len(self.axes) == 2

    @property
    def is_norm(self) -> bool:
        """Whether it is the gain of a norm of the residual stream."""
        return self.axes == (RESIDUAL,)

    @property
    def is_inner(self) -> bool:
        """Whether it is a vector that is not in the residual stream: a bias, or the gain of a q/k norm."""
        return RESIDUAL not in self.axes

    @property
    def writes_stream(self) -> bool:
        return self.is_matrix and self.axes[0] == RESIDUAL


@dataclass(frozen=True)
class Weight:
    """One tensor of a model: its Hugging Face name, role, layer (None outside the layers) and shape."""

    name: str
    role: Role
    layer: int | None
    shape: tuple[int, ...]

    @classmethod
    def of(cls, role: Role, layer: int | None, shape: ModelShape) -> Weight:
        return cls(role.weight.format(i=layer), role, layer, tuple(getattr(shape, axis) for axis in role.axes))

    @property
    def module(self) -> str:
        """Return the path, in the model, of the module that holds the weight."""
        return self.name.rpartition(".")[0]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Architecture:
    """An architecture of llama.cpp: the form of its files, and which models it computes."""

    name: str  # general.architecture
    permutes_qk: bool = False  # it rotates neighbouring rows of q and k, so files hold those rows interleaved
    llama3_rope: bool = False  # it reads the factors of RoPE's frequencies
    square_attention: bool = False  # it assumes head_dim = hidden_size / heads (its attn_output is square)


# The llama graph takes q/k/v biases, too.
LLAMA = Architecture("llama", permutes_qk=True, llama3_rope=True)
QWEN2 = Architecture("qwen2", square_attention=True)
QWEN3 = Architecture("qwen3")
ARCHITECTURES = {architecture.name: architecture for architecture in (LLAMA, QWEN2, QWEN3)}


@dataclass(frozen=True)
class Family:
    """The facts about one model_type. All families share SiLU, RMSNorm and RoPE over two halves of a head."""

    model_type: str
    roles: tuple[Role, ...]  # of one layer, in the order of the forward pass
    gguf: tuple[Architecture, ...]  # llama.cpp's graphs that compute it, the preferred one first
    # Layers with a sliding attention window: none, whatever the config holds; all; or, if the config's
    # use_sliding_window is on, those that its layer_types name.
    window: Literal["none", "all", "switched"] = "none"
    default_window: int | None = None  # transformers' own, if the config has no sliding_window
    # Whether transformers 5 refuses a hidden_size that is not a multiple of the query heads, even with a head_dim.
    width_divides_by_heads: bool = False
    off: tuple[str, ...] = ()  # config switches that add weights or arithmetic that `roles` does not have

    @property
    def matrices(self) -> tuple[Role, ...]:
        """The linears of a layer. The clone loss compares the outputs of each."""
        return tuple(role for role in self.roles if role.is_matrix)

    def role(self, name: str) -> Role:
        """Return the role of a layer by its name. Raises KeyError."""
        return {role.name: role for role in self.roles}[name]

    def norm_after(self, writer: Role) -> Role | None:
        """Return the norm that reads the residual stream after a matrix has written to it; None after the last."""
        later = self.roles[self.roles.index(writer) + 1:]
        return next((role for role in later if role.is_norm), None)

    @property
    def normalizes_heads(self) -> bool:
        """Whether q/k norms stand between the linears and RoPE: then keys cannot be merged."""
        return any(role.axes == ("head_dim",) for role in self.roles)

    def has_window(self, config: Mapping[str, Any]) -> bool:
        """Whether some layer has a sliding window, according to the table of config.json."""
        return {"none": False, "all": True, "switched": bool(config.get("use_sliding_window"))}[self.window]

    def window_of(self, config: Mapping[str, Any]) -> int | None:
        """Return the tokens of the sliding window of the layers that have one; None without such layers."""
        return config.get("sliding_window", self.default_window) if self.has_window(config) else None

    def window_of_layer(self, config: Any, layer: int) -> int | None:
        """Return how many tokens a query of this layer sees, itself included; None: all. `config`: of transformers."""
        kinds = getattr(config, "layer_types", None)
        if self.window == "none" or (kinds and kinds[layer] != "sliding_attention"):
            return None
        return config.sliding_window or None


EMBEDDING = Role("token_embd", "model.embed_tokens.weight", ("vocab_size", RESIDUAL))
HEAD = Role("output", "lm_head.weight", ("vocab_size", RESIDUAL), norm="output_norm")
FINAL_NORM = Role("output_norm", "model.norm.weight", (RESIDUAL,))

_LAYER = "model.layers.{i}."
_ATTN = _LAYER + "self_attn."
_DECODER = (
    Role("attn_norm", _LAYER + "input_layernorm.weight", (RESIDUAL,)),
    Role("attn_q", _ATTN + "q_proj.weight", ("q_size", RESIDUAL), norm="attn_norm"),
    Role("attn_k", _ATTN + "k_proj.weight", ("k_size", RESIDUAL), norm="attn_norm"),
    Role("attn_v", _ATTN + "v_proj.weight", ("v_size", RESIDUAL), norm="attn_norm"),
    Role("attn_output", _ATTN + "o_proj.weight", (RESIDUAL, "o_size")),
    Role("ffn_norm", _LAYER + "post_attention_layernorm.weight", (RESIDUAL,)),
    Role("ffn_gate", _LAYER + "mlp.gate_proj.weight", ("intermediate_size", RESIDUAL), norm="ffn_norm"),
    Role("ffn_up", _LAYER + "mlp.up_proj.weight", ("intermediate_size", RESIDUAL), norm="ffn_norm"),
    Role("ffn_down", _LAYER + "mlp.down_proj.weight", (RESIDUAL, "intermediate_size")),
)
_QKV_BIAS = (
    Role("attn_q_bias", _ATTN + "q_proj.bias", ("q_size",)),
    Role("attn_k_bias", _ATTN + "k_proj.bias", ("k_size",)),
    Role("attn_v_bias", _ATTN + "v_proj.bias", ("v_size",)),
)
_QK_NORM = (
    Role("attn_q_norm", _ATTN + "q_norm.weight", ("head_dim",)),
    Role("attn_k_norm", _ATTN + "k_norm.weight", ("head_dim",)),
)

FAMILIES = {family.model_type: family for family in (
    # SmolLM is a llama, too.
    Family("llama", _DECODER, (LLAMA,), width_divides_by_heads=True, off=("attention_bias", "mlp_bias")),
    Family("mistral", _DECODER, (LLAMA,), window="all", default_window=4096),
    Family("qwen2", _DECODER + _QKV_BIAS, (QWEN2, LLAMA), window="switched"),
    Family("qwen3", _DECODER + _QK_NORM, (QWEN3,), window="switched", off=("attention_bias",)),
)}


def family_of(model_type: Any, where: object = "config.json") -> Family:
    """Return the record of a model_type. Raises UserError, whose text starts with `where`, if there is none."""
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise UserError(f"{where}: model_type {model_type!r:.80} is not supported; supported: {', '.join(FAMILIES)}")
    return FAMILIES[model_type]


def weights_of(shape: ModelShape) -> Iterator[Weight]:
    """Return every weight of a model of this shape, in the order of the forward pass; without a tied head."""
    yield Weight.of(EMBEDDING, None, shape)
    for layer in range(shape.num_hidden_layers):
        for role in family_of(shape.family).roles:
            yield Weight.of(role, layer, shape)
    yield Weight.of(FINAL_NORM, None, shape)
    if not shape.tied:
        yield Weight.of(HEAD, None, shape)


def norm_before(weight: Weight, shape: ModelShape) -> str | None:
    """Return the name of the gain of the norm whose output is the weight's input; None if there is no such norm."""
    roles = (*family_of(shape.family).roles, FINAL_NORM)
    return next((role.weight.format(i=weight.layer) for role in roles if role.name == weight.role.norm), None)


def is_unread(name: str) -> bool:
    """Whether a stored tensor is ignored: the copy of a tied head, or RoPE's frequencies."""
    return name == HEAD.weight or "rotary_emb" in name


class Parts(NamedTuple):
    """The modules of a transformers model, in the order of the forward pass."""

    embedding: nn.Embedding
    rope: nn.Module
    layers: nn.ModuleList
    norm: nn.Module
    head: nn.Linear


def parts_of(model: PreTrainedModel) -> Parts:
    part: Any = model.get_submodule
    return Parts(part(EMBEDDING.module), part("model.rotary_emb"), part("model.layers"), part(FINAL_NORM.module),
                 part(HEAD.module))
