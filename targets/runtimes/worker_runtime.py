"""A file in a runtime of this machine, run for verification in its own process and within a time limit."""
from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from lrc_edge.targets.runtimes.table import native_command, runtime_named
from lrc_edge.targets.runtimes.worker import Worker, WorkerFailed

# A request may take as long as on the slowest plausible machine: 0.5 GFLOP/s, 20 MB/s of a file's bytes.
BASE_SECONDS = 120.0
SLOWEST_FLOPS, SLOWEST_BYTES = 5e8, 2e7
LOGITS_BYTES = 1 << 31  # of one answer: on disk, and read one row at a time


class WorkerRuntime:
    """One file in one runtime that has Python bindings.

    A worker that crashed is restarted for the next request: prefill may crash where decode works. A worker that hung,
    or that cannot open the file, is not used again.

    n_params: parameters of the model, for the time limits. vocab_size: the size that the file must have; 0: any.
    folder: on the disk that stores the logits which the worker returns. Use it as a context manager. Every failure is
    a WorkerFailed whose text names the runtime and the stage (open, prefill, decode, generate, tokenize, chat).
    """

    def __init__(self, name: str, path: Path, n_ctx: int, threads: int, n_params: int, folder: Path | None = None,
                 vocab_size: int = 0):
        self.row, self.name, self.label, self.vocab_size = runtime_named(name), name, name, vocab_size
        self._path, self._n_ctx, self._threads, self._n_params = path, n_ctx, threads, n_params
        self._file = tempfile.TemporaryFile(dir=folder)
        self._worker: Worker | None = None
        self._why_not = ""  # why it is not asked again
        self._context: tuple[int, int, str] = (n_ctx, 1, "f32")

    def __enter__(self) -> WorkerRuntime:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self._stop()
        self._file.close()

    # Requests

    def context(self, n_ctx: int, n_rows: int = 1, cache: str = "f32") -> None:
        """Empty the KV cache and give it room for n_rows rows of n_ctx tokens, in the type `cache`.

        Does nothing in a runtime whose cache has one type: its cache begins empty with every request.
        """
        self._context = (n_ctx, n_rows, cache)
        if self.row.caches and self._worker is not None:
            self._ask("context", n_ctx=n_ctx, n_rows=n_rows, cache=cache)

    def prefill(self, rows: np.ndarray, positions: Sequence[int] | None = None) -> np.ndarray:
        """Return logits (B, P, V) of rows (B, T), mapped from a file that the next request overwrites."""
        return self._logits("prefill", rows, positions)

    def decode(self, rows: np.ndarray, positions: Sequence[int] | None = None) -> np.ndarray:
        return self._logits("decode", rows, positions)

    def read(self, row: np.ndarray, positions: Sequence[int], alone: Sequence[int]) -> np.ndarray:
        """Return logits (P, V) of a row (T,), read in one pass; tokens at `alone` are read one at a time."""
        asked = {"row": row.tolist(), "positions": [int(p) for p in positions], "alone": [int(p) for p in alone]}
        return self._received("read", (1, len(positions)), row.size, asked)[0]

    def generate(self, ids: list[int], n_tokens: int, stop: Sequence[int]) -> list[int]:
        made: list[int] = self._ask("generate", len(ids) + n_tokens, ids=ids, n_tokens=n_tokens, stop=list(stop))["ids"]
        return made

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        ids: list[list[int]] = self._ask("tokenize", texts=list(texts))["ids"]
        return ids

    def render_chat(self, messages: list[dict[str, str]], engine: str = "jinja") -> tuple[str, list[int]]:
        found = self._ask("chat", messages=messages, engine=engine)
        return found["text"], found["ids"]

    def end_tokens(self) -> set[int]:
        return set(self._ask("end_tokens")["ids"])

    def rows_at_once(self, n_tokens: int, most: int = 8) -> int:
        """Return how many rows of n_tokens have logits that fit into one answer."""
        return max(1, min(most, LOGITS_BYTES // (4 * n_tokens * self.vocab_size))) if self.vocab_size else 1

    # The worker

    def open(self) -> None:
        """Start the worker and load the file, unless it is already loaded."""
        if self._why_not:
            raise WorkerFailed(self._why_not)
        if self._worker is not None:
            return
        self._worker = Worker(native_command(self.name, spinning=False), files=[self._file.fileno()])
        n_ctx, n_rows, cache = self._context
        n_bytes = sum(file.stat().st_size for file in self._path.parent.glob(f"{self._path.name}*"))
        opened = self._request("open", BASE_SECONDS + n_bytes / SLOWEST_BYTES, path=str(self._path.resolve()),
                               n_ctx=n_ctx, threads=self._threads, cache=cache)
        self.label = opened["label"]
        if self.vocab_size not in (0, opened["vocab_size"]):
            self._why_not = (f"{self.name}, open: {opened['vocab_size']} tokens in the vocabulary, the model has "
                             f"{self.vocab_size}")
            self._stop()
            raise WorkerFailed(self._why_not)
        self.vocab_size = opened["vocab_size"]
        if n_rows > 1:
            self.context(*self._context)

    def _ask(self, op: str, n_read: int = 0, /, **fields: Any) -> dict[str, Any]:
        self.open()
        return self._request(op, BASE_SECONDS + 2 * self._n_params * n_read / SLOWEST_FLOPS, **fields)

    def _request(self, op: str, seconds: float, /, **fields: Any) -> dict[str, Any]:
        assert self._worker is not None
        try:
            return self._worker.ask(op, seconds, **fields)
        except WorkerFailed as error:
            text = f"{self.name}, {op}: {error}"
            if op == "open" or "no answer to" in str(error):
                self._why_not = text
            if self._why_not or not self._worker.is_alive:
                self._stop()
            raise WorkerFailed(text) from error

    def _logits(self, op: str, rows: np.ndarray, positions: Sequence[int] | None) -> np.ndarray:
        wanted = None if positions is None else [int(p) for p in positions]
        n_positions = rows.shape[1] if wanted is None else len(wanted)
        return self._received(op, (len(rows), n_positions), rows.size, {"rows": rows.tolist(), "positions": wanted})

    def _received(self, op: str, n: tuple[int, int], n_read: int, asked: dict[str, Any]) -> np.ndarray:
        """Return the logits that the worker wrote to the shared file: (*n, V), mapped."""
        shape = self._ask(op, n_read, **asked, fd=self._file.fileno())["shape"]
        expected = [*n, self.vocab_size]
        if shape != expected:
            raise WorkerFailed(f"{self.name}, {op}: logits of shape {shape}, need {expected}")
        if os.fstat(self._file.fileno()).st_size < 4 * math.prod(shape):
            raise WorkerFailed(f"{self.name}, {op}: fewer logits than it reports")
        logits = np.memmap(self._file, np.float32, "r", shape=tuple(shape))
        if n_flat := sum(int((row.min(-1) == row.max(-1)).sum()) for row in logits):
            raise WorkerFailed(f"{self.name}, {op}: every token has the same logit at {n_flat} positions: the runtime "
                               "returned no scores")
        return logits

    def _stop(self) -> None:
        if self._worker is not None:
            self._worker.close()
            self._worker = None
