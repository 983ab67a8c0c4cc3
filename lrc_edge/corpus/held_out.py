"""The corpus apart from training: the split by document hash, held-out text as token rows for evaluation and proof,
calibration rows that share nothing with it."""
from __future__ import annotations

import hashlib
import json
import pydoc_data.topics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lrc_edge.corpus.encode import render, token_ids
from lrc_edge.corpus.sources import Document
from lrc_edge.errors import UserError

if TYPE_CHECKING:
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase

HELD_OUT_TOKENS = 200_000
N_OPENINGS = 8
OVERLAP = 32  # tokens in sequence: two texts that share so many were not written apart


def is_held_out(document: Document, share: float) -> bool:
    """The split: by the document's own hash, so it stays what it is when documents are added or reordered."""
    text = document if isinstance(document, str) else json.dumps(document, sort_keys=True, ensure_ascii=False)
    return int.from_bytes(hashlib.sha256(text.encode(errors="replace")).digest()[:8], "big") < share * 2**64


def built_in_text() -> list[str]:
    """English that every Python installation holds, for proving a model that came without data."""
    return list(pydoc_data.topics.topics.values())


@dataclass(frozen=True)
class HeldOut:
    """Held-out text as one token stream, with what is needed to count bits per byte."""

    ids: np.ndarray  # (N,) int64
    n_bytes: int  # UTF-8 bytes of the text behind them
    openings: tuple[str, ...]  # beginnings of documents, as prompts

    @classmethod
    def from_texts(cls, texts: Iterable[Document], tokenizer: PreTrainedTokenizerBase, limit: int = HELD_OUT_TOKENS
                   ) -> HeldOut:
        """Takes documents until there are `limit` tokens. A conversation that the template refuses is left out."""
        ids: list[int] = []
        n_bytes = 0
        openings: list[str] = []
        special = list(tokenizer.get_added_vocab())
        for document in texts:
            text = document if isinstance(document, str) else render(tokenizer, document)
            if text is None or not text.strip():
                continue
            ids += (token_ids(tokenizer, [text])[0] if isinstance(document, str)
                    else tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
            n_bytes += len(text.encode(errors="replace"))
            # A chat begins with special tokens: no prompt that shows what the model writes.
            if len(openings) < N_OPENINGS and len(text.split()) > 12 and not any(token in text for token in special):
                openings.append(" ".join(text.split()[:6]))
            if len(ids) >= limit:
                break
        return cls(np.asarray(ids, dtype=np.int64), n_bytes, tuple(openings))

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
        if row_len < 2:
            raise UserError(f"held-out text: {len(self.ids)} tokens in rows of {row_len}, need at least 2 in a row; "
                            "give more text, or raise data.held_out_share or parity.row_len")
        body = row_len if bos is None else row_len - 1
        n_rows = min(-(-positions // (row_len - 1)), len(self.ids) // body)
        if n_rows < 1:
            raise UserError(f"held-out text: {len(self.ids)} tokens, need at least {body} for one row; "
                            "give more text or lower parity.row_len")
        rows = self.ids[: n_rows * body].reshape(n_rows, body)
        return rows if bos is None else np.concatenate([np.full((n_rows, 1), bos), rows], axis=1)

    def long_row(self, n_tokens: int, bos: int | None) -> np.ndarray:
        """(n_tokens,) ids from the beginning, over again where the text is shorter, behind the BOS if there is one."""
        start = [] if bos is None else [bos]
        return np.concatenate([start, np.resize(self.ids, n_tokens - len(start))]).astype(np.int64)


@dataclass(frozen=True)
class Calibration:
    """The rows that quantizers look at, none of which the proof sees."""

    rows: np.ndarray  # (n, row_len) int64
    source: str  # where they come from, for people
    n_left_out: int  # rows that shared text with the evaluation

    @classmethod
    def choose(cls, candidates: Iterable[np.ndarray], shape: tuple[int, int], evaluation_ids: np.ndarray, source: str
               ) -> Calibration:
        """The first candidates that share no OVERLAP consecutive tokens with `evaluation_ids` (N,).

        shape: (rows wanted, tokens of a row); rows shorter than OVERLAP are compared whole. Raises UserError when no
        row remains.
        """
        n_rows, row_len = shape
        window = min(OVERLAP, row_len)
        evaluated = set(_windows(evaluation_ids, window))
        kept: list[np.ndarray] = []
        n_left_out = 0
        for row in candidates:
            if evaluated.isdisjoint(_windows(row, window)):
                kept.append(row)
            else:
                n_left_out += 1
            if len(kept) == n_rows:
                break
        if not kept:
            found = f"all {n_left_out} rows share text with it" if n_left_out else f"not {row_len} tokens"
            raise UserError(f"calibration: no text beside the proof's ({found}); give more --data or "
                            "--set export.calibration_tokens=0")
        return cls(np.stack(kept).astype(np.int64), source, n_left_out)

    @property
    def sha256(self) -> str:
        """Hex digest of the token ids, row after row, as little-endian int64."""
        return hashlib.sha256(self.rows.astype("<i8").tobytes()).hexdigest()

    def as_dict(self) -> dict[str, str | int]:
        return {"source": self.source, "sha256": self.sha256, "rows": len(self.rows), "tokens": self.rows.size,
                "rows_left_out": self.n_left_out}


def _windows(ids_N: np.ndarray, length: int) -> Iterator[bytes]:
    ids = np.ascontiguousarray(ids_N, dtype=np.int32)
    return (ids[i:i + length].tobytes() for i in range(len(ids) - length + 1))
