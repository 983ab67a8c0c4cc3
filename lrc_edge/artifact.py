"""Artifact: one file (or folder) that a writer made, as it stands in the report."""
from __future__ import annotations

import hashlib
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Fallback:
    """A tensor that did not get the type that the encoding asks for."""

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
    sha256: str  # of its file; of its files one after the other when there are several
    fallbacks: tuple[Fallback, ...]
    tensor_types: dict[str, int]  # type -> number of tensors
    # Of a model trained on its grid: the share of blocks that decode to exactly the trained weights.
    identical_blocks: float | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, table: dict[str, Any]) -> Artifact:
        return cls(**{**table, "fallbacks": tuple(Fallback(**row) for row in table["fallbacks"])})


def sha256_of(*paths: Path) -> str:
    """Hex digest of the files' bytes, one after the other."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


class HashedFile:
    """Appends to a file and hashes it meanwhile, in a thread: the digest costs no second pass over the bytes."""

    def __init__(self, path: Path):
        self._file = path.open("ab")
        self._digest = hashlib.sha256(path.read_bytes())  # what stands there already: a header
        self._thread = ThreadPoolExecutor(1)
        self._hashing: Future[None] = self._thread.submit(int)

    def __enter__(self) -> HashedFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self._thread.shutdown()
        self._file.close()

    def write(self, data: bytes | np.ndarray) -> None:
        """Append a contiguous array, which may not change before the next call."""
        self._hashing.result()
        self._hashing = self._thread.submit(self._digest.update, data)
        self._file.write(data)

    def align(self, n_bytes: int) -> None:
        """Fill with zeros up to a multiple of n_bytes."""
        self.write(b"\0" * (-self._file.tell() % n_bytes))

    def sha256(self) -> str:
        """Hex digest of the whole file so far."""
        self._hashing.result()
        return self._digest.hexdigest()
