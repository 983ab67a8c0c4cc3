"""The shapes that every stage must get right, by name: arguments of tiny_models.make_tiny."""
from __future__ import annotations

from typing import Any

LLAMA3_ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 64}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama-tied": dict(family="llama", tied=True),
    "llama-untied": dict(family="llama", tied=False, tokenizer="smollm"),
    "llama-llama3-rope": dict(family="llama", tied=True, rope_scaling=LLAMA3_ROPE, rope_theta=500000.0),
    "mistral-untied": dict(family="mistral", tied=False, tokenizer="spm"),
    "mistral-tied": dict(family="mistral", tied=True, tokenizer="spm"),
    "qwen2-tied": dict(family="qwen2", tied=True, tokenizer="qwen2"),
    "qwen2-untied": dict(family="qwen2", tied=False, tokenizer="qwen2"),
    "qwen3-tied": dict(family="qwen3", tied=True, tokenizer="qwen2"),
    "qwen3-untied": dict(family="qwen3", tied=False, tokenizer="gpt2"),
}
