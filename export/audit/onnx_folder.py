"""Verify, without running it, that an ONNX file from any writer and the files next to it describe a checkpoint's model.

Programs read config, tokenizer, special tokens and chat template next to the graph, and compute with the graph's own
heads, RoPE tables and weights. Both are compared, since either may be wrong.
"""
from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from lrc_edge.checkpoint import DenseCheckpoint, Rope, rope_of
from lrc_edge.config_file import read_table
from lrc_edge.errors import UserError
from lrc_edge.export.audit.gguf_file import same_number
from lrc_edge.export.audit.gguf_vocabulary import declared_ends
from lrc_edge.export.audit.onnx_graph import DEFAULT_NAMES, audit_graph
from lrc_edge.export.audit.template import audit_template
from lrc_edge.export.audit.tokenizer_json import audit_tokenizer_json
from lrc_edge.finding import Finding, differs

SIDECARS = ("config.json", "genai_config.json", "tokenizer.json")
# Fields of config.json -> names of findings, those of audit_gguf.
FIELDS = {"num_hidden_layers": "layers", "hidden_size": "hidden size", "intermediate_size": "feed-forward size",
          "num_attention_heads": "attention heads", "num_key_value_heads": "key/value heads", "head_dim": "head size",
          "vocab_size": "vocabulary size", "max_position_embeddings": "context length"}
_GENAI_DECODER = {"head_size": "head_dim", "hidden_size": "hidden_size", "num_attention_heads": "num_attention_heads",
                  "num_hidden_layers": "num_hidden_layers", "num_key_value_heads": "num_key_value_heads"}
_GENAI_MODEL = {"context_length": "max_position_embeddings", "vocab_size": "vocab_size"}


def audit_onnx(path: Path, checkpoint: DenseCheckpoint) -> list[Finding]:
    """Return every difference between the checkpoint and the ONNX file with its sidecars.

    `path`: an .onnx file, or a folder with one. Its sidecars are in its folder or the one above. Raises UserError when
    there is no such file, the graph is corrupt, or a data file is missing or truncated.
    """
    model, tokenizer = model_file(path), checkpoint.tokenizer()
    folder = next((place for place in (model.parent, model.parent.parent)
                   if any((place / name).is_file() for name in SIDECARS)), model.parent)
    tables: dict[str, dict[str, Any]] = {}
    findings: list[Finding] = []
    for name in ("config.json", "genai_config.json", "generation_config.json", "tokenizer_config.json"):
        try:
            tables[name] = read_table(folder / name) if (folder / name).is_file() else {}
        except UserError as error:
            tables[name] = {}
            findings.append(Finding("damaged file", f"damaged file: {error}"))
    findings += _missing_files(folder)
    if tables["config.json"]:
        findings += _audit_config(tables["config.json"], checkpoint, tokenizer)
    genai = tables["genai_config.json"]
    if genai:
        findings += _audit_genai(genai, checkpoint, tokenizer, folder)
    findings += _audit_ends(tables, declared_ends(checkpoint, tokenizer))
    findings += audit_tokenizer_json(folder, tokenizer)
    findings += _audit_templates(folder, tables["tokenizer_config.json"], tokenizer)
    return [*findings, *audit_graph(model, checkpoint, _names(genai))]


