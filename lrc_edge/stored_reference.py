"""check/reference.npz: the PyTorch student's outputs, small enough to copy to machines without PyTorch.

For each held-out position the file has the TOP most probable ids with their log-probabilities, and the log-probability
of the token that follows. A KL over these ids, with all others as one class, is a lower bound of the full KL, and close
to it if the others are improbable. Shapes: n rows, L tokens of a row, K = TOP or the vocabulary.
"""
from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from lrc_edge.errors import UserError, one_line
from lrc_edge.parity import Divergences
from lrc_edge.shape import ModelShape

REFERENCE_FILE = "check/reference.npz"
TEACHER_FILE = "check/teacher.gguf"  # the teacher in 4 bits, for comparing speeds
TOP = 64
_MOST = 1.05  # a sum of probabilities, rounded as coarsely as runtimes do
_LEAST = 1e-9  # below the rounding of a float32 sum of probabilities


@dataclass(frozen=True)
class StoredReference:
    ids: np.ndarray  # (n, L) int32
    top_ids: np.ndarray  # (n, L, K) int32, most probable first
    top_logprobs: np.ndarray  # (n, L, K) float32
    next_logprobs: np.ndarray  # (n, L - 1) float32, of ids[:, 1:]
    texts: tuple[str, ...]  # as runtimes get them
    text_ids: tuple[tuple[int, ...], ...]  # the Hugging Face tokenizer's, of each text
    shape: ModelShape  # of the student

    @classmethod
    def of(cls, ids: np.ndarray, logits: Iterable[np.ndarray], texts: Sequence[str],
           text_ids: Sequence[Sequence[int]], shape: ModelShape) -> StoredReference:
        """Make it from `ids` (n, L) and the logits of each row, (L, V)."""
        rows = [_row(row, row_logits) for row, row_logits in zip(ids, logits, strict=True)]
        top_ids, top_logprobs, next_logprobs = (np.stack(parts) for parts in zip(*rows, strict=True))
        return cls(ids.astype(np.int32), top_ids, top_logprobs, next_logprobs, tuple(texts),
                   tuple(tuple(map(int, row)) for row in text_ids), shape)

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        words = json.dumps({"texts": self.texts, "text_ids": self.text_ids, "shape": self.shape.as_dict()})
        partial = path.with_name(f".{path.name}.partial")
        try:
            with partial.open("wb") as file:
                np.savez_compressed(file, ids=self.ids, top_ids=self.top_ids, top_logprobs=self.top_logprobs,
                                    next_logprobs=self.next_logprobs, words=np.frombuffer(words.encode(), np.uint8))
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: Path) -> StoredReference:
        """Read the file. Raises UserError if it is missing or damaged."""
        if not path.exists():
            raise UserError(f"{path}: reference outputs not found; create them with `lrc-edge check` on a machine "
                            "with PyTorch, without --target")
        try:
            with np.load(path) as table:
                words = json.loads(table["words"].tobytes())
                reference = cls(table["ids"], table["top_ids"], table["top_logprobs"], table["next_logprobs"],
                                tuple(words["texts"]), tuple(map(tuple, words["text_ids"])),
                                ModelShape.from_dict(words["shape"]))
            reference._check()
        except (OSError, ValueError, LookupError, TypeError, AttributeError, EOFError, RecursionError, BadZipFile,
                zlib.error, NotImplementedError) as error:
            raise UserError(f"{path}: damaged ({one_line(error)}); copy it again, or write it with "
                            "`lrc-edge check`") from error
        return reference

    def _check(self) -> None:
        """Raise ValueError unless shapes, types and values are what `of` makes."""
        n, length = self.ids.shape
        k = self.top_ids.shape[-1]
        for name, kind, shape in (("ids", "i", (n, length)), ("top_ids", "i", (n, length, k)),
                                  ("top_logprobs", "f", (n, length, k)), ("next_logprobs", "f", (n, length - 1))):
            array = getattr(self, name)
            if array.dtype.kind != kind or array.shape != shape or not array.size:
                raise ValueError(f"{name} has type {array.dtype} and shape {array.shape}")
        # In Python's integers: a difference of NumPy's may overflow.
        ids = [int(bound) for array in (self.ids, self.top_ids) for bound in (array.min(), array.max())]
        ids += [token for row in self.text_ids for token in row]
        if not all(type(token) is int and 0 <= token < self.shape.vocab_size for token in ids):
            raise ValueError(f"an id is outside the vocabulary of {self.shape.vocab_size}")
        if not all(np.isfinite(logs).all() and (logs <= _MOST - 1).all()
                   for logs in (self.top_logprobs, self.next_logprobs)):
            raise ValueError("a log-probability is not a number, or above 0")
        if len(self.texts) != len(self.text_ids) or not all(isinstance(text, str) for text in self.texts):
            raise ValueError(f"{len(self.texts)} texts with the ids of {len(self.text_ids)}")

    def wanted(self, row: int) -> np.ndarray:
        """Return (L, K + 1) ids whose log-probabilities a runtime must return; the last is the next token, or 0."""
        following = np.append(self.ids[row, 1:], 0)
        return np.concatenate([self.top_ids[row], following[:, None]], axis=1)

    def long_prompt(self, n_tokens: int) -> list[int]:
        """Return n_tokens ids: the rows concatenated, repeated if they are too few."""
        flat = self.ids.reshape(-1)
        return [int(i) for i in np.resize(flat, n_tokens)]


