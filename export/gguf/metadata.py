"""Everything in a GGUF file except the tensors: hyperparameters, RoPE, identity and lineage, vocabulary."""
from __future__ import annotations

import math
import re
from typing import Any

import torch
from gguf import GGML_QUANT_VERSION, GGUFWriter, RopeScalingType, size_label

import lrc_edge
from lrc_edge.checkpoint import DenseCheckpoint
from lrc_edge.errors import UserError
from lrc_edge.export.gguf.vocabulary import Vocabulary
from lrc_edge.export.quantize.encodings import Encoding
from lrc_edge.families import Architecture, family_of
from lrc_edge.gguf_sizes import write_sizes
from lrc_edge.student import split_name

# rope_type -> its fields; all except attention_factor are required. Any other field would be dropped silently.
_ROPE_FIELDS = {
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "yarn": {"factor", "original_max_position_embeddings", "attention_factor"},
}
# Yarn's settings that llama.cpp reads for other architectures only: for ours its own values hold.
_YARN_FIXED = {"beta_fast": 32, "beta_slow": 1, "truncate": True}
_SAMPLING = {"temperature": "temp", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p",
             "repetition_penalty": "penalty_repeat"}  # generation_config.json -> GGUFWriter.add_sampling_*


def architectures(checkpoint: DenseCheckpoint) -> tuple[Architecture, ...]:
    """Return llama.cpp's architectures for the checkpoint's family, the preferred one first. Raises UserError."""
    found = family_of(checkpoint.shape.family).gguf
    if not found:
        raise UserError(f"{checkpoint.path}: {checkpoint.shape.family} is not supported in GGUF; "
                        "leave gguf out of --formats")
    return found


def architecture(checkpoint: DenseCheckpoint) -> Architecture:
    """Return llama.cpp's architecture for the checkpoint: the first of its family that can compute it, else UserError.

    A narrower qwen2 gets the llama architecture, because llama.cpp's qwen2 assumes heads x head_dim = hidden_size. The
    arithmetic is the same.
    """
    shape, scaling = checkpoint.shape, checkpoint.rope.scaling or {}
    llama3_rope = scaling.get("rope_type") == "llama3"
    for graph in architectures(checkpoint):
        if (graph.llama3_rope or not llama3_rope) and (not graph.square_attention or shape.q_size == shape.hidden_size):
            return graph
    raise UserError(f"{checkpoint.path}: llama.cpp has no llama3 RoPE scaling for {shape.family}; "
                    "leave gguf out of --formats")


def check_rope(checkpoint: DenseCheckpoint) -> None:
    """Raise UserError if llama.cpp does not support the checkpoint's RoPE."""
    scaling = dict(checkpoint.rope.scaling or {"rope_type": "default"})
    kind = scaling.pop("rope_type")
    scaling.pop("partial_rotary_factor", None)
    tables = (checkpoint.config, checkpoint.config.get("rope_parameters"), checkpoint.config.get("rope_scaling"))
    if any(table.get("partial_rotary_factor", 1) != 1 for table in tables if table):
        raise UserError(f"{checkpoint.path}: partial_rotary_factor other than 1 is not supported in GGUF; "
                        "leave gguf out of --formats")
    if kind != "default" and kind not in _ROPE_FIELDS:
        raise UserError(f"{checkpoint.path}: RoPE scaling {kind!r} is not supported in GGUF; "
                        f"supported: {', '.join(_ROPE_FIELDS)}")
    if missing := _ROPE_FIELDS.get(kind, set()) - {"attention_factor"} - scaling.keys():
        raise UserError(f"{checkpoint.path}: RoPE scaling {kind!r} lacks {min(missing)}; fix the config")
    for name, value in scaling.items():
        usual = kind == "yarn" and value == _YARN_FIXED.get(name)
        if value is not None and name not in _ROPE_FIELDS.get(kind, ()) and not usual:
            raise UserError(f"{checkpoint.path}: {name} = {value!r} of RoPE scaling {kind!r} is not supported in GGUF; "
                            "leave gguf out of --formats")


def llama3_rope_factors(checkpoint: DenseCheckpoint) -> torch.Tensor | None:
    """Return the divisor of each RoPE frequency, (head_dim / 2,) float32; None without llama3 scaling.

    Frequencies above a band are unchanged, those below are divided by `factor`, those in it are interpolated (Llama
    3.1).
    """
    scaling = checkpoint.rope.scaling or {}
    if scaling.get("rope_type") != "llama3":
        return None
    head_dim = checkpoint.shape.head_dim
    frequency = checkpoint.rope.theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    turns = scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)  # in the original context
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    share = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - share) / scaling["factor"] + share)).float()


def write_hyperparameters(writer: GGUFWriter, checkpoint: DenseCheckpoint, encoding: Encoding) -> None:
    writer.add_type("model")
    writer.add_quantization_version(GGML_QUANT_VERSION)
    writer.add_file_type(encoding.ftype)
    write_sizes(writer, checkpoint.shape, checkpoint.context_length, float(checkpoint.config.get("rms_norm_eps", 1e-6)))
    _write_rope(writer, checkpoint)


