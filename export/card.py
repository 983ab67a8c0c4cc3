"""The model card of a folded student: licence and lineage for Hugging Face, GGUF and people."""
from __future__ import annotations

from dataclasses import replace
from typing import Any

import yaml

from lrc_edge.checkpoint import DenseCheckpoint
from lrc_edge.shape import ModelShape


def model_card(teacher: DenseCheckpoint, shape: ModelShape, provenance: dict[str, str]) -> str:
    """Return README.md: YAML front matter (license, base_model, tags), and how the student was made.

    `provenance` must have `name` and `teacher`. `method` (the phases that ran), `init`, `hops` and `teacher_vocab_size`
    (if the student has fewer tokens, `student_vocab_size`) are stated if present.
    """
    front: dict[str, Any] = {
        "base_model": provenance["teacher"], "base_model_relation": "finetune", "library_name": "transformers",
        "pipeline_tag": "text-generation", "tags": ["lrc-edge", "distillation"]}
    if "Low-Rank Clone" in provenance.get("method", ""):
        front["tags"].append("low-rank-clone")
    for key in ("license", "license_name", "license_link", "language"):
        if key in teacher.card:
            front[key] = teacher.card[key]
    licence = teacher.card.get("license") or "not stated by the teacher's model card; the teacher's terms apply"
    full = replace(teacher.shape, vocab_size=int(provenance.get("teacher_vocab_size", teacher.shape.vocab_size)))
    columns = [_facts(model) for model in (full, shape)]
    table = "\n".join(f"| {name} | {value} | {columns[1][name]} |" for name, value in columns[0].items())
    lineage = "\n".join(f"| {_cell(key)} | {_cell(value)} |" for key, value in provenance.items())
    return (f"---\n{yaml.safe_dump(front, sort_keys=True, allow_unicode=True)}---\n\n"
            f"# {_cell(provenance['name'])}\n\n{_story(provenance)}\n\n"
            f"| | teacher | student |\n|---|---|---|\n{table}\n\n"
            f"Licence: {_cell(licence)}\n\n## Lineage\n\n| | |\n|---|---|\n{lineage}\n")


def quantized_section(provenance: dict[str, str]) -> str:
    """Return the section that quantization-aware training adds to the card of a student."""
    facts = "\n".join(f"| {key} | {_cell(provenance[key])} |" for key in ("grid", "grid_tokens", "grid_teacher")
                      if key in provenance)
    return ("\n## Quantization-aware training\n\nThe matrices were trained after the fold, rounded to a quantization "
            f"grid in every forward pass.\n\n| | |\n|---|---|\n{facts}\n")


def _story(provenance: dict[str, str]) -> str:
    story = (f"A student of {_cell(provenance['teacher'])}, made by lrc-edge and folded into an ordinary dense "
             "checkpoint. Its weights started from the teacher's")
    if "init" in provenance:
        story += f" (initialization: {_cell(provenance['init'])})"
    if "teacher_vocab_size" in provenance:
        story += (f". Its vocabulary is {int(provenance['student_vocab_size']):,} of the teacher's "
                  f"{int(provenance['teacher_vocab_size']):,} tokens")
    if "hops" in provenance:
        story += f". Larger students were trained before it, each cut from the one before: {_cell(provenance['hops'])}"
    return f"{story}. Training: {_cell(provenance['method'])}." if "method" in provenance else f"{story}."


def _facts(shape: ModelShape) -> dict[str, str]:
    return {"hidden size": str(shape.hidden_size), "layers": str(shape.num_hidden_layers),
            "query / key-value heads": f"{shape.num_attention_heads} / {shape.num_key_value_heads}",
            "head size": str(shape.head_dim), "FFN width": str(shape.intermediate_size),
            "vocabulary": str(shape.vocab_size), "parameters": f"{shape.n_params:,}"}


def _cell(text: Any) -> str:
    """Return one line without characters that would break the table or inject markup."""
    return " ".join(str(text).split()).replace("|", "\\|").replace("<", "&lt;")
