"""The corpus apart from training: the split by document hash, held-out text as token rows for evaluation and proof."""
from __future__ import annotations

import hashlib
import json
import pydoc_data.topics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lrc_edge.encode import render, token_ids
from lrc_edge.errors import UserError
from lrc_edge.sources import Document

if TYPE_CHECKING:
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase

HELD_OUT_TOKENS = 200_000
N_OPENINGS = 8


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
