"""Which weights a family has, what each one is for, and which of its axes is the residual width.

A new family is a row in FAMILIES (and a parity test). The clone, the fold and the writers read these tables; no other
file knows a Hugging Face tensor name.
"""
from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from lrc_edge.shape import ModelShape

if TYPE_CHECKING:
    import torch

Kind = Literal[
    "project_in",   # out x residual: the student's is W P
    "project_out",  # residual x in: the student's is P^T W
    "norm",         # a vector over the residual width: the student trains a fresh one
    "copy",         # has no residual axis: the student's is the teacher's
]


@dataclass(frozen=True)
class Role:
    """One kind of weight. `axes` names ModelShape's sizes, outermost first; {i} in `weight` is the layer."""

    name: str
    weight: str
    kind: Kind
    axes: tuple[str, ...]


@dataclass(frozen=True)
class Weight:
    """One tensor of a model: its Hugging Face name, role, layer (None outside the layers) and shape."""

    name: str
    role: Role
    layer: int | None
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


EMBEDDING = Role("token_embd", "model.embed_tokens.weight", "project_in", ("vocab_size", "hidden_size"))
HEAD = Role("output", "lm_head.weight", "project_in", ("vocab_size", "hidden_size"))
FINAL_NORM = Role("output_norm", "model.norm.weight", "norm", ("hidden_size",))

_LAYER = "model.layers.{i}."
_ATTN = _LAYER + "self_attn."
_DECODER = (
    Role("attn_norm", _LAYER + "input_layernorm.weight", "norm", ("hidden_size",)),
    Role("attn_q", _ATTN + "q_proj.weight", "project_in", ("q_size", "hidden_size")),
    Role("attn_k", _ATTN + "k_proj.weight", "project_in", ("kv_size", "hidden_size")),
    Role("attn_v", _ATTN + "v_proj.weight", "project_in", ("kv_size", "hidden_size")),
    Role("attn_output", _ATTN + "o_proj.weight", "project_out", ("hidden_size", "q_size")),
    Role("ffn_norm", _LAYER + "post_attention_layernorm.weight", "norm", ("hidden_size",)),
    Role("ffn_gate", _LAYER + "mlp.gate_proj.weight", "project_in", ("intermediate_size", "hidden_size")),
    Role("ffn_up", _LAYER + "mlp.up_proj.weight", "project_in", ("intermediate_size", "hidden_size")),
    Role("ffn_down", _LAYER + "mlp.down_proj.weight", "project_out", ("hidden_size", "intermediate_size")),
)
_QKV_BIAS = (
    Role("attn_q_bias", _ATTN + "q_proj.bias", "copy", ("q_size",)),
    Role("attn_k_bias", _ATTN + "k_proj.bias", "copy", ("kv_size",)),
    Role("attn_v_bias", _ATTN + "v_proj.bias", "copy", ("kv_size",)),
)
_QK_NORM = (
    Role("attn_q_norm", _ATTN + "q_norm.weight", "copy", ("head_dim",)),
    Role("attn_k_norm", _ATTN + "k_norm.weight", "copy", ("head_dim",)),
)

# model_type -> the roles of one layer. SmolLM is a llama.
FAMILIES: dict[str, tuple[Role, ...]] = {
    "llama": _DECODER,
    "mistral": _DECODER,
    "qwen2": _DECODER + _QKV_BIAS,
    "qwen3": _DECODER + _QK_NORM,
}
# Config switches that add weights or arithmetic which the tables do not have; each must be off.
UNSUPPORTED_SWITCHES = {
    "llama": ("attention_bias", "mlp_bias"),
    "mistral": (),
    "qwen2": (),
    "qwen3": ("attention_bias",),
}


def weights_of(shape: ModelShape) -> Iterator[Weight]:
    """Every weight of a model of this shape, in the order of the forward pass; no lm_head when it is tied."""
    def weight(role: Role, layer: int | None) -> Weight:
        return Weight(role.weight.format(i=layer), role, layer, tuple(getattr(shape, axis) for axis in role.axes))

    yield weight(EMBEDDING, None)
    for layer in range(shape.num_hidden_layers):
        for role in FAMILIES[shape.family]:
            yield weight(role, layer)
    yield weight(FINAL_NORM, None)
    if not shape.tied:
        yield weight(HEAD, None)


# What reads the residual stream, and the norm that it reads it through.
_READS_THROUGH = {"attn_q": "attn_norm", "attn_k": "attn_norm", "attn_v": "attn_norm",
                  "ffn_gate": "ffn_norm", "ffn_up": "ffn_norm"}


def norm_before(weight: Weight, shape: ModelShape) -> str | None:
    """Name of the norm's weight whose output this weight multiplies; None for a weight that reads the stream raw."""
    if weight.role is HEAD:
        return FINAL_NORM.weight
    norm = _READS_THROUGH.get(weight.role.name)
    if norm is None:
        return None
    return next(role.weight for role in FAMILIES[shape.family] if role.name == norm).format(i=weight.layer)


def compose(role: Role, teacher: torch.Tensor, projection: torch.Tensor) -> torch.Tensor:
    """The student's weight from the teacher's and its projection P (teacher width x student width).

    `project_in` gives W P (out x student width), `project_out` gives P^T W (student width x in). Low-Rank Clone,
    arXiv 2505.12781, section 3. The result has the operands' type; callers choose the precision.
    """
    if role.kind == "project_in":
        return teacher @ projection
    if role.kind == "project_out":
        return projection.T @ teacher
    raise ValueError(f"role {role.name} of kind {role.kind} has no projection")
