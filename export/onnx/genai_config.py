"""genai_config.json: graph, special tokens and search settings for onnxruntime-genai."""
from __future__ import annotations

from typing import Any

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from lrc_edge.checkpoint import DenseCheckpoint
from lrc_edge.errors import UserError

# onnxruntime-genai allocates the whole KV cache for max_length at once; a context of 131,072 would take gigabytes.
DEFAULT_MAX_LENGTH = 4096
SAMPLING_DEFAULTS: dict[str, Any] = {"do_sample": False, "temperature": 1.0, "top_k": 50, "top_p": 1.0,
                                     "repetition_penalty": 1.0}


def genai_config(checkpoint: DenseCheckpoint, tokenizer: PreTrainedTokenizerBase, generation: dict[str, Any],
                 model_file: str) -> dict[str, Any]:
    """Return the table for `model_file` (relative to the folder). `generation`: generation_config.json, or {}.

    The thread count depends on the device. 0 leaves it to onnxruntime, which uses one thread per physical core; without
    the key, onnxruntime-genai uses half of the processors: one thread on two cores. og.Config.overlay changes it.
    """
    shape = checkpoint.shape
    eos = checkpoint.stop_ids(tokenizer)
    if not eos:
        raise UserError(f"{checkpoint.path}: no eos_token_id in config.json, generation_config.json or the tokenizer: "
                        "onnxruntime-genai needs one; add it to config.json or leave the onnx formats out")
    bos = _first(generation.get("bos_token_id"), checkpoint.config.get("bos_token_id"), tokenizer.bos_token_id, eos[0])
    pad = _first(generation.get("pad_token_id"), checkpoint.config.get("pad_token_id"), tokenizer.pad_token_id, eos[0])
    search = {key: _first(generation.get(key), default) for key, default in SAMPLING_DEFAULTS.items()}
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
        "search": {**search, "max_length": min(shape.max_position_embeddings, DEFAULT_MAX_LENGTH), "min_length": 0,
                   "num_beams": 1, "num_return_sequences": 1, "past_present_share_buffer": True},
    }


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)
