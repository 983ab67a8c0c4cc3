"""Residual streams of all calibration rows, in files, so that memory does not depend on the number of rows.

Shapes: B rows, L positions.
"""
from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

PART_TOKENS = 4096  # tokens of a forward pass


class Streams:
    """Named float32 arrays (B, L, width) in files of `folder`."""

    def __init__(self, folder: Path, sizes: tuple[int, ...], device: torch.device):
        """`sizes`: (B, L)"""
        self.folder, self.device = folder, device
        self.n_rows, self.length = sizes
        self._arrays: dict[str, np.memmap] = {}

    @property
    def n_tokens(self) -> int:
        return self.n_rows * self.length

    def parts(self) -> Iterator[slice]:
        """Yield the rows of each forward pass."""
        step = max(1, PART_TOKENS // self.length)
        for first in range(0, self.n_rows, step):
            yield slice(first, min(first + step, self.n_rows))

    def put(self, name: str, part: slice, stream: torch.Tensor) -> None:
        if name not in self._arrays:
            size = (self.n_rows, self.length, stream.shape[-1])
            self._arrays[name] = np.memmap(self.folder / f"{name}.stream", np.float32, "w+", shape=size)
        self._arrays[name][part] = stream.cpu().numpy()

    def get(self, name: str, part: slice) -> torch.Tensor:
        return torch.from_numpy(np.array(self._arrays[name][part])).to(self.device)
