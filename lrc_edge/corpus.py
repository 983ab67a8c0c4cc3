"""Text: documents from files, folders or the hub; the split by document hash; token rows for evaluation and proof."""
from __future__ import annotations

import hashlib
import json
import pydoc_data.topics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lrc_edge.errors import UserError

if TYPE_CHECKING:
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase

SUFFIXES = (".txt", ".jsonl", ".parquet")
PASSAGE_CHARS = 4_000  # a .txt file is cut at blank lines into documents of about this size
HELD_OUT_TOKENS = 200_000


def documents(sources: Iterable[str], text_field: str) -> Iterator[str]:
    """The texts of all sources, in order. A source is a .txt/.jsonl/.parquet file, a folder of them, or a hub dataset.

    Raises UserError on a source that is none of these, an unreadable file, or a row without `text_field`.
    """
    for source in sources:
        path = Path(source).expanduser()
        if path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES)
            if not files:
                raise UserError(f"{path}: no {', '.join(SUFFIXES)} file in this folder; give a folder of texts")
            for file in files:
                yield from _file_documents(file, text_field)
        elif path.exists():
            yield from _file_documents(path, text_field)
        elif path.suffix in SUFFIXES or source.startswith(("/", ".", "~")):
            raise UserError(f"{source}: no such file or folder; give a .txt, .jsonl or .parquet file, "
                            "a folder of them, or a hub dataset id")
        else:
            yield from _hub_documents(source, text_field)


def local_files(sources: Iterable[str]) -> list[Path]:
    """The files behind the sources that are local, for fingerprints."""
    found: list[Path] = []
    for source in sources:
        path = Path(source).expanduser()
        found += sorted(f for f in path.rglob("*") if f.suffix in SUFFIXES) if path.is_dir() else [path] * path.exists()
    return found


def _file_documents(path: Path, text_field: str) -> Iterator[str]:
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path}: unknown kind of text file; need one of {', '.join(SUFFIXES)}")
    if path.suffix == ".parquet":
        yield from _parquet_documents(path, text_field)
        return
    try:
        if path.suffix == ".txt":
            yield from _passages(path.read_text())
            return
        with path.open() as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _text_of(json.loads(line), text_field, f"{path}:{number}")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error}); convert it") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{number}: not JSON ({error}); need one JSON table a line") from error


def _parquet_documents(path: Path, text_field: str) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise UserError(f"{path}: not a readable parquet file ({error}); get it again") from error
    if text_field not in file.schema_arrow.names:
        raise UserError(f"{path}: no column {text_field!r} (has {', '.join(file.schema_arrow.names)}); "
                        "name it with --set data.text_field=...")
    for batch in file.iter_batches(columns=[text_field]):
        yield from (text for text in batch.column(0).to_pylist() if text)


def _hub_documents(name: str, text_field: str) -> Iterator[str]:
    from datasets import load_dataset

    try:
        rows: Any = load_dataset(name, split="train", streaming=True)
    except Exception as error:  # offline, misspelt, gated: the client raises many types
        raise UserError(f"{name}: no such file, and the hub did not give it as a dataset "
                        f"({' '.join(str(error).split())[:160]}); give a file, a folder or a dataset id") from error
    for number, row in enumerate(rows):
        yield _text_of(row, text_field, f"{name} row {number}")


def _text_of(row: Any, text_field: str, where: str) -> str:
    text = row.get(text_field) if isinstance(row, dict) else None
    if not isinstance(text, str):
        found = f"has {', '.join(row)}" if isinstance(row, dict) else f"is a {type(row).__name__}"
        raise UserError(f"{where}: no text field {text_field!r} ({found}); name it with --set data.text_field=...")
    return text


def _passages(text: str) -> Iterator[str]:
    """Whole paragraphs, together about PASSAGE_CHARS long, so that a book has documents to split by."""
    passage: list[str] = []
    size = 0
    for paragraph in text.split("\n\n"):
        passage.append(paragraph)
        size += len(paragraph)
        if size >= PASSAGE_CHARS:
            yield "\n\n".join(passage)
            passage, size = [], 0
    if size:
        yield "\n\n".join(passage)


def is_held_out(text: str, share: float) -> bool:
    """The split: by the document's own hash, so it stays what it is when documents are added or reordered."""
    return int.from_bytes(hashlib.sha256(text.encode(errors="replace")).digest()[:8], "big") < share * 2**64


def built_in_text() -> list[str]:
    """English that every Python installation holds, for proving a model that came without data."""
    return list(pydoc_data.topics.topics.values())


def token_ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Each document's ids as the tokenizer makes them (with its BOS if it has one), then EOS."""
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return [ids + eos for ids in tokenizer(texts, verbose=False)["input_ids"]] if texts else []


@dataclass(frozen=True)
class HeldOut:
    """Held-out text as one token stream, with what is needed to count bits per byte."""

    ids: np.ndarray  # (N,) int64
    n_bytes: int  # UTF-8 bytes of the text behind them
    openings: tuple[str, ...]  # beginnings of documents, as prompts

    @classmethod
    def from_texts(cls, texts: list[str], tokenizer: PreTrainedTokenizerBase, limit: int = HELD_OUT_TOKENS) -> HeldOut:
        ids: list[int] = []
        n_bytes = 0
        for text in texts:
            ids += token_ids(tokenizer, [text])[0]
            n_bytes += len(text.encode(errors="replace"))
            if len(ids) >= limit:
                break
        # A chat begins with special tokens: no prompt that shows what the model writes.
        plain = (text for text in texts if not any(token in text for token in tokenizer.get_added_vocab()))
        openings = tuple(" ".join(text.split()[:6]) for text in islice(plain, 8) if len(text.split()) > 12)
        return cls(np.asarray(ids, dtype=np.int64), n_bytes, openings)

    def save(self, path: Path) -> None:
        np.savez(path, ids=self.ids, n_bytes=self.n_bytes, openings=np.array(self.openings, dtype=str))

    @classmethod
    def load(cls, path: Path) -> HeldOut:
        with np.load(path) as table:
            return cls(table["ids"], int(table["n_bytes"]), tuple(str(text) for text in table["openings"]))

    @property
    def bytes_per_token(self) -> float:
        return self.n_bytes / len(self.ids)

    def rows(self, row_len: int, positions: int, bos: int | None) -> np.ndarray:
        """(n, row_len) ids covering at least `positions` next-token predictions where the text allows.

        Each row begins with BOS when there is one: a model that was trained with it misbehaves without.
        """
        body = row_len if bos is None else row_len - 1
        n_rows = min(-(-positions // (row_len - 1)), len(self.ids) // body)
        if n_rows < 1:
            raise UserError(f"held-out text: {len(self.ids)} tokens, need at least {body} for one row; "
                            "give more text or lower parity.row_len")
        rows = self.ids[: n_rows * body].reshape(n_rows, body)
        return rows if bos is None else np.concatenate([np.full((n_rows, 1), bos), rows], axis=1)
