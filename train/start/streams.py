"""Residual streams of all calibration rows, in files, so that memory does not depend on the number of rows.

Shapes: B rows, L positions.
"""
from __future__ import annotations

import math
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
        self._widths: dict[str, int] = {}

    @property
    def n_tokens(self) -> int:
        return self.n_rows * self.length

    def parts(self) -> Iterator[slice]:
        """Yield the rows of each forward pass."""
        step = max(1, PART_TOKENS // self.length)
        for first in range(0, self.n_rows, step):
            yield slice(first, min(first + step, self.n_rows))

    def put(self, name: str, part: slice, stream: torch.Tensor) -> None:
        """Raises OSError if the disk is full (where a mapped file would end the process)."""
        self._widths[name] = stream.shape[-1]
        with self._file(name).open("r+b" if self._file(name).exists() else "wb") as file:
            file.seek(4 * part.start * self.length * stream.shape[-1])
            file.write(stream.float().contiguous().cpu().numpy().data)

    def get(self, name: str, part: slice) -> torch.Tensor:
        shape = (part.stop - part.start, self.length, self._widths[name])
        found = np.fromfile(self._file(name), np.float32, math.prod(shape),
                            offset=4 * part.start * self.length * shape[-1])
        return torch.from_numpy(found.reshape(shape)).to(self.device)

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.stream"
