"""The small files of a Hugging Face directory: JSON tables and the model card, checked when they are read.

People edit these files by hand and downloads truncate them, so each mistake in them is reported in one line.
"""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lrc_edge.errors import UserError, one_line
from lrc_edge.families import family_of
from lrc_edge.shape import ModelShape

PROVENANCE_FILE = "lrc_edge.json"  # in a student's folder: its teacher, and how it was made
# transformers reads these; it reports damage in many ways, or ignores it.
TOKENIZER_TABLES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
# Numbers of a RoPE table that are computed with; the other fields are only compared.
_ROPE_NUMBERS = ("rope_theta", "factor", "low_freq_factor", "high_freq_factor", "attention_factor")
_SAMPLING_NUMBERS = ("temperature", "top_p", "min_p", "repetition_penalty")
_LARGEST = 1e37  # fits in float32; configs write "no limit" as 1e30
LONGEST_NAME = 120  # characters, because file names contain the name


def read_table(file: Path) -> dict[str, Any]:
    """Return the table in a JSON file. Raises UserError if it is missing or contains anything else."""
    try:
        text = file.read_text(encoding="utf-8")
        table = json.loads(text)
        if "\\ud" in text.lower():  # half a surrogate pair can neither be printed nor written
            json.dumps(table, ensure_ascii=False).encode()
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: not readable as JSON ({one_line(error)}); get an intact copy") from error
    if not isinstance(table, dict):
        raise UserError(f"{file}: contains a {type(table).__name__}, need a table; get an intact copy")
    return table


def read_optional(file: Path) -> dict[str, Any]:
    """Return the table in a JSON file; {} if there is no such file. Raises UserError if it contains anything else."""
    return read_table(file) if file.exists() else {}


def read_config(path: Path) -> dict[str, Any]:
    """Return the table of path/config.json. Raises UserError."""
    if not path.is_dir():
        raise UserError(f"{path}: not a directory; pass a Hugging Face model directory")
    file = path / "config.json"
    if not file.exists():
        raise UserError(f"{path}: no config.json; pass a Hugging Face model directory")
    return read_table(file)


def shape_of(config: dict[str, Any], where: Path) -> ModelShape:
    """Return the shape of a supported model. Raises UserError naming `where`."""
    family = family_of(config.get("model_type"), where)
    for switch in family.off:
        if config.get(switch):
            raise UserError(f"{where}: {switch} = true is not supported for {family.model_type}; "
                            f"use a plain {family.model_type} model")
    for field in ("hidden_act", "hidden_activation"):  # families differ in the name
        if config.get(field, "silu") != "silu":
            raise UserError(f"{where}: {field} {config[field]!r:.80} is not supported; need 'silu'")
    if config.get("quantization_config"):
        raise UserError(f"{where}: the checkpoint is already quantized; pass the unquantized model")
    return ModelShape.from_config(config, str(where))


def check_values(config: dict[str, Any], shape: ModelShape, where: Path) -> None:
    """Check the fields that are not counts: RoPE, epsilon, window, token ids. Raises UserError."""
    for field in ("rope_parameters", "rope_scaling"):
        table = _field(config, field, where, "a table", lambda value: isinstance(value, dict)) or {}
        for kind in ("rope_type", "type"):
            _field(table, kind, f"{where}: {field}", "text", lambda value: isinstance(value, str))
        for number in _ROPE_NUMBERS:
            _field(table, number, f"{where}: {field}", "a positive number", _is_positive)
        _field(table, "original_max_position_embeddings", f"{where}: {field}", "a positive integer",
               lambda value: _is_positive(value) and isinstance(value, int))
    for field in ("rope_theta", "rms_norm_eps"):
        _field(config, field, where, "a positive number", _is_positive)
    if family_of(shape.family).has_window(config):
        _field(config, "sliding_window", where, "a number of tokens", lambda value: _is_integer(value) and value >= 0)
    _check_ids(config, shape.vocab_size, where)


def read_generation(where: Path, shape: ModelShape) -> dict[str, Any]:
    """Return the table of a generation_config.json; {} if there is none. Raises UserError."""
    table = read_optional(where)
    for field in _SAMPLING_NUMBERS:
        _field(table, field, where, "a number", lambda value: _is_number(value) and abs(value) < _LARGEST)
    _field(table, "top_k", where, "an integer", lambda value: _is_integer(value) and abs(value) < 2**31)
    _field(table, "do_sample", where, "true or false", lambda value: isinstance(value, bool))
    _check_ids(table, shape.vocab_size, where)
    return table


def read_provenance(where: Path) -> dict[str, str]:
    """Return what lrc-edge recorded about a student it made; {} if there is no such file. Raises UserError."""
    table = read_optional(where)
    for key in table:
        _field(table, key, where, "text", lambda value: isinstance(value, str))
    _field(table, "name", where, f"1 to {LONGEST_NAME} characters", lambda value: 0 < len(value) <= LONGEST_NAME)
    return {key: value for key, value in table.items() if value is not None}


def check_tokenizer_tables(path: Path) -> None:
    """Check the tables next to tokenizer.json, and that model_max_length is a positive number. Raises UserError."""
    for name in TOKENIZER_TABLES:
        _field(read_optional(path / name), "model_max_length", path / name, "a positive number", _is_positive)


def front_matter(readme: Path) -> dict[str, Any]:
    """Return the scalars and lists of scalars in the YAML block of a model card; {} without valid YAML."""
    import yaml  # which a device does not need

    if not readme.is_file():
        return {}
    parts = readme.read_text(encoding="utf-8", errors="replace").split("---\n", 2)
    if len(parts) < 3 or parts[0].strip():
        return {}
    try:
        table = yaml.safe_load(parts[1])
    except (yaml.YAMLError, ValueError, RecursionError):  # ValueError: a date such as 31 February
        return {}
    if not isinstance(table, dict):
        return {}
    return {key: value for key, value in table.items()
            if not any(isinstance(item, list | dict) for item in (value if isinstance(value, list) else [value]))}


def ids_of(table: dict[str, Any], field: str) -> list[int]:
    """Return the token ids of a field that may contain one, several or none."""
    value = table.get(field)
    return value if isinstance(value, list) else [] if value is None else [value]


def _check_ids(table: dict[str, Any], vocab_size: int, where: Path) -> None:
    for field in ("bos_token_id", "pad_token_id"):  # may be outside the vocabulary: some configs write -1 for none
        for token in ids_of(table, field):
            if not _is_integer(token) or abs(token) >= 2**31:
                raise UserError(f"{where}: {field} = {token!r:.80}, need a token id; fix the file")
    for token in ids_of(table, "eos_token_id"):
        check_stop_id(token, vocab_size, f"{where}: eos_token_id")


def check_stop_id(token: Any, vocab_size: int, where: str) -> None:
    """Raise UserError unless `token` is an id of the vocabulary: no runtime would ever stop at another id."""
    if not _is_integer(token) or not 0 <= token < vocab_size:
        raise UserError(f"{where} = {token!r:.80}, need token ids from 0 to {vocab_size - 1:,}; fix the file")


def _field(table: dict[str, Any], name: str, where: Path | str, wanted: str, is_valid: Any) -> Any:
    """Return a field's value; None if it is missing or null. Raises UserError unless `is_valid(value)`."""
    value = table.get(name)
    if value is not None and not is_valid(value):
        raise UserError(f"{where}: {name} = {value!r:.80}, need {wanted}; fix the file")
    return value


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return _is_integer(value) or isinstance(value, float)


def _is_positive(value: Any) -> bool:
    return _is_number(value) and 0 < value < _LARGEST
