"""Text that is not trained on: the split by document hash, held-out token sequences for evaluation and verification,
and calibration sequences that do not overlap them."""
from __future__ import annotations

import hashlib
import json
import pydoc_data.topics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
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
OVERLAP = 32  # consecutive tokens; two texts that share this many are not independent


def is_held_out(document: Document, share: float) -> bool:
    """Decide by the document's hash, so that the split does not change when documents are added or reordered."""
    text = document if isinstance(document, str) else json.dumps(document, sort_keys=True, ensure_ascii=False)
    return int.from_bytes(hashlib.sha256(text.encode(errors="replace")).digest()[:8], "big") < share * 2**64


def built_in_text() -> list[str]:
    """Return English text from the Python installation, to verify a model without --data."""
    return list(pydoc_data.topics.topics.values())


@dataclass(frozen=True)
class HeldOut:
    """Held-out text as one token stream, with its size in bytes for bits per byte."""

    ids: np.ndarray  # (N,) int64
    n_bytes: int  # UTF-8 bytes of the text
    openings: tuple[str, ...]  # beginnings of documents, as prompts

    @classmethod
    def from_texts(cls, texts: Iterable[Document], tokenizer: PreTrainedTokenizerBase, limit: int = HELD_OUT_TOKENS
                   ) -> HeldOut:
        """Encode documents until there are `limit` tokens. A conversation that the template refuses is left out."""
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
            # A chat begins with special tokens, so it is not a useful prompt.
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

    def retokenized(self, tokenizer: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> HeldOut:
        """Return the same text as ids of the tokenizer `other`. tokenizer: the one that made the ids."""
        text = tokenizer.decode(self.ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        ids = other(text, add_special_tokens=False, verbose=False)["input_ids"]
        return replace(self, ids=np.asarray(ids, dtype=np.int64))

    def rows(self, row_len: int, positions: int, bos: int | None) -> np.ndarray:
        """Return (n, row_len) ids with at least `positions` next-token predictions, or as many as the text allows.

        Each sequence begins with BOS if there is one: a model trained with BOS misbehaves without it. Raises UserError
        if the text is too short for one sequence.
        """
        if row_len < 2:
            raise UserError(f"held-out text: {len(self.ids)} tokens in sequences of {row_len}, need at least 2 per "
                            "sequence; add more text, or raise data.held_out_share or parity.row_len")
        body = row_len if bos is None else row_len - 1
        n_rows = min(-(-positions // (row_len - 1)), len(self.ids) // body)
        if n_rows < 1:
            raise UserError(f"held-out text: {len(self.ids)} tokens, need at least {body} for one "
                            "sequence; add more text or lower parity.row_len")
        rows = self.ids[: n_rows * body].reshape(n_rows, body)
        return rows if bos is None else np.concatenate([np.full((n_rows, 1), bos), rows], axis=1)

    def long_row(self, n_tokens: int, bos: int | None) -> np.ndarray:
        """Return (n_tokens,) ids: BOS if there is one, then the text from the start, repeated if it is too short."""
        start = [] if bos is None else [bos]
        return np.concatenate([start, np.resize(self.ids, n_tokens - len(start))]).astype(np.int64)


@dataclass(frozen=True)
class Calibration:
    """The sequences that quantizers are calibrated on. Verification uses none of them."""

    rows: np.ndarray  # (n, row_len) int64
    source: str  # where they come from, for the report
    n_left_out: int  # sequences left out because they share text with the evaluation

    @classmethod
    def choose(cls, candidates: Iterable[np.ndarray], shape: tuple[int, int], evaluation_ids: np.ndarray, source: str
               ) -> Calibration:
        """Choose the first candidates that share no OVERLAP consecutive tokens with `evaluation_ids` (N,).

        shape: (number of sequences, tokens of each); sequences shorter than OVERLAP are compared as one piece. Raises
        UserError if none remains.
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
            found = f"all {n_left_out} sequences overlap it" if n_left_out else f"fewer than {row_len} tokens"
            raise UserError(f"calibration: too little text apart from the verification text ({found}); add --data or "
                            "set export.calibration_tokens=0")
        return cls(np.stack(kept).astype(np.int64), source, n_left_out)

    @property
    def sha256(self) -> str:
        """Hex digest of the token ids, sequence after sequence, as little-endian int64."""
        return hashlib.sha256(self.rows.astype("<i8").tobytes()).hexdigest()

    def as_dict(self) -> dict[str, str | int]:
        return {"source": self.source, "sha256": self.sha256, "rows": len(self.rows), "tokens": self.rows.size,
                "rows_left_out": self.n_left_out}


def _windows(ids_N: np.ndarray, length: int) -> Iterator[bytes]:
    ids = np.ascontiguousarray(ids_N, dtype=np.int32)
    return (ids[i:i + length].tobytes() for i in range(len(ids) - length + 1))
