"""Fold: teacher's weights and trained projections become an ordinary dense Hugging Face directory.

The result needs neither teacher nor lrc-edge: AutoModelForCausalLM and AutoTokenizer of transformers 4.57 and 5 load
it.
"""
from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from lrc_edge.checkpoint import PROVENANCE_FILE, TOKENIZER_PARTS, DenseCheckpoint, Rope
from lrc_edge.errors import UserError
from lrc_edge.export.card import model_card
from lrc_edge.roles import compose, weights_of
from lrc_edge.shape import ModelShape

SHARD_BYTES = 2 * 1024**3
# Fields of a teacher's config that speak of its own files or of code to run.
DROPPED_CONFIG = ("_name_or_path", "auto_map", "torch_dtype", "transformers_version")


def fold(teacher: DenseCheckpoint, trained_file: Path, folder: Path, provenance: dict[str, str],
         progress: Callable[[str], None] | None = None) -> DenseCheckpoint:
    """Write the student to `folder` (which must not exist) and open it.

    `trained_file`: safetensors with, for each weight with a residual axis, P (teacher width x student width) or the
    norm itself, named after the weight; or, where its metadata says kind = weights, every weight itself, as a dense
    phase leaves them. Composed in float32, one weight at a time. Raises UserError.
    """
    with safe_open(trained_file, framework="pt") as trained:
        shape = _student_shape(teacher.shape, trained, trained_file)
        folder.mkdir(parents=True)
        _write_weights(_folded(teacher, shape, trained, progress), folder)
    config = student_config(teacher.config, shape, teacher.rope)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    copy_tokenizer(teacher.path, folder)
    for name in ("generation_config.json", "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE"):
        if (teacher.path / name).exists():
            shutil.copyfile(teacher.path / name, folder / name)
    (folder / PROVENANCE_FILE).write_text(json.dumps(provenance, indent=2) + "\n")
    (folder / "README.md").write_text(model_card(teacher, shape, provenance))
    return DenseCheckpoint.open(folder)


def with_weights(source: DenseCheckpoint, trained_file: Path, folder: Path, provenance: dict[str, str]
                 ) -> DenseCheckpoint:
    """Write `source` with the weights of `trained_file` (safetensors, kind = weights) in float32 to `folder`, and open
    it. Tokenizer, card and all else are the source's."""
    with safe_open(trained_file, framework="pt") as trained:
        folder.mkdir(parents=True)
        _write_weights(_folded(source, source.shape, trained, None), folder)
    kept_out = {file.name for file in source.weight_files()} | {"model.safetensors.index.json"}
    for file in source.path.iterdir():
        if file.is_file() and file.name not in kept_out:
            shutil.copyfile(file, folder / file.name)
    config = student_config(source.config, source.shape, source.rope)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / PROVENANCE_FILE).write_text(json.dumps(provenance, indent=2) + "\n")
    return DenseCheckpoint.open(folder)


def _student_shape(teacher: ModelShape, trained: Any, where: Path) -> ModelShape:
    names = set(trained.keys())
    norm = next(w.name for w in weights_of(teacher) if w.role.kind == "norm")
    hidden_size = trained.get_slice(norm).get_shape()[0] if norm in names else 0
    shape = teacher.with_hidden_size(hidden_size)
    for weight in weights_of(shape):
        if weight.role.kind == "copy":
            continue
        is_whole = weight.role.kind == "norm" or _holds_weights(trained)
        wanted = list(weight.shape) if is_whole else [teacher.hidden_size, hidden_size]
        found = trained.get_slice(weight.name).get_shape() if weight.name in names else None
        if found != wanted:
            raise UserError(f"{where}: {weight.name} is {found or 'missing'}, need {wanted} for this teacher; "
                            "fold with the teacher that the projections were trained on")
        names.discard(weight.name)
    if names:
        raise UserError(f"{where}: {sorted(names)[0]} belongs to no weight of this teacher; "
                        "fold with the teacher that the projections were trained on")
    return shape


def _holds_weights(trained: Any) -> bool:
    return (trained.metadata() or {}).get("kind") == "weights"


def _folded(teacher: DenseCheckpoint, shape: ModelShape, trained: Any, progress: Callable[[str], None] | None
            ) -> Iterator[tuple[str, torch.Tensor]]:
    for weight in weights_of(shape):
        if progress:
            progress(weight.name)
        if weight.role.kind == "copy":
            yield weight.name, teacher.tensor(weight.name).float()
        elif weight.role.kind == "norm" or _holds_weights(trained):
            yield weight.name, trained.get_tensor(weight.name)
        else:
            # float32, whatever the operands were stored in: folding must add no error of its own.
            yield weight.name, compose(weight.role, teacher.tensor(weight.name).float(),
                                       trained.get_tensor(weight.name).float()).contiguous()


def _write_weights(tensors: Iterator[tuple[str, torch.Tensor]], folder: Path) -> None:
    """Shards of at most SHARD_BYTES, with an index when there are several: one shard is in memory at a time."""
    shards: list[dict[str, Any]] = []
    shard: dict[str, torch.Tensor] = {}
    size = total = 0

    def flush() -> None:
        nonlocal shard, size
        save_file(shard, folder / f"shard-{len(shards)}", metadata={"format": "pt"})
        shards.append(dict.fromkeys(shard))
        shard, size = {}, 0

    for name, tensor in tensors:
        n_bytes = tensor.numel() * tensor.element_size()
        if shard and size + n_bytes > SHARD_BYTES:
            flush()
        shard[name] = tensor
        size, total = size + n_bytes, total + n_bytes
    flush()
    if len(shards) == 1:
        (folder / "shard-0").rename(folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"shard-{number}").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2))


def student_config(config: dict[str, Any], shape: ModelShape, rope: Rope) -> dict[str, Any]:
    """The teacher's config at the student's width; RoPE in the forms of transformers 4 and 5, which read one each."""
    kept = {key: value for key, value in config.items() if key not in DROPPED_CONFIG}
    return kept | {
        "hidden_size": shape.hidden_size,
        # Heads keep the teacher's size, so head_dim is no longer hidden_size / num_attention_heads.
        "head_dim": shape.head_dim,
        "num_key_value_heads": shape.num_key_value_heads,
        "tie_word_embeddings": shape.tied,
        "dtype": "float32",
        "torch_dtype": "float32",
        "rope_theta": rope.theta,
        "rope_scaling": rope.scaling,
        "rope_parameters": {"rope_type": "default", **(rope.scaling or {}), "rope_theta": rope.theta},
    }


def copy_tokenizer(source: Path, folder: Path) -> None:
    """The tokenizer's files as they are; the class that reads tokenizer.json literally, in transformers 4 and 5."""
    for name in TOKENIZER_PARTS:
        if (source / name).exists():
            shutil.copyfile(source / name, folder / name)
    config = folder / "tokenizer_config.json"
    if config.exists():
        table = json.loads(config.read_text())
        if (folder / "tokenizer.json").exists():
            table["tokenizer_class"] = "PreTrainedTokenizerFast"
        table.pop("auto_map", None)
        config.write_text(json.dumps(table, indent=2, ensure_ascii=False) + "\n")
