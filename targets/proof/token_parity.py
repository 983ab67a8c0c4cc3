"""Compare a runtime's token ids with the Hugging Face tokenizer's, string by string."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from lrc_edge.targets.proof.tokenizer_strings import awkward_strings

SHOWN = 10  # examples kept for the report


@dataclass(frozen=True)
class TokenMismatch:
    text: str
    expected: list[int]  # Hugging Face's ids
    got: list[int]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class TokenParity:
    """Result of comparing ids over a corpus."""

    n_strings: int
    n_normalized: int  # strings that the tokenizer's Unicode normalizer changes; compared in normalized form
    n_mismatches: int
    examples: tuple[TokenMismatch, ...]  # the first mismatches


def compare_token_ids(tokenizer: PreTrainedTokenizerBase, tokenize: Callable[[Sequence[str]], list[list[int]]],
                      strings: Sequence[str] | None = None) -> TokenParity:
    """Compare ids on `strings`, or on `corpus_of` the tokenizer.

    `tokenize`: the runtime's, for many texts. Its counterpart is `tokenizer.encode(text)`: BOS and EOS as the model
    adds them, special tokens in the text parsed.

    Runtimes do not normalize text. A tokenizer with a Unicode normalizer (Qwen's NFC) reads a decomposed "é" as the
    composed one, which no GGUF can express. For such a string the runtime gets the normalized text, and the result
    counts such strings.
    """
    if strings is None:
        strings = corpus_of(tokenizer)
    composed = [normalize(tokenizer, text) for text in strings]
    wrong: list[TokenMismatch] = []
    for text, got in zip(strings, tokenize(composed), strict=True):
        expected = list(tokenizer.encode(text, verbose=False))
        if expected != got:
            wrong.append(TokenMismatch(text, expected, got))
    normalized = sum(text != other for text, other in zip(strings, composed, strict=True))
    return TokenParity(len(strings), normalized, len(wrong), tuple(wrong[:SHOWN]))


def corpus_of(tokenizer: PreTrainedTokenizerBase) -> Sequence[str]:
    """Return the tokenizer test strings, including the tokenizer's own special tokens."""
    return awkward_strings([str(token) for token in tokenizer.get_added_vocab()])


def normalize(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """Apply the tokenizer's Unicode normalizer (NFC, NFKC, NFD, NFKD). Runtimes must apply any other themselves."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    normalizer = backend.normalizer if backend is not None else None
    if normalizer is None or type(normalizer).__name__ not in ("NFC", "NFKC", "NFD", "NFKD"):
        return text
    return str(normalizer.normalize_str(text))
