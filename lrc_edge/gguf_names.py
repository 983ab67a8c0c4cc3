"""GGUF's names of the weights."""
from __future__ import annotations

from gguf import MODEL_TENSOR, TENSOR_NAMES

from lrc_edge.families import Weight

# Role -> (GGUF tensor, suffix). Total over families.py: a role that is missing here is an error, not a skipped tensor.
GGUF_NAMES: dict[str, tuple[MODEL_TENSOR, str]] = {
    "token_embd": (MODEL_TENSOR.TOKEN_EMBD, ".weight"),
    "output": (MODEL_TENSOR.OUTPUT, ".weight"),
    "output_norm": (MODEL_TENSOR.OUTPUT_NORM, ".weight"),
    "attn_norm": (MODEL_TENSOR.ATTN_NORM, ".weight"),
    "attn_q": (MODEL_TENSOR.ATTN_Q, ".weight"),
    "attn_k": (MODEL_TENSOR.ATTN_K, ".weight"),
    "attn_v": (MODEL_TENSOR.ATTN_V, ".weight"),
    "attn_output": (MODEL_TENSOR.ATTN_OUT, ".weight"),
    "attn_q_bias": (MODEL_TENSOR.ATTN_Q, ".bias"),
    "attn_k_bias": (MODEL_TENSOR.ATTN_K, ".bias"),
    "attn_v_bias": (MODEL_TENSOR.ATTN_V, ".bias"),
    "attn_q_norm": (MODEL_TENSOR.ATTN_Q_NORM, ".weight"),
    "attn_k_norm": (MODEL_TENSOR.ATTN_K_NORM, ".weight"),
    "ffn_norm": (MODEL_TENSOR.FFN_NORM, ".weight"),
    "ffn_gate": (MODEL_TENSOR.FFN_GATE, ".weight"),
    "ffn_up": (MODEL_TENSOR.FFN_UP, ".weight"),
    "ffn_down": (MODEL_TENSOR.FFN_DOWN, ".weight"),
}


def gguf_name(weight: Weight) -> str:
    """"blk.3.attn_q.weight". Raises ValueError for a role that GGUF_NAMES lacks."""
    if weight.role.name not in GGUF_NAMES:
        raise ValueError(f"gguf: no name for role {weight.role.name} ({weight.name}); extend GGUF_NAMES")
    tensor, suffix = GGUF_NAMES[weight.role.name]
    return TENSOR_NAMES[tensor].format(bid=weight.layer) + suffix
