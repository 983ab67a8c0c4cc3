"""Write one ONNX folder that plain onnxruntime, onnxruntime-genai, ORTModelForCausalLM and transformers.js read.

    config.json, generation_config.json, tokenizer files, chat template, genai_config.json
    onnx/model.onnx            fp32
    onnx/model_fp16.onnx       fp16: weights, activations and KV cache
    onnx/model_quantized.onnx  q8: llama.cpp's Q8_0 blocks
    onnx/model_q4.onnx         q4: llama.cpp's Q4_0 blocks, embedding and head Q8_0

Next to each file are its weights: <file>.onnx_data, and <file>.onnx_data_1 ... above 2 GB.
"""
from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lrc_edge import __version__
from lrc_edge.artifact import Artifact, sha256_of
from lrc_edge.checkpoint import PROVENANCE_FILE, DenseCheckpoint
from lrc_edge.checkpoint_writer import copy_tokenizer
from lrc_edge.console import QUIET, Listener
from lrc_edge.errors import UserError
from lrc_edge.export.fold import student_config
from lrc_edge.export.onnx.genai_config import genai_config_of
from lrc_edge.export.onnx.rope import check_supported
from lrc_edge.export.onnx.weights import CheckpointSource
from lrc_edge.export.passes import Passes
from lrc_edge.export.quantize.imatrix import check_importance
from lrc_edge.formats import formats_of
from lrc_edge.onnx_graph.decoder import ROPE_TABLES, DecoderGraph
from lrc_edge.onnx_graph.file import SHARD_BYTES, OnnxFile
from lrc_edge.onnx_graph.matrices import DEFAULT_ACCURACY_LEVEL, GRIDS, PLAIN_TYPES, matrices_of
from lrc_edge.workspace import replace_tree

ROWS = formats_of("onnx")
TYPE_NAMES = {type: name for name, type in PLAIN_TYPES.items()}
FILES = {encoding: row.file for encoding, row in ROWS.items()}  # the largest first
CARRIED = ("generation_config.json", "README.md", "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", PROVENANCE_FILE)


def export_onnx(checkpoint: DenseCheckpoint, folder: Path, encodings: Sequence[str], progress: Listener = QUIET,
                accuracy_level: int = DEFAULT_ACCURACY_LEVEL, importance: Mapping[str, np.ndarray] | None = None, *,
                on_grid: DenseCheckpoint | None = None, threads: int | None = None,
                shard_bytes: int = SHARD_BYTES) -> list[Artifact]:
    """Write the checkpoint to `folder`, replacing what is there, and return an artifact for each encoding.

    `encodings`: of FILES. `accuracy_level` of q8 and q4: see Blocks. `importance`: imatrix.collect's, by weight name.
    `on_grid`: the same model after QAT, which is the source of q4. `threads`: for quantizing; by default
    one per processor. `shard_bytes`: of one data file. The artifacts' paths are relative to folder's parent.
    Needs memory for one tensor as the checkpoint stores it. An exception leaves `folder` as it was. Raises UserError.
    """
    _check_encodings(encodings, accuracy_level)
    check_supported(checkpoint)
    if importance is not None:
        check_importance(checkpoint, importance)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    passes = Passes({weight.name: checkpoint.n_bytes(weight) for weight in checkpoint.weights()}, len(encodings),
                    progress)
    try:
        (partial / "onnx").mkdir(parents=True)
        artifacts, n_shards = [], {}
        for encoding in encodings:
            path = partial / FILES[encoding]
            passes.start(encoding)
            # Without importance: the scales are already those that the weights were trained with.
            source = CheckpointSource(checkpoint, importance, threads, passes.at) \
                if on_grid is None or not ROWS[encoding].trained_on_grid else \
                CheckpointSource(on_grid, None, threads, passes.at, trained_on_grid=True)
            with OnnxFile(path, shard_bytes) as file:
                DecoderGraph(file, source, matrices_of(ROWS[encoding], accuracy_level)).write()
                file.save(checkpoint.name, _metadata(source.checkpoint, encoding))
            artifacts.append(_artifact(checkpoint, file, encoding, folder.name, source.identical_blocks))
            n_shards[path.name] = len(file.data_paths)
        _write_sidecars(checkpoint, partial, encodings, n_shards)
        replace_tree(partial, folder)
    except OSError as error:
        raise UserError(f"{folder}: cannot write the ONNX files ({error.strerror or error}); "
                        "free some space or give another folder") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return artifacts


def _check_encodings(encodings: Sequence[str], accuracy_level: int) -> None:
    if not encodings or len(set(encodings)) != len(encodings) or set(encodings) - FILES.keys():
        raise UserError(f"onnx: encodings {list(encodings)}: need each of {', '.join(FILES)} at most once")
    if accuracy_level not in range(5):
        raise UserError(f"onnx: accuracy_level {accuracy_level!r}: need 0 to 4 (0: float32 activations, 4: int8)")


