"""A checkpoint's genai_config.json."""
from __future__ import annotations

from typing import Any

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from lrc_edge.checkpoint import DenseCheckpoint
from lrc_edge.errors import UserError
from lrc_edge.onnx_graph.genai_config import genai_config

SAMPLING_DEFAULTS: dict[str, Any] = {"do_sample": False, "temperature": 1.0, "top_k": 50, "top_p": 1.0,
                                     "repetition_penalty": 1.0}


def genai_config_of(checkpoint: DenseCheckpoint, tokenizer: PreTrainedTokenizerBase, generation: dict[str, Any],
                    model_file: str) -> dict[str, Any]:
    """Return the table for `model_file` (relative to the folder). `generation`: generation_config.json, or {}.

    Raises UserError for a checkpoint without a token that ends a text.
    """
    eos = checkpoint.stop_ids(tokenizer)
    if not eos:
        raise UserError(f"{checkpoint.path}: no eos_token_id in config.json, generation_config.json or the tokenizer: "
                        "onnxruntime-genai needs one; add it to config.json or leave the onnx formats out")
    bos = _first(generation.get("bos_token_id"), checkpoint.config.get("bos_token_id"), tokenizer.bos_token_id, eos[0])
    pad = _first(generation.get("pad_token_id"), checkpoint.config.get("pad_token_id"), tokenizer.pad_token_id, eos[0])
    sampling = {key: _first(generation.get(key), default) for key, default in SAMPLING_DEFAULTS.items()}
    return genai_config(checkpoint.shape, model_file, bos, eos, pad, sampling)


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)
