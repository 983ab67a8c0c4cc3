"""Describe a Hugging Face directory, a GGUF file or a build directory from headers only, without reading weights."""
from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from lrc_edge.config_file import PROVENANCE_FILE, front_matter, read_optional, read_provenance, read_table
from lrc_edge.errors import UserError, one_line
from lrc_edge.families import FAMILIES
from lrc_edge.shape import ModelShape

SHORT_ARRAY = 8  # longer arrays are shown as length and type


def describe_checkpoint(path: Path) -> dict[str, Any]:
    """Describe a Hugging Face directory of any family. Raises UserError on broken JSON or safetensors.

    `problem` is one line about why lrc-edge cannot use the model; None if it can.
    """
    config = read_table(path / "config.json")
    tensors = _safetensors(path)
    onnx_files = sorted(str(file.relative_to(path)) for file in path.rglob("*.onnx"))
    problem = _problem(path)
    if not tensors and not onnx_files:
        raise UserError(problem or f"{path}: no weights; download the complete model")
    family = str(config.get("model_type"))
    shape = ModelShape.from_config(config, str(path / "config.json")) if family in FAMILIES else None
    stored = sum(math.prod(t["shape"]) for t in tensors)
    n_bytes = sum(t["bytes"] for t in tensors)
    return {
        "kind": "huggingface", "path": str(path), "name": path.resolve().name, "family": family,
        "config": config, "shape": shape.as_dict() if shape else None,
        "n_params": shape.n_params if shape else stored or None, "bytes": n_bytes,
        "bits_per_weight": 8 * n_bytes / stored if stored else None, "tensors": tensors, "onnx_files": onnx_files,
        "tokenizer": _tokenizer(path), "chat_template": _has_chat_template(path),
        "license": _license(path / "README.md"),
        "provenance": read_provenance(path / PROVENANCE_FILE), "problem": problem if tensors else None}


def _problem(path: Path) -> str | None:
    from lrc_edge.checkpoint import DenseCheckpoint

    try:
        DenseCheckpoint.open(path).tokenizer()
    except UserError as error:
        return str(error)
    return None


def _safetensors(path: Path) -> list[dict[str, Any]]:
    from safetensors import SafetensorError, safe_open

    tensors = []
    for file in sorted(path.glob("*.safetensors")):
        try:
            with safe_open(file, framework="numpy") as handle:
                for name in handle.keys():
                    view = handle.get_slice(name)
                    tensors.append(_tensor(name, view.get_dtype(), list(view.get_shape())))
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file}: truncated or corrupt ({one_line(error)}; "
                            f"{file.stat().st_size:,} bytes); download it again") from error
    return tensors


def _tensor(name: str, dtype: str, shape: list[int]) -> dict[str, Any]:
    digits = re.search(r"\d+", dtype)  # BF16, F8_E4M3, I64; BOOL has none and takes a byte
    bits = int(digits[0]) if digits else 8
    return {"name": name, "dtype": dtype, "shape": shape, "bytes": math.ceil(math.prod(shape) * bits / 8)}


def _tokenizer(path: Path) -> dict[str, Any] | None:
    """Return the type, and the size with added tokens, from tokenizer.json or the SentencePiece file."""
    file = path / "tokenizer.json"
    if file.exists():
        table = read_table(file)
        try:
            model, added = table["model"], table.get("added_tokens") or []
            vocab = model["vocab"]
            known = set(vocab) if isinstance(vocab, dict) else {piece[0] for piece in vocab}
            known |= {token["content"] for token in added}
            return {"file": file.name, "type": str(model.get("type")), "size": len(known)}
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise UserError(f"{file}: not a tokenizer ({one_line(error)}); copy it again") from error
    if (path / "tokenizer.model").exists():
        from sentencepiece import SentencePieceProcessor

        try:
            size = SentencePieceProcessor(model_file=str(path / "tokenizer.model")).get_piece_size()
        except (RuntimeError, OSError) as error:
            raise UserError(f"{path / 'tokenizer.model'}: not a SentencePiece model; copy it again") from error
        return {"file": "tokenizer.model", "type": "SentencePiece", "size": size}
    return None


def _has_chat_template(path: Path) -> bool:
    if (path / "chat_template.jinja").exists():
        return True
    return bool(read_optional(path / "tokenizer_config.json").get("chat_template"))


def _license(card: Path) -> str | None:
    value = front_matter(card).get("license")
    return ", ".join(map(str, value)) if isinstance(value, list) else value and str(value)


def describe_gguf(path: Path) -> dict[str, Any]:
    """Describe a GGUF file. Shapes are rows first, as in PyTorch. Raises UserError if it is truncated or not a GGUF."""
    from lrc_edge.gguf_header import read_header

    header = read_header(path)
    metadata = {name: _shortened(value) for name, value in header.metadata.items()}
    tensors: list[dict[str, Any]] = [
        {"name": t.name, "dtype": f"type {t.type_id}" if t.type is None else t.type.name, "shape": list(t.shape),
         "bytes": t.n_bytes} for t in header.tensors.values()]
    # RoPE's frequency factors are stored as tensors but are not weights.
    n_params = sum(math.prod(t["shape"]) for t in tensors if not t["name"].startswith("rope_freqs"))
    n_bytes = sum(t["bytes"] for t in tensors)
    return {"kind": "gguf", "path": str(path), "name": metadata.get("general.name") or path.stem,
            "bytes": path.stat().st_size, "metadata": metadata, "tensors": tensors, "n_params": n_params,
            "bits_per_weight": 8 * n_bytes / n_params if n_params else None}


def _shortened(value: Any) -> Any:
    """Replace a long array by its length and the type of its elements."""
    if not isinstance(value, list) or len(value) <= SHORT_ARRAY:
        return value
    names = {str: "string", bool: "bool", int: "integer", float: "float"}
    return f"[{len(value):,} × {names.get(type(value[0]), 'array')}]"


def describe_build(path: Path) -> dict[str, Any]:
    """Describe the --out directory of a build or an export: its stages, and its report if it has one."""
    manifest = read_optional(path / "build.json")
    report = read_table(path / "report.json") if (path / "report.json").exists() else None
    stages, job = manifest.get("stages", {}), manifest.get("job", {})
    if not isinstance(stages, dict) or not isinstance(job, dict):
        raise UserError(f"{path / 'build.json'}: not a build manifest; delete it to build again")
    return {"kind": "build", "path": str(path), "name": path.resolve().name, "stages": list(stages),
            "source": job.get("teacher") or job.get("student"), "report": report}
