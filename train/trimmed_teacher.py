"""Write a teacher with fewer tokens: an ordinary Hugging Face directory with some of the teacher's ids.

Kept ids are numbered again from 0, in their old order. Embedding and LM head keep the rows of these ids, so the model's
softmax is the teacher's, renormalized over them. All other weights are copied in their stored type.
"""
from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from lrc_edge.checkpoint import DenseCheckpoint
from lrc_edge.checkpoint_writer import LICENCES, copy_files, copy_tokenizer, write_weights
from lrc_edge.config_file import read_optional
from lrc_edge.errors import UserError

Rename = Callable[[int], int]  # old token id -> new

# Tables that may name token ids, next to tokenizer.json.
_TABLES = ("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json")
# Fields of these tables that hold ids or nested lists of ids. All fields named *_token_id do, too.
_ID_LISTS = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "force_words_ids")
# Fields that hold pairs -> the place of the ids in a pair: [[position, id], ...], [[ids, bias], ...].
_ID_PAIRS = {"forced_decoder_ids": 1, "sequence_bias": 0}
_ADDED = "added_tokens.json"
# Other forms of a tokenizer.json. Leaving them out is safer than a second table of ids that could disagree with it.
_LEFT_OUT = ("vocab.json", "merges.txt", "tokenizer.model")


def write_trimmed(teacher: DenseCheckpoint, kept: Sequence[int], folder: Path,
                  progress: Callable[[str], None] | None = None) -> DenseCheckpoint:
    """Write the teacher with the ids `kept` (ascending) to `folder` (which must not exist) and open it.

    `kept`: as Vocabulary.choose returns it, so that no table names another id. Raises UserError if the tokenizer does
    not read the new ids back.
    """
    new = {old: i for i, old in enumerate(kept)}

    def rename(token: int) -> int:
        return new[token] if 0 <= token < teacher.shape.vocab_size else token  # some configs write -1 for none

    folder.mkdir(parents=True)
    write_weights(_tensors(teacher, kept, progress), folder)
    copy_tokenizer(teacher.path, folder)
    copy_files(teacher.path, folder, ("config.json", "generation_config.json", "README.md", *LICENCES))
    for name in _LEFT_OUT:
        (folder / name).unlink(missing_ok=True)
    for name in (*_TABLES, _ADDED):
        if (folder / name).exists():
            table = renamed_ids(name, read_optional(folder / name), rename)
            _write(folder / name, table | ({"vocab_size": len(kept)} if name == "config.json" else {}))
    _write(folder / "tokenizer.json", _trimmed_tokenizer(tokenizer_table(teacher.path), new, rename))
    trimmed = DenseCheckpoint.open(folder, teacher.name)
    _check_ids(teacher, trimmed, new)
    return trimmed


def _tensors(teacher: DenseCheckpoint, kept: Sequence[int], progress: Callable[[str], None] | None
             ) -> Iterator[tuple[str, torch.Tensor]]:
    rows = torch.tensor(kept)
    for weight in teacher.weights():
        if progress:
            progress(weight.name)
        tensor = teacher.tensor(weight.name)
        yield weight.name, tensor[rows] if weight.role.axes[0] == "vocab_size" else tensor


