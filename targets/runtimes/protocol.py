"""The interface that a runtime must implement to be compared with the PyTorch student.

A runtime holds one loaded artifact. Logits always have the model's vocab_size columns, padding rows included.
"""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import takewhile
from typing import Protocol, runtime_checkable

import numpy as np


@runtime_checkable
class Runtime(Protocol):
    """A model that turns token ids into logits."""

    label: str  # "llama.cpp (llama-cpp-python 0.3.36)"

    def prefill(self, ids: np.ndarray, positions: Sequence[int] | None = None) -> np.ndarray:
        """Read a row in one pass: (T,) integers -> logits (P, V) float32 at `positions`, ascending; None: at all."""
        return self.read(ids, range(len(ids)) if positions is None else positions, ())

    def decode(self, ids: np.ndarray, positions: Sequence[int] | None = None) -> np.ndarray:
        """Like `prefill`, but read one token at a time, through the KV cache."""
        wanted = range(len(ids)) if positions is None else positions
        return self.read(ids, wanted, wanted)

    def read(self, ids: np.ndarray, positions: Sequence[int], alone: Sequence[int]) -> np.ndarray:
        """Mix both: (P, V) at `positions`, ascending. Tokens at `alone` are read one at a time."""
        ...

    def tokens(self, ids: list[int], n_tokens: int) -> Iterator[int]:
        """Yield the greedy continuation of the prompt `ids`, at most n_tokens, each token as soon as it is known."""
        ...

    def generate(self, ids: list[int], n_tokens: int, stop: set[int]) -> list[int]:
        """Return the greedy continuation of the prompt `ids`: at most n_tokens, without prompt and stop token."""
        return list(takewhile(lambda token: token not in stop, self.tokens(ids, n_tokens)))

    def close(self) -> None:
        """Free the model. Calling it again does nothing."""
        ...


@runtime_checkable
class TextRuntime(Runtime, Protocol):
    """A runtime that also has the tokenizer and the chat template."""

    def tokenize(self, text: str) -> list[int]:
        """Return the ids of a user's prompt, with the model's BOS and EOS; special tokens in the text are parsed."""
        ...

    def detokenize(self, ids: list[int]) -> str:
        """Return the text of generated ids without special tokens."""
        ...

    def render_chat(self, messages: list[dict[str, str]], engine: str = "jinja") -> tuple[str, list[int]]:
        """Render messages with the artifact's own chat template and generation prompt; return the text and its ids."""
        ...


def parts(n_tokens: int, alone: Sequence[int], size: int) -> Iterator[tuple[int, int]]:
    """Split a row into parts (start, end): each token at `alone` (ascending) by itself, the others `size` at a time."""
    done = 0
    for position in [*alone, n_tokens]:
        for start in range(done, position, size):
            yield start, min(start + size, position)
        if position < n_tokens:
            yield position, position + 1
        done = position + 1
