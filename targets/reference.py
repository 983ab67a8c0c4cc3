"""The PyTorch student, what every artifact is compared with, and its logits on held-out rows."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel

from lrc_edge.parity import Comparison, Metrics, next_ids
from lrc_edge.targets.runtime import Runtime


class Reference:
    """A transformers model in float32 on the CPU; implements lrc_edge.targets.runtime.Runtime."""

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.label = f"PyTorch {torch.__version__.split('+')[0]}"

    @torch.inference_mode()
    def prefill(self, ids: np.ndarray) -> np.ndarray:
        logits = self.model(input_ids=torch.from_numpy(np.asarray(ids, dtype=np.int64))[None], use_cache=False).logits
        return logits[0].float().numpy()

    @torch.inference_mode()
    def decode(self, ids: np.ndarray) -> np.ndarray:
        past = None
        rows = []
        for token in np.asarray(ids, dtype=np.int64):
            out = self.model(input_ids=torch.tensor([[int(token)]]), past_key_values=past, use_cache=True)
            past = out.past_key_values
            rows.append(out.logits[0, 0].float().numpy())
        return np.stack(rows)

    @torch.inference_mode()
    def generate(self, ids: list[int], n_tokens: int, stop: set[int]) -> list[int]:
        made: list[int] = []
        past, step = None, torch.tensor([ids])
        for _ in range(n_tokens):
            out = self.model(input_ids=step, past_key_values=past, use_cache=True)
            past = out.past_key_values
            token = int(out.logits[0, -1].argmax())
            if token in stop:
                break
            made.append(token)
            step = torch.tensor([[token]])
        return made

    def close(self) -> None:
        del self.model


@dataclass(frozen=True)
class HeldOutRows:
    """Held-out ids (n, L), and the PyTorch student's logits of each row, (L, V) float32."""

    ids: np.ndarray
    logits: list[np.ndarray]

    @classmethod
    def of(cls, reference: Runtime, ids: np.ndarray) -> HeldOutRows:
        return cls(ids, [reference.prefill(row) for row in ids])

    def compare(self, logits_of: Callable[[np.ndarray], np.ndarray], near_tie: float) -> Metrics:
        comparison = Comparison(near_tie)
        for ids, reference in zip(self.ids, self.logits, strict=True):
            comparison.update(reference, logits_of(ids), next_ids(ids))
        return comparison.metrics()


def compare_models(reference: Runtime, other: Runtime, ids: np.ndarray, near_tie: float) -> Metrics:
    """Metrics of `other` against `reference` on rows of ids (n, L), whole rows at a time."""
    return HeldOutRows.of(reference, ids).compare(other.prefill, near_tie)
