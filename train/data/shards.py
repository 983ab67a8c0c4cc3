"""Tokens on disk: shards of one long stream, made of complete documents, written once and memory-mapped by training.

tokens-NNNNN.npy  (N,) uint16, or uint32 if the vocabulary needs it
starts-NNNNN.npy  (documents,) uint64: where in the shard each document begins; the first is 0
loss-NNNNN.npy    (N,) bool: whether the loss includes the token; absent if it includes all of them
"""
from __future__ import annotations

from pathlib import Path

import numpy as np

from lrc_edge.corpus.encode import Encoded

SHARD_TOKENS = 2**25  # a shard is closed when it has at least these: 64 MB, held in memory until then


def shard_file(folder: Path, kind: str, index: int) -> Path:
    return folder / f"{kind}-{index:05}.npy"


def shard_count(folder: Path) -> int:
    return len(list(folder.glob("tokens-*.npy")))


class ShardWriter:
    """Collects documents in memory and writes them as one shard on `close_shard`."""

    def __init__(self, folder: Path, vocab_size: int, n_shards: int = 0):
        """`n_shards`: shards that an earlier process has finished; later files are written again."""
        self.folder, self.n_shards = folder, n_shards
        for index in range(n_shards, shard_count(folder)):
            shard_file(folder, "tokens", index).unlink()
        self._dtype = np.uint16 if vocab_size <= 2**16 else np.uint32
        self._clear()

    def _clear(self) -> None:
        self._ids: list[np.ndarray] = []
        self._counts: list[np.ndarray | None] = []
        self.n_tokens = 0  # of the shard being collected

    def add(self, document: Encoded) -> None:
        if not document.ids:
            return
        self._ids.append(np.array(document.ids, dtype=self._dtype))
        self._counts.append(document.counts)
        self.n_tokens += len(document.ids)

    def close_shard(self) -> None:
        if not self.n_tokens:
            return
        lengths = np.array([len(ids) for ids in self._ids], dtype=np.uint64)
        np.save(shard_file(self.folder, "starts", self.n_shards), np.cumsum(lengths, dtype=np.uint64) - lengths)
        loss = shard_file(self.folder, "loss", self.n_shards)
        loss.unlink(missing_ok=True)  # of a process that was killed here
        if any(counts is not None for counts in self._counts):
            np.save(loss, np.concatenate([np.ones(len(ids), dtype=bool) if counts is None else counts
                                          for ids, counts in zip(self._ids, self._counts, strict=True)]))
        np.save(shard_file(self.folder, "tokens", self.n_shards), np.concatenate(self._ids))
        self.n_shards += 1
        self._clear()
