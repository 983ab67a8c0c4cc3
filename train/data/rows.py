"""Training rows: seq_len consecutive tokens of the shards, with labels, memory-mapped."""
from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from lrc_edge.train.data.shards import shard_count, shard_file
from lrc_edge.train.losses import NO_LABEL


class _Shard:
    def __init__(self, folder: Path, index: int):
        self.tokens = np.load(shard_file(folder, "tokens", index), mmap_mode="r")
        self.starts = np.load(shard_file(folder, "starts", index), mmap_mode="r")
        loss = shard_file(folder, "loss", index)
        self.counts = np.load(loss, mmap_mode="r") if loss.exists() else None


class PackedRows(Dataset[dict[str, torch.Tensor]]):
    """Rows of L = seq_len tokens, cut from the stream that the shards form; an incomplete last row is left out.

    A row has `input_ids` (L,) int64 and `labels` (L,) int64: the NEXT token if the loss includes it, -100 if not and at
    the end. With `isolate` it also has `documents` (L,) int32, the number of each token's document within the row
    (0, 1, 2, ...), and no label crosses documents.
    """

    def __init__(self, folder: Path, seq_len: int, isolate: bool = False):
        self.folder, self.seq_len, self.isolate = folder, seq_len, isolate
        self._shards = [_Shard(folder, i) for i in range(shard_count(folder))]
        self._ends = np.cumsum([len(shard.tokens) for shard in self._shards])
        self.n_tokens = int(self._ends[-1]) if self._shards else 0

    def __reduce__(self) -> tuple[type, tuple[Path, int, bool]]:
        """Let a worker process open the files itself, because pickle would copy complete shards to it."""
        return PackedRows, (self.folder, self.seq_len, self.isolate)

    def __len__(self) -> int:
        return self.n_tokens // self.seq_len

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        pieces = list(self._pieces(index * self.seq_len))
        ids = np.concatenate([shard.tokens[a:b] for shard, a, b in pieces]).astype(np.int64)
        counts = np.concatenate([np.ones(b - a, dtype=bool) if shard.counts is None else shard.counts[a:b]
                                 for shard, a, b in pieces])
        labels = np.full_like(ids, NO_LABEL)
        labels[:-1] = np.where(counts[1:], ids[1:], NO_LABEL)
        row = {"input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(labels)}
        if self.isolate:
            begins = np.concatenate([_begins(*piece) for piece in pieces])
            begins[0] = False  # the row's first document is number 0, whether or not it begins here
            labels[:-1][begins[1:]] = NO_LABEL
            row["documents"] = torch.from_numpy(np.cumsum(begins, dtype=np.int32))
        return row

    def _pieces(self, begin: int) -> Iterator[tuple[_Shard, int, int]]:
        """Return the slices of shards that form the row at `begin` of the stream: several if it crosses shards."""
        end = begin + self.seq_len
        i = int(np.searchsorted(self._ends, begin, side="right"))
        while begin < end:
            shard, offset = self._shards[i], int(self._ends[i]) - len(self._shards[i].tokens)
            stop = min(end, int(self._ends[i]))
            yield shard, begin - offset, stop - offset
            begin, i = stop, i + 1


def _begins(shard: _Shard, a: int, b: int) -> np.ndarray:
    """Return (b - a,) bool: whether a document begins at the token."""
    first, last = np.searchsorted(shard.starts, np.array([a, b], dtype=np.uint64))
    begins = np.zeros(b - a, dtype=bool)
    begins[shard.starts[first:last].astype(np.int64) - a] = True
    return begins
