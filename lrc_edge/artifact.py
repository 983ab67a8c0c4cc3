"""Artifact: one file (or folder) that a writer made, as it stands in the report."""
from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


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