def _artifact(checkpoint: DenseCheckpoint, file: OnnxFile, encoding: str, folder_name: str,
              identical: float | None) -> Artifact:
    files = [file.path, *file.data_paths]
    n_bytes, types = _inventory(checkpoint, file.written)
    return Artifact(
        path=f"{folder_name}/{FILES[encoding]}", format="onnx", encoding=encoding,
        bytes=sum(part.stat().st_size for part in files),
        bits_per_weight=8 * n_bytes / checkpoint.shape.n_params, sha256=sha256_of(*files), fallbacks=(),
        tensor_types=types, identical_blocks=identical)


def _inventory(checkpoint: DenseCheckpoint, written: dict[str, tuple[np.dtype, int]]) -> tuple[int, dict[str, int]]:
    """Return the bytes of the checkpoint's weights in the file, and the number of weights of each type.

    Raises ValueError unless the file holds each weight once, in one form, and nothing else except RoPE's tables.
    """
    left = {name: entry for name, entry in written.items() if name not in ROPE_TABLES}
    n_bytes, types = 0, Counter[str]()
    for weight in checkpoint.weights():
        forms: dict[str, tuple[str, ...]] = {type: grid.names(weight.name) for type, grid in GRIDS.items()}
        if weight.name in left:
            forms[TYPE_NAMES[left[weight.name][0]]] = (weight.name,)
        found = [kind for kind, names in forms.items() if all(name in left for name in names)]
        if len(found) != 1:
            raise ValueError(f"onnx: {weight.name} is in the file as {found or 'nothing'}")
        types[found[0]] += 1
        n_bytes += sum(left.pop(name)[1] for name in forms[found[0]])
    if left:
        raise ValueError(f"onnx: {sorted(left)} in the file are not weights of the checkpoint")
    return n_bytes, dict(types)


def _write_sidecars(checkpoint: DenseCheckpoint, folder: Path, encodings: Sequence[str], n_shards: dict[str, int]
                    ) -> None:
    """Write the files next to the graphs. onnxruntime-genai and transformers.js load the smallest graph by default."""
    smallest = max(encodings, key=list(FILES).index)
    config = student_config(checkpoint.config, checkpoint.shape, checkpoint.rope)
    config["transformers.js_config"] = {"dtype": smallest, "use_external_data_format": n_shards}
    if "fp16" in encodings:  # transformers.js before 4.0 does not look at the graph's own type
        config["transformers.js_config"]["kv_cache_dtype"] = {"fp16": "float16"}
    _write_json(folder / "config.json", config)
    for name in CARRIED:
        if (checkpoint.path / name).exists():
            shutil.copyfile(checkpoint.path / name, folder / name)
    tokenizer = checkpoint.tokenizer()
    if (checkpoint.path / "tokenizer.json").exists():
        copy_tokenizer(checkpoint.path, folder)
    else:
        tokenizer.save_pretrained(folder)  # converts SentencePiece: onnxruntime-genai reads tokenizer.json only
    _bound_model_max_length(folder / "tokenizer_config.json", checkpoint.shape.max_position_embeddings)
    generation_file = folder / "generation_config.json"
    try:
        generation = json.loads(generation_file.read_text()) if generation_file.exists() else {}
    except ValueError as error:
        where = checkpoint.path / generation_file.name
        raise UserError(f"{where}: not JSON ({error}); fix it or delete it") from error
    _write_json(folder / "genai_config.json", genai_config_of(checkpoint, tokenizer, generation, FILES[smallest]))


def _bound_model_max_length(file: Path, context_length: int) -> None:
    """Replace "no limit", written as 1e30, which overflows the integers of other JSON readers."""
    table = json.loads(file.read_text()) if file.exists() else {"tokenizer_class": "PreTrainedTokenizerFast"}
    table["model_max_length"] = min(int(table.get("model_max_length") or context_length), context_length)
    _write_json(file, table)


def _write_json(path: Path, table: dict[str, Any]) -> None:
    path.write_text(json.dumps(table, indent=2, ensure_ascii=False) + "\n")


def _metadata(checkpoint: DenseCheckpoint, encoding: str) -> dict[str, str]:
    """Return metadata_props: licence and lineage."""
    metadata = {"lrc_edge.name": checkpoint.name, "lrc_edge.encoding": encoding, "lrc_edge.version": __version__}
    for key in ("license", "license_name", "license_link", "base_model"):
        value = checkpoint.card.get(key)
        if value:
            metadata[key] = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return metadata | {f"lrc_edge.{key}": str(value) for key, value in checkpoint.provenance.items()}
