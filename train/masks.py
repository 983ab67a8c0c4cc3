"""Attention masks and positions: causal order, sliding windows, document boundaries.

Shapes: B rows, L positions.
"""
from __future__ import annotations

from typing import Any

import torch

from lrc_edge.families import family_of


def positions_of(input_ids: torch.Tensor, documents: torch.Tensor | None) -> torch.Tensor:
    """Return the positions for RoPE: (1, L), or (B, L) counted from each document's beginning."""
    offsets = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
    if documents is None:
        return offsets
    begins = torch.ones_like(documents, dtype=torch.bool)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return offsets - (offsets * begins).cummax(1).values


def attention_masks(config: Any, input_ids: torch.Tensor, documents: torch.Tensor | None
                    ) -> list[torch.Tensor | None]:
    """Return each layer's mask: whether a query (row) may attend to a key (column), (1 or B, 1, L, L).

    None if causal order is the only rule: SDPA then uses its fast path. Layers with the same window share a mask.
    `config`: transformers' object.
    """
    family = family_of(config.model_type)
    windows = [family.window_of_layer(config, layer) for layer in range(config.num_hidden_layers)]
    masks = {window: _mask(window, input_ids, documents) for window in set(windows)}
    return [masks[window] for window in windows]


def _mask(window: int | None, input_ids: torch.Tensor, documents: torch.Tensor | None) -> torch.Tensor | None:
    length = input_ids.shape[1]
    if window is not None and window >= length:
        window = None
    if window is None and documents is None:
        return None
    offsets = torch.arange(length, device=input_ids.device)
    behind = offsets[:, None] - offsets[None, :]
    seen = (behind >= 0)[None]
    if window is not None:
        seen = seen & (behind < window)
    if documents is not None:
        seen = seen & (documents[:, :, None] == documents[:, None, :])
    return seen[:, None]
