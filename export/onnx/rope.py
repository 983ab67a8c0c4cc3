"""What the ONNX graph can represent of a checkpoint, and the tables of its RoPE."""
from __future__ import annotations

from importlib import import_module

import numpy as np
import torch
from transformers import AutoConfig

from lrc_edge.checkpoint import DenseCheckpoint
from lrc_edge.errors import UserError
from lrc_edge.onnx_graph.decoder import check_heads

FIXED_ROPE_TYPES = ("default", "linear", "llama3", "yarn")  # whose angles depend on the position alone


def check_supported(checkpoint: DenseCheckpoint) -> None:
    """Raise UserError for a model that the graph cannot represent.

    Not supported: a head_dim that is not a multiple of 8, and RoPE angles that depend on the length of the text.
    """
    where = checkpoint.path / "config.json"
    check_heads(checkpoint.shape, where)
    scaling = checkpoint.rope.scaling
    if scaling and scaling["rope_type"] not in FIXED_ROPE_TYPES:
        raise UserError(f"{where}: rope_type {scaling['rope_type']!r} has no ONNX form; "
                        f"supported: {', '.join(FIXED_ROPE_TYPES)}; leave the onnx formats out")


def rope_tables(checkpoint: DenseCheckpoint) -> tuple[np.ndarray, np.ndarray]:
    """Return cos and sin of every position, each (max_position_embeddings, head_dim / 2) float32, from transformers'
    module."""
    config = AutoConfig.from_pretrained(checkpoint.path)
    family = config.model_type
    module = import_module(f"transformers.models.{family}.modeling_{family}")
    rotary = getattr(module, f"{family.capitalize()}RotaryEmbedding")(config)
    cos, sin = rotary(torch.zeros(1), torch.arange(checkpoint.shape.max_position_embeddings)[None])
    half = checkpoint.shape.head_dim // 2
    return cos[0, :, :half].numpy(), sin[0, :, :half].numpy()
