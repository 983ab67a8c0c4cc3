"""The PyTorch student, with which every artifact is compared, and its logits on held-out rows."""
from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from lrc_edge.families import parts_of
from lrc_edge.parity import Comparison, Metrics, next_ids

ROUNDING_ROWS, ROUNDING_TOKENS = 2, 64  # what PyTorch's own rounding is measured on
Progress = Callable[[int], None]  # is called with the number of tokens that have just been read


class Reference:
    """A transformers model in float32 on the CPU; implements runtimes.protocol.Runtime, except decode."""

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.label = f"PyTorch {torch.__version__.split('+')[0]}"
        _use_onednn(model)

    @torch.inference_mode()
    def prefill(self, ids: np.ndarray, positions: Sequence[int] | None = None) -> np.ndarray:
        """Return (P, V) logits of ids (T,) at `positions`; by default at all of them."""
        kept: Any = 0 if positions is None else torch.tensor(list(positions))
        logits = self.model(input_ids=torch.from_numpy(np.asarray(ids, dtype=np.int64))[None], use_cache=False,
                            logits_to_keep=kept).logits
        return logits[0].float().numpy()

    @torch.inference_mode()
    def generate(self, ids: list[int], n_tokens: int, stop: set[int]) -> list[int]:
        made: list[int] = []
        past, step = None, torch.tensor([ids])
        for _ in range(n_tokens):
            out = self.model(input_ids=step, past_key_values=past, use_cache=True, logits_to_keep=1)
            past = out.past_key_values
            token = int(out.logits[0, -1].argmax())
            if token in stop:
                break
            made.append(token)
            step = torch.tensor([[token]])
        return made

    @torch.no_grad()
    def rounding(self, ids: np.ndarray) -> float:
        """Return PyTorch's own rounding: the largest difference between float32 and float64 logits on rows (n, L).

        A sample of tokens is used. The result is at least the spacing of float32 numbers at the largest logit.
        """
        rows = torch.from_numpy(np.asarray(ids[:ROUNDING_ROWS, :ROUNDING_TOKENS], dtype=np.int64))
        single = self.model(input_ids=rows, use_cache=False).logits
        with _in_float64(self.model):
            double = self.model(input_ids=rows, use_cache=False).logits
        return max(float((single.double() - double).abs().max()), float(np.spacing(single.abs().max().numpy())))

    def close(self) -> None:
        del self.model


class _OneDnnLinear(nn.Linear):
    """A float32 linear that uses oneDNN: on AMD processors MKL does not use AVX-512 (2.7 times slower, docs/LOG.md)."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if inputs.dtype != torch.float32:
            return super().forward(inputs)
        result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(inputs, self.weight, self.bias, "none", [], "")
        return result


def _use_onednn(model: nn.Module) -> None:
    """Replace the model's linears if this PyTorch has oneDNN. The weights are unchanged."""
    if torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        for module in model.modules():
            if type(module) is nn.Linear:
                module.__class__ = _OneDnnLinear


@contextmanager
def _in_float64(model: PreTrainedModel) -> Iterator[None]:
    """Keep each part of the model in float64 only while it computes, which costs memory for one layer."""
    found = parts_of(model)
    parts = [found.embedding, *found.layers, found.norm, found.head]

    def widen(module: nn.Module, _: Any) -> None:
        module.double()

    def narrow(module: nn.Module, _: Any, __: Any) -> None:
        module.float()  # lossless: the values were float32

    hooks = [hook for part in parts for hook in (part.register_forward_pre_hook(widen),
                                                 part.register_forward_hook(narrow))]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@dataclass(frozen=True)
class HeldOutRows:
    """Held-out ids (n, L), and the PyTorch student's logits at `positions` of each row, (n, P, V) float32.

    The logits are in an unnamed temporary file, because they may be larger than the model.
    """

    ids: np.ndarray
    logits: np.ndarray
    positions: tuple[int, ...] | None = None  # None: all

    @classmethod
    def of(cls, reference: Reference, ids: np.ndarray, positions: Sequence[int] | None = None,
           folder: Path | None = None, progress: Progress | None = None) -> HeldOutRows:
        """Compute the logits. `folder`: on the disk that stores them. Raises OSError if the disk is full."""
        file = tempfile.TemporaryFile(dir=folder)
        shape: tuple[int, ...] = ()
        for row in ids:
            logits = reference.prefill(row, positions)
            shape = logits.shape
            file.write(logits.tobytes())
            if progress:
                progress(len(row))
        file.flush()
        return cls(ids, np.memmap(file, np.float32, "r", shape=(len(ids), *shape)),
                   None if positions is None else tuple(positions))

    def next_ids(self, row: int) -> np.ndarray:
        """Return (P,) the tokens that follow the positions; -1 where none does."""
        following = next_ids(self.ids[row])
        return following if self.positions is None else following[list(self.positions)]

    def compare(self, logits_of: Callable[[np.ndarray], np.ndarray], near_tie: float) -> Metrics:
        """Return the metrics of another model. `logits_of`: maps a row (L,) to logits (P, V)."""
        comparison = Comparison(near_tie)
        for row, ids in enumerate(self.ids):
            comparison.update(self.logits[row], logits_of(ids), self.next_ids(row))
        return comparison.metrics()


def compare_models(reference: Reference, other: Reference, ids: np.ndarray, near_tie: float) -> Metrics:
    """Return the metrics of `other` against `reference` on rows of ids (n, L)."""
    return HeldOutRows.of(reference, ids).compare(other.prefill, near_tie)
