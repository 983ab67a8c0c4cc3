"""Predict milliseconds per token of any shape from timings of a few.

Time is a sum of physical parts, each proportional to a count that follows from the shape: bytes of the layers'
matrices, bytes of the head, products and bytes of attention over the context, layers, and a constant. Least squares
with weights that are not negative fits the factors to the anchors' timings; residuals are relative, so that a small
shape counts as much as a large one.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from lrc_edge.families import EMBEDDING, HEAD, weights_of
from lrc_edge.formats import Kind, format_of
from lrc_edge.shape import ModelShape
from lrc_edge.targets.memory import kv_bytes_per_token, weight_bytes

Counts = tuple[float, ...]
TILE = 64  # queries, and keys, that llama.cpp's attention multiplies at once (GGML_FA_TILE_Q in ggml-cpu)
# Whether the head's product is made for every token of a prompt, as our ONNX graphs do, or only for the last one.
_LOGITS_OF_ALL: dict[Kind, bool] = {"gguf": False, "onnx": True}


@dataclass(frozen=True)
class Timing:
    """One shape in one format and runtime: tokens/s of reading a prompt of n_prompt tokens, and of the answer to it.

    decode: None if it could not be measured.
    """

    shape: ModelShape
    format: str
    n_prompt: int
    prompt: float
    decode: float | None

    def as_dict(self) -> dict[str, Any]:
        return {"shape": self.shape.as_dict(), "format": self.format, "n_prompt": self.n_prompt, "prompt": self.prompt,
                "decode": self.decode}

    @classmethod
    def from_dict(cls, table: dict[str, Any]) -> Timing:
        timing = cls(**table | {"shape": ModelShape.from_dict(table["shape"])})
        if not timing.prompt > 0 or timing.n_prompt < 1:
            raise ValueError(f"prompt = {timing.prompt!r:.40}, n_prompt = {timing.n_prompt!r:.40}: need more than 0")
        return timing


def decode_counts(shape: ModelShape, format_: str, depth: float) -> Counts:
    """Return what a token costs with `depth` tokens in the cache: the parts of the module's first lines."""
    layers, head = _matrix_bytes(shape, format_)
    return (layers, head, depth * shape.num_hidden_layers * shape.q_size, depth * kv_bytes_per_token(shape, format_),
            shape.num_hidden_layers, 1.0)


def prompt_counts(shape: ModelShape, format_: str, n_prompt: int) -> Counts:
    """Return the same for the mean token of a prompt of n_prompt tokens. It is read in batches: no cache of bytes is
    read again for each token, and attention computes the tiles on its diagonal in full. Each layer also converts and
    rotates the inputs of its products, in proportion to width and queries."""
    n_weights = sum(weight.numel for weight in weights_of(shape) if weight.role.is_matrix and weight.layer is not None)
    head = shape.vocab_size * shape.hidden_size * (1 if _LOGITS_OF_ALL[format_of(format_).kind] else 1 / n_prompt)
    return (n_weights + head, (n_prompt + TILE) / 2 * shape.num_hidden_layers * shape.q_size,
            shape.num_hidden_layers * (shape.hidden_size + shape.q_size), shape.num_hidden_layers, 1.0)


def _matrix_bytes(shape: ModelShape, format_: str) -> tuple[int, int]:
    """Return the bytes of the matrices in the layers, and of the one that makes the logits."""
    weights = [weight for weight in weights_of(shape) if weight.role.is_matrix]
    head = EMBEDDING if shape.tied else HEAD
    return (sum(weight_bytes(weight, format_) for weight in weights if weight.layer is not None),
            sum(weight_bytes(weight, format_) for weight in weights if weight.role is head))


@dataclass(frozen=True)
class CostModel:
    """Milliseconds per token of one format in one runtime on one machine."""

    format: str
    decode: tuple[float, ...]  # milliseconds per unit of decode_counts
    prompt: tuple[float, ...]  # of prompt_counts
    n_timings: int
    worst: float  # the largest relative error on the timings it was fitted to

    @classmethod
    def fit(cls, timings: Sequence[Timing], format_: str) -> CostModel:
        """Raises ValueError if there are fewer timings of the format than factors."""
        mine = [timing for timing in timings if timing.format == format_]
        decode, worst_decode = _fit([(decode_counts(timing.shape, format_, timing.n_prompt), 1000 / timing.decode)
                                     for timing in mine if timing.decode])
        prompt, worst_prompt = _fit([(prompt_counts(timing.shape, format_, timing.n_prompt), 1000 / timing.prompt)
                                     for timing in mine])
        return cls(format_, decode, prompt, len(mine), max(worst_decode, worst_prompt))

    def decode_ms(self, shape: ModelShape, depth: int) -> float:
        """Return the time of the next token after `depth` others."""
        return float(np.dot(self.decode, decode_counts(shape, self.format, depth)))

    def first_token_ms(self, shape: ModelShape, n_prompt: int) -> float:
        """Return the time until the first token of the answer to a prompt of n_prompt tokens."""
        return n_prompt * float(np.dot(self.prompt, prompt_counts(shape, self.format, n_prompt)))


def _fit(rows: Sequence[tuple[Counts, float]]) -> tuple[tuple[float, ...], float]:
    """Return the factors, none below 0, with the least relative squares, and the largest relative error.

    With so few factors, every subset can be tried: the best solution without negative factors is the unconstrained one
    of some subset.
    """
    if not rows or len(rows) < len(rows[0][0]):
        raise ValueError(f"{len(rows)} timings for {len(rows[0][0]) if rows else 'the'} factors")
    x = np.array([[count / ms for count in counts] for counts, ms in rows])
    units = np.abs(x).max(0)
    units[units == 0] = 1
    x /= units
    best, found = np.inf, np.zeros(x.shape[1])
    for n in range(1, x.shape[1] + 1):
        for kept in map(list, combinations(range(x.shape[1]), n)):
            factors = np.linalg.lstsq(x[:, kept], np.ones(len(x)), rcond=None)[0]
            loss = float(np.square(x[:, kept] @ factors - 1).sum())
            if factors.min() >= 0 and loss < best:
                best, found = loss, np.zeros(x.shape[1])
                found[kept] = factors
    return tuple(float(f) for f in found / units), float(np.abs(x @ found - 1).max())
