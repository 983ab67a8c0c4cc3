"""genai_config.json: graph, special tokens and search settings for onnxruntime-genai."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lrc_edge.shape import ModelShape

# onnxruntime-genai allocates the whole KV cache for max_length at once; a context of 131,072 would take gigabytes.
DEFAULT_MAX_LENGTH = 4096


def genai_config(shape: ModelShape, model_file: str, bos: int, eos: Sequence[int], pad: int,
                 sampling: Mapping[str, Any]) -> dict[str, Any]:
    """Return the table for `model_file` (relative to the folder). bos, eos, pad: token ids; eos needs at least one.

    The thread count depends on the device. 0 leaves it to onnxruntime, which uses one thread per physical core; without
    the key, onnxruntime-genai uses half of the processors: one thread on two cores. og.Config.overlay changes it.
    """
    return {
        "model": {
            "type": shape.family,
            "bos_token_id": bos,
            "eos_token_id": list(eos) if len(eos) > 1 else eos[0],
            "pad_token_id": pad,
            "context_length": shape.max_position_embeddings,
            "vocab_size": shape.vocab_size,
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "intra_op_num_threads": 0, "provider_options": []},
                "filename": model_file,
                "head_size": shape.head_dim,
                "hidden_size": shape.hidden_size,
                "num_attention_heads": shape.num_attention_heads,
                "num_hidden_layers": shape.num_hidden_layers,
                "num_key_value_heads": shape.num_key_value_heads,
                "inputs": {"input_ids": "input_ids", "attention_mask": "attention_mask",
                           "position_ids": "position_ids", "past_key_names": "past_key_values.%d.key",
                           "past_value_names": "past_key_values.%d.value"},
                "outputs": {"logits": "logits", "present_key_names": "present.%d.key",
                            "present_value_names": "present.%d.value"},
            },
        },
        "search": {**sampling, "max_length": min(shape.max_position_embeddings, DEFAULT_MAX_LENGTH), "min_length": 0,
                   "num_beams": 1, "num_return_sequences": 1, "past_present_share_buffer": True},
    }
