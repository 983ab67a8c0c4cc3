"""Fold: compose the teacher's weights and the trained tensors into an ordinary dense Hugging Face directory.

The result needs neither teacher nor lrc-edge: AutoModelForCausalLM and AutoTokenizer of transformers 4.57 and 5 load
it. Shapes and lineage are those in the metadata of the trained file.
"""
from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from lrc_edge.checkpoint import PROVENANCE_FILE, DenseCheckpoint, Rope
from lrc_edge.checkpoint_writer import LICENCES, copy_files, copy_tokenizer, write_weights
from lrc_edge.errors import UserError
from lrc_edge.export.card import model_card, quantized_section
from lrc_edge.families import weights_of
from lrc_edge.lineage import Holds, Lineage, compose, is_map, read_lineage
from lrc_edge.shape import ModelShape

SAME_TEACHER = "fold with the teacher that it was trained on, or train again"
# Fields of a teacher's config about its own files, or about code to run.
DROPPED_CONFIG = ("_name_or_path", "auto_map", "torch_dtype", "transformers_version")


def fold(teacher: DenseCheckpoint, trained_file: Path, folder: Path, provenance: dict[str, str],
         progress: Callable[[str], None] | None = None) -> DenseCheckpoint:
    """Write the student to `folder` (which must not exist) and open it.

    `trained_file`: safetensors with a lineage, tensors named after the student's weights. After a dense phase it has
    every weight. Before, it has norms, P (teacher width x student width) of each matrix, and nothing of biases and q/k
    norms, which follow from the teacher's. Weights are composed in float32, one at a time. Raises UserError.
    """
    with safe_open(trained_file, framework="pt") as trained:
        lineage, holds = read_lineage(trained, trained_file)
        if lineage.teacher != teacher.shape:
            raise UserError(f"{trained_file}: trained on a teacher of another shape; {SAME_TEACHER}")
        _check_tensors(trained, lineage, holds, trained_file)
        folder.mkdir(parents=True)
        write_weights(_folded(teacher, lineage, holds, trained, progress), folder)
    provenance = provenance | {"lineage": lineage.sources("teacher_vocab_size" in provenance)}
    config = student_config(teacher.config, lineage.student, teacher.rope)
    if lineage.student.num_hidden_layers < teacher.shape.num_hidden_layers:
        config |= _layer_types(teacher, lineage.layers)
    _write_tables(config, folder, provenance)
    copy_tokenizer(teacher.path, folder)
    copy_files(teacher.path, folder, ("generation_config.json", *LICENCES))
    (folder / "README.md").write_text(model_card(teacher, lineage.student, provenance))
    return DenseCheckpoint.open(folder)


def with_weights(source: DenseCheckpoint, trained_file: Path, folder: Path, provenance: dict[str, str]
                 ) -> DenseCheckpoint:
    """Write `source` with the weights of `trained_file` in float32 to `folder`, and open it.

    Tokenizer and all other files are copied from the source. The card, if there is one, gets a section about QAT.
    Raises UserError if the file is of another student or holds projections.
    """
    with safe_open(trained_file, framework="pt") as trained:
        lineage, holds = read_lineage(trained, trained_file)
        if lineage.student != source.shape or holds != "weights":
            raise UserError(f"{trained_file}: does not hold the weights of {source.path}; delete it and train again")
        _check_tensors(trained, lineage, holds, trained_file)
        folder.mkdir(parents=True)
        write_weights(_folded(source, lineage, holds, trained, None), folder)
    kept_out = {file.name for file in source.weight_files()} | {"model.safetensors.index.json"}
    for file in source.path.iterdir():
        if file.is_file() and file.name not in kept_out:
            shutil.copyfile(file, folder / file.name)
    _write_tables(student_config(source.config, source.shape, source.rope), folder, provenance)
    card = folder / "README.md"
    if card.exists():
        with card.open("ab") as text:
            text.write(quantized_section(provenance).encode())
    return DenseCheckpoint.open(folder)


def _check_tensors(trained: Any, lineage: Lineage, holds: Holds, where: Path) -> None:
    """Raise UserError unless the file has a tensor of the right shape for each weight that was trained, and no more."""
    names = {name for name in trained.keys() if not is_map(name)}
    for weight in weights_of(lineage.student):
        if holds == "projections" and weight.role.is_inner:
            continue
        is_projection = holds == "projections" and weight.role.is_matrix
        wanted = [lineage.teacher.hidden_size, lineage.student.hidden_size] if is_projection else list(weight.shape)
        found = trained.get_slice(weight.name).get_shape() if weight.name in names else None
        if found != wanted:
            raise UserError(f"{where}: {weight.name} is {found or 'missing'}, need {wanted} for this teacher; "
                            f"{SAME_TEACHER}")
        names.discard(weight.name)
    if names:
        raise UserError(f"{where}: {sorted(names)[0]} belongs to no weight of this teacher; {SAME_TEACHER}")


def _folded(teacher: DenseCheckpoint, lineage: Lineage, holds: Holds, trained: Any,
            progress: Callable[[str], None] | None) -> Iterator[tuple[str, torch.Tensor]]:
    for weight in weights_of(lineage.student):
        if progress:
            progress(weight.name)
        if holds == "weights":
            yield weight.name, trained.get_tensor(weight.name)
        elif weight.role.is_norm:
            yield weight.name, trained.get_tensor(weight.name)
        else:
            # float32, whatever the operands were stored in: folding must add no error of its own.
            tensor = lineage.mapped(weight, teacher.tensor(lineage.source_of(weight)).float())
            if weight.role.is_matrix:
                tensor = compose(weight.role, tensor, trained.get_tensor(weight.name).float())
            yield weight.name, tensor.contiguous()


def _layer_types(teacher: DenseCheckpoint, layers: Sequence[int]) -> dict[str, Any]:
    """Return the kinds of attention of these layers as a field of a config; nothing if all layers have one kind."""
    types = getattr(teacher.check_config(), "layer_types", None)
    return {"layer_types": [types[layer] for layer in layers]} if types else {}


def _write_tables(config: dict[str, Any], folder: Path, provenance: dict[str, str]) -> None:
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / PROVENANCE_FILE).write_text(json.dumps(provenance, indent=2) + "\n")


def student_config(config: dict[str, Any], shape: ModelShape, rope: Rope) -> dict[str, Any]:
    """Return the teacher's config with the student's shape. RoPE is written in two forms: transformers 4 reads one,
    transformers 5 the other."""
    kept = {key: value for key, value in config.items() if key not in DROPPED_CONFIG}
    return kept | shape.as_config() | {
        "dtype": "float32",
        "torch_dtype": "float32",
        "rope_theta": rope.theta,
        "rope_scaling": rope.scaling,
        "rope_parameters": {"rope_type": "default", **(rope.scaling or {}), "rope_theta": rope.theta},
    }
