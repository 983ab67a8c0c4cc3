"""The model card of a folded student: licence and lineage where Hugging Face, GGUF and people look for them."""
from __future__ import annotations

from typing import Any

import yaml

from lrc_edge.checkpoint import DenseCheckpoint
from lrc_edge.shape import ModelShape


def model_card(teacher: DenseCheckpoint, shape: ModelShape, provenance: dict[str, str]) -> str:
    """README.md: YAML front matter (license, base_model, tags) and a page about how the student was made."""
    front: dict[str, Any] = {
        "base_model": provenance["teacher"], "base_model_relation": "finetune", "library_name": "transformers",
        "pipeline_tag": "text-generation", "tags": ["lrc-edge", "low-rank-clone", "distillation"]}
    for key in ("license", "license_name", "license_link", "language"):
        if key in teacher.card:
            front[key] = teacher.card[key]
    licence = teacher.card.get("license") or "not stated by the teacher's model card; the teacher's terms apply"
    rows = [("hidden size", teacher.shape.hidden_size, shape.hidden_size),
            ("layers", teacher.shape.num_hidden_layers, shape.num_hidden_layers),
            ("query / key-value heads", f"{shape.num_attention_heads} / {shape.num_key_value_heads}",
             f"{shape.num_attention_heads} / {shape.num_key_value_heads}"),
            ("head size", teacher.shape.head_dim, shape.head_dim),
            ("FFN width", teacher.shape.intermediate_size, shape.intermediate_size),
            ("vocabulary", teacher.shape.vocab_size, shape.vocab_size),
            ("parameters", f"{teacher.shape.n_params:,}", f"{shape.n_params:,}")]
    table = "\n".join(f"| {name} | {theirs} | {mine} |" for name, theirs, mine in rows)
    lineage = "\n".join(f"| {_cell(key)} | {_cell(value)} |" for key, value in provenance.items())
    return (f"---\n{yaml.safe_dump(front, sort_keys=True, allow_unicode=True)}---\n\n"
            f"# {_cell(provenance['name'])}\n\n"
            f"A Low-Rank Clone ([arXiv 2505.12781](https://arxiv.org/abs/2505.12781)) of "
            f"{_cell(provenance['teacher'])}, made by lrc-edge: each weight matrix is the teacher's times a trained "
            "low-rank projection, folded into an ordinary dense checkpoint.\n\n"
            f"| | teacher | student |\n|---|---|---|\n{table}\n\n"
            f"Licence: {_cell(licence)}\n\n## Lineage\n\n| | |\n|---|---|\n{lineage}\n")


def _cell(text: Any) -> str:
    """One line without the characters that would break the table or smuggle in markup."""
    return " ".join(str(text).split()).replace("|", "\\|").replace("<", "&lt;")
