"""The sizes of a model in the header of a GGUF file."""
from __future__ import annotations

from gguf import GGUFWriter

from lrc_edge.shape import ModelShape


def write_sizes(writer: GGUFWriter, shape: ModelShape, context_length: int, epsilon: float) -> None:
    """Write the keys that every llama.cpp graph reads, except RoPE's base. epsilon: of the RMS norms."""
    writer.add_vocab_size(shape.vocab_size)
    writer.add_context_length(context_length)
    writer.add_embedding_length(shape.hidden_size)
    writer.add_feed_forward_length(shape.intermediate_size)
    writer.add_block_count(shape.num_hidden_layers)
    writer.add_head_count(shape.num_attention_heads)
    writer.add_head_count_kv(shape.num_key_value_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_layer_norm_rms_eps(epsilon)
    writer.add_rope_dimension_count(shape.head_dim)