def _write_rope(writer: GGUFWriter, checkpoint: DenseCheckpoint) -> None:
    rope, scaling = checkpoint.rope, checkpoint.rope.scaling or {}
    writer.add_rope_freq_base(rope.theta)
    if scaling.get("rope_type") == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(scaling["factor"])
    if scaling.get("rope_type") == "yarn":
        writer.add_rope_scaling_type(RopeScalingType.YARN)
        writer.add_rope_scaling_factor(scaling["factor"])
        writer.add_rope_scaling_orig_ctx_len(scaling["original_max_position_embeddings"])
        if scaling.get("attention_factor") is not None:
            writer.add_rope_scaling_attn_factors(yarn_attention_factor(scaling))


def yarn_attention_factor(scaling: dict[str, Any]) -> float:
    """Return what llama.cpp must multiply yarn's default attention factor by to get Hugging Face's attention_factor."""
    if scaling.get("attention_factor") is None:
        return 1.0
    return float(scaling["attention_factor"] / (0.1 * math.log(scaling["factor"]) + 1))


def write_identity(writer: GGUFWriter, checkpoint: DenseCheckpoint) -> None:
    """Write name, size, licence, lineage, our own keys lrc_edge.*, and the sampling that the model's authors advise."""
    card = checkpoint.card
    base, tune = split_name(checkpoint.name)
    writer.add_name(checkpoint.name)
    writer.add_basename(base)
    if tune:
        writer.add_finetune(tune)
    writer.add_size_label(model_size(checkpoint))
    writer.add_quantized_by(f"lrc-edge {lrc_edge.__version__}")
    # Hugging Face's licence ids are SPDX identifiers in lower case, and SPDX compares without regard to case.
    for key, add in (("license", writer.add_license), ("license_name", writer.add_license_name),
                     ("license_link", writer.add_license_link)):
        if card.get(key):
            add(", ".join(_strings(card[key])))
    if tags := _strings(card.get("tags")):
        writer.add_tags(tags)
    if languages := _strings(card.get("language")):
        writer.add_languages(languages)
    _write_base_models(writer, checkpoint)
    for key, value in checkpoint.provenance.items():
        writer.add_string(f"lrc_edge.{key}", str(value))
    _write_sampling(writer, checkpoint)


def _write_base_models(writer: GGUFWriter, checkpoint: DenseCheckpoint) -> None:
    """Write base_model.*: a student's teacher; for a third-party checkpoint, the models that its card names."""
    teacher = checkpoint.provenance.get("teacher")
    models = [teacher] if teacher else _strings(checkpoint.card.get("base_model"))
    if not models:
        return
    writer.add_base_model_count(len(models))
    for i, model in enumerate(models):
        hub_id = re.fullmatch(r"([\w.-]+)/([\w.-]+)", model)
        # Only the name of a local directory: its path is private.
        writer.add_base_model_name(i, hub_id[2] if hub_id else re.split(r"[/\\]", model.rstrip("/\\"))[-1])
        if hub_id:
            writer.add_base_model_organization(i, hub_id[1])
            writer.add_base_model_repo_url(i, f"https://huggingface.co/{model}")
        revision = checkpoint.provenance.get("teacher_revision", "local")
        if teacher and revision != "local":
            writer.add_base_model_version(i, revision)


def _write_sampling(writer: GGUFWriter, checkpoint: DenseCheckpoint) -> None:
    advice = checkpoint.generation
    if advice.get("do_sample") is False:
        return
    for field, key in _SAMPLING.items():
        add = getattr(writer, f"add_sampling_{key}", None)  # older gguf packages have no such keys
        if add and advice.get(field) is not None:
            add(advice[field])


def _strings(value: Any) -> list[str]:
    """Return a field of the card that may be one string, a list, or missing."""
    return [str(item) for item in (value if isinstance(value, list) else [value]) if item]


def model_size(checkpoint: DenseCheckpoint) -> str:
    """Return GGUF's size label: "4.5M"."""
    n_params = checkpoint.shape.n_params
    return str(size_label(n_params, n_params, 0, 0))


def write_vocabulary(writer: GGUFWriter, vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.scores is not None:
        writer.add_token_scores(vocabulary.scores)
        writer.add_add_space_prefix(vocabulary.add_space_prefix)
    if vocabulary.merges is not None:
        writer.add_token_merges(vocabulary.merges)
    for name, token in vocabulary.special_ids.items():
        getattr(writer, f"add_{name}_token_id")(token)
    writer.add_add_bos_token(vocabulary.add_bos)
    writer.add_add_eos_token(vocabulary.add_eos)
    if vocabulary.chat_template is not None:
        writer.add_chat_template(vocabulary.chat_template)


def write_metadata(writer: GGUFWriter, checkpoint: DenseCheckpoint, vocabulary: Vocabulary, encoding: Encoding) -> None:
    """Write all keys, in the order in which a reader looks for them."""
    write_hyperparameters(writer, checkpoint, encoding)
    write_identity(writer, checkpoint)
    write_vocabulary(writer, vocabulary)