def _write(file: Path, table: dict[str, Any]) -> None:
    file.write_text(json.dumps(table, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# -- tables that name ids ----------------------------------------------------------------------------------------------


def tokenizer_table(path: Path) -> dict[str, Any]:
    """Return path/tokenizer.json as the tokenizers library reads it, whichever form its merges have."""
    table: dict[str, Any] = json.loads(Tokenizer.from_file(str(path / "tokenizer.json")).to_str())
    return table


def named_ids(path: Path) -> set[int]:
    """Return every id that a table in a model's folder names, tokenizer.json's vocabulary apart."""
    found: set[int] = set()

    def note(token: int) -> int:
        found.add(token)
        return token

    for name in (*_TABLES, _ADDED):
        renamed_ids(name, read_optional(path / name), note)
    _renamed_steps(tokenizer_table(path), note)
    return found


def renamed_ids(file: str, table: dict[str, Any], rename: Rename) -> dict[str, Any]:
    """Return the table of the file of this name with all its ids renamed."""
    if file == _ADDED:  # text -> id
        return {text: _renamed(token, rename) for text, token in table.items()}
    return {field: _renamed_field(field, value, rename) for field, value in table.items()}


def _renamed_field(field: str, value: Any, rename: Rename) -> Any:
    if field.endswith("_token_id") or field in _ID_LISTS:
        return _renamed(value, rename)
    if field in _ID_PAIRS and isinstance(value, list):
        return [[_renamed(part, rename) if i == _ID_PAIRS[field] else part for i, part in enumerate(pair)]
                if isinstance(pair, list) else pair for pair in value]
    if field == "added_tokens_decoder" and isinstance(value, dict):
        return {str(rename(int(token))) if token.isdecimal() else token: entry for token, entry in value.items()}
    return value


def _renamed(value: Any, rename: Rename) -> Any:
    """Rename an id, or those in a list that may be nested; keep everything else."""
    if isinstance(value, list):
        return [_renamed(item, rename) for item in value]
    return rename(value) if isinstance(value, int) and not isinstance(value, bool) else value


# -- tokenizer.json ----------------------------------------------------------------------------------------------------


def _trimmed_tokenizer(table: dict[str, Any], new: dict[int, int], rename: Rename) -> dict[str, Any]:
    """Return the table with the kept tokens, and the merges that make them."""
    vocab = {text: new[token] for text, token in table["model"]["vocab"].items() if token in new}
    merges = [pair for pair in table["model"]["merges"] if "".join(pair) in vocab]
    return _renamed_steps(table, rename) | {"model": table["model"] | {"vocab": vocab, "merges": merges}}


def _renamed_steps(table: dict[str, Any], rename: Rename) -> dict[str, Any]:
    """Rename the ids of all parts of a tokenizer.json but its model."""
    padding = table["padding"]
    return table | {
        "added_tokens": [token | {"id": rename(token["id"])} for token in table["added_tokens"]],
        "padding": padding and padding | {"pad_id": rename(padding["pad_id"])},
        "post_processor": table["post_processor"] and _renamed_processor(table["post_processor"], rename)}


def _renamed_processor(step: dict[str, Any], rename: Rename) -> dict[str, Any]:
    def in_sequence() -> dict[str, Any]:
        return {"processors": [_renamed_processor(part, rename) for part in step["processors"]]}

    def in_template() -> dict[str, Any]:
        return {"special_tokens": {text: token | {"ids": _renamed(token["ids"], rename)}
                                   for text, token in step["special_tokens"].items()}}

    def in_pairs() -> dict[str, Any]:
        return {end: [step[end][0], rename(step[end][1])] for end in ("sep", "cls")}

    kinds: dict[str, Callable[[], dict[str, Any]]] = {
        "Sequence": in_sequence, "TemplateProcessing": in_template, "BertProcessing": in_pairs,
        "RobertaProcessing": in_pairs, "ByteLevel": dict}
    if step["type"] not in kinds:
        raise UserError(f"tokenizer.json: post-processor {step['type']!r} may hold token ids that student.vocab_size "
                        f"cannot change; known: {', '.join(kinds)}; set student.vocab_size=0")
    return step | kinds[step["type"]]()


def _check_ids(teacher: DenseCheckpoint, trimmed: DenseCheckpoint, new: dict[int, int]) -> None:
    """Check that the tokenizer gives each kept token its new id. The library numbers added tokens by itself."""
    expected = {text: new[token] for text, token in teacher.tokenizer().get_vocab().items() if token in new}
    found = trimmed.tokenizer().get_vocab()
    if wrong := next((text for text in {**expected, **found} if expected.get(text) != found.get(text)), None):
        raise UserError(f"{teacher.path / 'tokenizer.json'}: token {wrong!r:.60} would have id {found.get(wrong)} "
                        f"instead of {expected.get(wrong)} in a smaller vocabulary; set student.vocab_size=0")
