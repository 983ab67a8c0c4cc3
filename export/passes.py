"""The progress of writing files, each of which reads all tensors of a checkpoint."""
from __future__ import annotations

from collections.abc import Mapping

from lrc_edge.console import Listener


class Passes:
    """Counts the MB of finished tensors. A file is one pass over all tensors."""

    def __init__(self, n_bytes: Mapping[str, int], n_passes: int, progress: Listener):
        """`n_bytes`: of each tensor, by the name that `at` will get."""
        self._n_bytes, self._progress = n_bytes, progress
        self._total = sum(n_bytes.values())
        self._started = self._done = self._current = 0
        self._what = ""
        progress.expect(n_passes * self._total / 1e6, "MB")

    def start(self, what: str) -> None:
        """Finish the previous pass and begin the next. `what`: "writing model.gguf"."""
        self._what, self._done, self._current = what, self._started * self._total, 0
        self._started += 1
        self._progress.update(what, self._done / 1e6)

    def at(self, tensor: str) -> None:
        """Finish the previous tensor and begin this one."""
        self._done += self._current
        self._current = self._n_bytes.get(tensor, 0)
        self._progress.update(f"{self._what}: {tensor}", self._done / 1e6)
