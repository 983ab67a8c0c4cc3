"""What a runtime must answer to be compared with the PyTorch student.

A runtime holds one loaded artifact. Logits always have the model's vocab_size columns, padding rows included.
"""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol, runtime_checkable

import numpy as np


@runtime_checkable
class Runtime(Protocol):
    """A model that turns token ids into logits."""

    label: str  # "llama.cpp (llama-cpp-python 0.3.36)"

    def prefill(self, ids: np.ndarray, positions: Sequence[int] | None = None) -> np.ndarray:
        """Logits of a row read at once: (T,) integers -> (P, V) float32 at `positions`, ascending; None: at all."""
        return self.read(ids, range(len(ids)) if positions is None else positions, ())

    def decode(self, ids: np.ndarray, positions: Sequence[int] | None = None) -> np.ndarray:
        """The same logits, each of a token that is read alone, through the KV cache."""
        wanted = range(len(ids)) if positions is None else positions
        return self.read(ids, wanted, wanted)

    def read(self, ids: np.ndarray, positions: Sequence[int], alone: Sequence[int]) -> np.ndarray:
        """Both in one pass: (P, V) at `positions`, ascending; tokens at `alone` are read alone."""
        ...

    def generate(self, ids: list[int], n_tokens: int, stop: set[int]) -> list[int]:
        """Greedy continuation of the prompt `ids`: at most n_tokens, without the prompt and without the stop token."""
        ...

    def close(self) -> None:
        """Free the model. Calling it again does nothing."""
        ...


@runtime_checkable
class TextRuntime(Runtime, Protocol):
    """A runtime that also carries the tokenizer and the chat template."""

    def tokenize(self, text: str) -> list[int]:
        """Ids of a user's prompt: with the BOS/EOS that the model asks for, special tokens in the text parsed."""
        ...

    def detokenize(self, ids: list[int]) -> str:
        """Text of generated ids, special tokens left out."""
        ...

    def render_chat(self, messages: list[dict[str, str]], engine: str = "jinja") -> tuple[str, list[int]]:
        """Messages through the artifact's own chat template, with generation prompt: the string and its ids."""
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