def model_file(path: Path) -> Path:
    """Return the .onnx file at `path`, or the one in that folder. Raises UserError if there is none, or several."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise UserError(f"{path}: no such file or directory; give an .onnx file or a folder with one")
    genai = path / "genai_config.json"
    if genai.is_file():
        try:
            name = _section(read_table(genai), "model", "decoder").get("filename")
        except UserError:  # reported as a finding
            name = None
        if isinstance(name, str) and (path / name).is_file():
            return path / name
    files = sorted([*path.glob("*.onnx"), *path.glob("onnx/*.onnx")])
    if len(files) != 1:
        raise UserError(f"{path}: {len(files)} .onnx files ({', '.join(file.name for file in files[:4]) or 'none'}); "
                        "give one of them" if files else f"{path}: no .onnx file; give an .onnx file")
    return files[0]


def _missing_files(folder: Path) -> Iterator[Finding]:
    has_genai = (folder / "genai_config.json").is_file()
    if not (folder / "config.json").is_file():
        yield Finding("missing file", f"missing file: config.json is not in {folder}: transformers.js and optimum "
                      "need it", "note" if has_genai else "fault")
    if not has_genai:
        yield Finding("missing file", f"missing file: genai_config.json is not in {folder}: onnxruntime-genai needs it",
                      "note")
    if not (folder / "tokenizer_config.json").is_file():
        yield Finding("missing file", f"missing file: tokenizer_config.json is not in {folder}")


def _audit_config(table: Mapping[str, Any], checkpoint: DenseCheckpoint, tokenizer: PreTrainedTokenizerBase
                  ) -> Iterator[Finding]:
    shape = checkpoint.shape
    if table.get("model_type") != shape.family:
        yield differs("architecture", table.get("model_type"), shape.family, "model_type in config.json")
    heads, width = table.get("num_attention_heads"), table.get("hidden_size")
    share = width // heads if isinstance(heads, int) and isinstance(width, int) and heads > 0 else None
    defaults = {"num_key_value_heads": heads, "head_dim": share}
    for field, name in FIELDS.items():
        found = table.get(field)
        found, expected = defaults.get(field) if found is None else found, getattr(shape, field)
        if found != expected or isinstance(found, bool):
            yield differs(name, found, expected, f"{field} in config.json")
    eps = float(checkpoint.config.get("rms_norm_eps", 1e-6))
    if not same_number(table.get("rms_norm_eps", 1e-6), eps):
        yield differs("norm epsilon", table.get("rms_norm_eps"), eps, "rms_norm_eps in config.json")
    yield from _audit_rope(table, checkpoint.rope)
    if bool(table.get("tie_word_embeddings", False)) != shape.tied:
        yield differs("tied head", table.get("tie_word_embeddings"), shape.tied, "in config.json", "note")
    yield from _audit_bos(table.get("bos_token_id"), checkpoint, tokenizer, "config.json")


def _audit_rope(table: Mapping[str, Any], expected: Rope) -> Iterator[Finding]:
    """Compare each form in the config: transformers 5 reads rope_parameters, other programs rope_theta."""
    forms: dict[str, dict[str, Any]] = {}
    if table.get("rope_parameters") is not None:
        forms["rope_parameters"] = dict(table)
    if table.get("rope_theta") is not None or not forms:
        forms["rope_theta"] = {key: table.get(key) for key in ("rope_theta", "rope_scaling")}
    for name, form in forms.items():
        try:
            found = rope_of(form)
        except (TypeError, ValueError, AttributeError) as error:
            yield Finding("rope base", f"rope base: {name} in config.json is not readable ({error})")
            continue
        if not same_number(found.theta, expected.theta):
            yield differs("rope base", found.theta, expected.theta, f"{name} in config.json")
        if _plain(found.scaling) != _plain(expected.scaling):
            yield differs("rope scaling", found.scaling or "none", expected.scaling or "none", f"{name} in config.json")


def _plain(scaling: Mapping[str, Any] | None) -> dict[str, Any]:
    return {key: float(value) if isinstance(value, int) and not isinstance(value, bool) else value
            for key, value in (scaling or {}).items() if value is not None}


def _audit_bos(found: Any, checkpoint: DenseCheckpoint, tokenizer: PreTrainedTokenizerBase, where: str
               ) -> Iterator[Finding]:
    declared = [token for token in (checkpoint.config.get("bos_token_id"), tokenizer.bos_token_id)
                if token is not None]
    if declared and found not in declared:
        yield differs("BOS token", found, declared[0], f"bos_token_id in {where}",
                      "note" if found is None else "fault")


def _audit_genai(table: Mapping[str, Any], checkpoint: DenseCheckpoint, tokenizer: PreTrainedTokenizerBase, folder: Path
                 ) -> Iterator[Finding]:
    settings, decoder = _section(table, "model"), _section(table, "model", "decoder")
    for fields, section in ((_GENAI_DECODER, decoder), (_GENAI_MODEL, settings)):
        for key, field in fields.items():
            expected = getattr(checkpoint.shape, field)
            if section.get(key) != expected:
                yield differs(FIELDS[field], section.get(key), expected, f"{key} in genai_config.json")
    yield from _audit_bos(settings.get("bos_token_id"), checkpoint, tokenizer, "genai_config.json")
    name = decoder.get("filename")
    if not isinstance(name, str) or not (folder / name).is_file():
        yield Finding("missing file", f"missing file: genai_config.json names the graph {str(name)[:60]}, which is not "
                      f"in {folder}")
    longest = _section(table, "search").get("max_length")
    if isinstance(longest, int) and longest > checkpoint.shape.max_position_embeddings:
        yield differs("context length", longest, checkpoint.shape.max_position_embeddings,
                      "search.max_length in genai_config.json")


def _audit_ends(tables: Mapping[str, Mapping[str, Any]], ends: set[int]) -> Iterator[Finding]:
    """Compare the tokens at which programs stop; each program reads one of these files. `ends`: the model's."""
    places = {"genai_config.json": _section(tables["genai_config.json"], "model"),
              "generation_config.json": tables["generation_config.json"], "config.json": tables["config.json"]}
    for name, table in places.items():
        if not table:
            continue
        value = table.get("eos_token_id")
        found = {item for item in (value if isinstance(value, list) else [value]) if isinstance(item, int)}
        if extra := found - ends:
            yield differs("EOS token", sorted(found), sorted(ends), f"eos_token_id in {name}: text would end at "
                          f"{min(extra)}")
        elif name == "genai_config.json" and (missing := ends - found):
            yield differs("EOS token", sorted(found), sorted(ends), f"eos_token_id in {name}: text would not end "
                          f"at {min(missing)}")


def _audit_templates(folder: Path, config: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase
                     ) -> Iterator[Finding]:
    """Compare chat_template.jinja and the field of tokenizer_config.json, since programs read either."""
    file = folder / "chat_template.jinja"
    found: list[Any] = [file.read_text(encoding="utf-8", errors="replace")] if file.is_file() else []
    found += [config["chat_template"]] if config.get("chat_template") else []
    for template in found or [None]:
        yield from audit_template(template, tokenizer)


def _names(genai: Mapping[str, Any]) -> dict[str, str]:
    """Return DEFAULT_NAMES, overridden by the names in genai_config.json."""
    decoder = _section(genai, "model", "decoder")
    named = {**_section(decoder, "inputs"), **_section(decoder, "outputs")}
    return {key: named[key] if isinstance(named.get(key), str) else name for key, name in DEFAULT_NAMES.items()}


def _section(table: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    """Return a nested table; {} if there is none."""
    found: Any = table
    for key in keys:
        found = found.get(key) if isinstance(found, Mapping) else None
    return dict(found) if isinstance(found, Mapping) else {}
