"""Artifact: the description of one file that a writer made."""
from __future__ import annotations

import hashlib
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from lrc_edge.errors import UserError

WRITE_BYTES = 4 << 20  # per call


@dataclass(frozen=True)
class Fallback:
    """A tensor that has another type than the encoding asks for."""

    tensor: str
    wanted: str
    got: str
    reason: str


@dataclass(frozen=True)
class Artifact:
    path: str  # relative to the build directory
    format: str  # "gguf" | "onnx"
    encoding: str  # "q8_0", "fp32", ...
    bytes: int  # of all its files
    bits_per_weight: float  # 8 * bytes of tensor data / parameters of the student
    sha256: str  # of its file, or of its files concatenated
    fallbacks: tuple[Fallback, ...]
    tensor_types: dict[str, int]  # type -> number of tensors
    # Share of blocks that decode to exactly the trained weights; None if the model was not trained on the grid.
    identical_blocks: float | None = None

    @property
    def name(self) -> str:
        """Its format as `--formats` writes it: "gguf:q4_k_m"."""
        return f"{self.format}:{self.encoding}"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, table: dict[str, Any]) -> Artifact:
        return cls(**{**table, "fallbacks": tuple(Fallback(**row) for row in table["fallbacks"])})


def smallest_gguf(path: Path, encoding: str = "") -> Path:
    """Return `path` if it is a file, else the directory's smallest GGUF, or its smallest in `encoding`.

    Raises UserError if there is none.
    """
    if path.is_file():
        return path
    wanted = encoding.lower()
    models = (f for f in path.rglob("*.gguf") if not f.stem.endswith(".imatrix") and f.parent.name != "check"
              and f.stem.lower().endswith(wanted))  # check/ holds the teacher
    files = sorted(models, key=lambda f: f.stat().st_size)
    if not files:
        raise UserError(f"{path}: no GGUF {f'in {encoding} ' if encoding else ''}here; "
                        "build or export one with --formats gguf:q8_0")
    return files[0]


def sha256_of(*paths: Path) -> str:
    """Hex digest of the files' bytes, one after the other."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


class HashedFile:
    """Appends to a file: one thread writes and one hashes while the caller prepares the next data."""

    def __init__(self, path: Path):
        header = path.read_bytes() if path.exists() else b""
        self.n_bytes = len(header)
        self._file = path.open("ab", buffering=0)
        self._digest = hashlib.sha256(header)
        self._threads = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._pending: list[Future[None]] = []

    def __enter__(self) -> HashedFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        for thread in self._threads:
            thread.shutdown()
        self._file.close()

    def write(self, data: bytes | np.ndarray) -> None:
        """Append a contiguous array, which must not change until the next call returns.

        Raises OSError, also for the previous call.
        """
        view = memoryview(data).cast("B")  # type: ignore[arg-type]  # an array is a buffer
        self._wait()
        self._pending = [thread.submit(work, view)
                         for thread, work in zip(self._threads, (self._write, self._digest.update), strict=True)]
        self.n_bytes += len(view)

    def align(self, n_bytes: int) -> None:
        """Append zeros up to a multiple of n_bytes."""
        if padding := -self.n_bytes % n_bytes:
            self.write(bytes(padding))

    def sha256(self) -> str:
        """Hex digest of the complete file, which is written when this returns."""
        self._wait()
        return self._digest.hexdigest()

    def _wait(self) -> None:
        for future in self._pending:
            future.result()

    def _write(self, view: memoryview) -> None:
        while view:  # one call writes 2 GiB at most
            view = view[self._file.write(view[:WRITE_BYTES]):]