def _row(ids: np.ndarray, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    logprobs = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    top = np.argsort(-logprobs, axis=-1, kind="stable")[:, :TOP]
    return (top.astype(np.int32), np.take_along_axis(logprobs, top, -1).astype(np.float32),
            logprobs[np.arange(len(ids) - 1), ids[1:]].astype(np.float32))


class DeviceComparison(Divergences):
    """Collects a device's answers row by row, then computes the metrics. KL in nats."""

    def __init__(self, reference: StoredReference, near_tie: float):
        super().__init__(near_tie)
        self._reference = reference

    def update(self, row: int, logprobs: Any, argmax: Any) -> None:
        """Add the answers for `wanted(row)`: log-probabilities (L, K + 1), None where they are not numbers, and the
        most probable ids (L)."""
        expected = self._reference.top_logprobs[row].astype(np.float64)
        got = np.array(logprobs, dtype=np.float64)
        if got.shape != (len(expected), expected.shape[1] + 1) or np.shape(argmax) != (len(expected),):
            raise UserError(f"the runtime gave log-probabilities of shape {got.shape}, not "
                            f"{(len(expected), expected.shape[1] + 1)}")
        if (got[:, :-1] == got[:, :1]).all():
            raise UserError("the runtime gave every token the same probability: it returned no scores")
        self._collect(_divergence(expected, got[:, :-1]), expected[:, 0] - expected[:, 1],
                      self._reference.top_ids[row, :, 0] == np.asarray(argmax),
                      -np.stack([self._reference.next_logprobs[row].astype(np.float64), got[:-1, -1]]))

    def figures(self) -> dict[str, Any]:
        """positions, near_ties, kl_mean, kl_p99, kl_max, top1, delta_ppl; None for what is not a number."""
        return {key: value if math.isfinite(value) else None for key, value in self._shared_figures().items()}


def _divergence(log_p_LK: np.ndarray, log_q_LK: np.ndarray) -> np.ndarray:
    """(L,) KL(p || q) over the K ids and all others together; NaN where q is not a distribution."""
    p = np.exp(log_p_LK)
    log_q_LK = np.where(np.exp(log_q_LK).sum(-1, keepdims=True) > _MOST, np.nan, log_q_LK)
    rest_p, rest_q = (np.maximum(1 - np.exp(logs).sum(-1), _LEAST) for logs in (log_p_LK, log_q_LK))
    divergence: np.ndarray = (p * (log_p_LK - log_q_LK)).sum(-1) + rest_p * np.log(rest_p / rest_q)
    return np.maximum(divergence, 0.0)

