"""Fewer FFN neurons: every layer keeps its own, the same number in each."""
from __future__ import annotations

import torch

from lrc_edge.block_map import BlockMap
from lrc_edge.train.start.statistics import LayerStatistics


def strongest(statistics: LayerStatistics, down_DF: torch.Tensor) -> torch.Tensor:
    """Return each neuron's importance (F,): the RMS of its activation times the norm of its column of down_proj."""
    return statistics.neurons_F.sqrt() * down_DF.norm(dim=0)


def selection(importance_F: torch.Tensor, n_kept: int) -> BlockMap:
    kept = importance_F.topk(n_kept).indices.sort().values
    return BlockMap.selection(kept.tolist(), len(importance_F))
