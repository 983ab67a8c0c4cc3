"""The header of a third-party GGUF file: metadata, and where each tensor is stored.

gguf.GGUFReader trusts the counts in a file: a damaged array length can keep it reading for hours. Here a count
that exceeds the bytes of the file is an error, and so is a file shorter than its header describes (with both sizes).
"""
from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from lrc_edge.errors import UserError

VERSIONS = (2, 3)
MAX_DIMS = 4  # ggml's
_STRING, _ARRAY, _BOOL = int(GGUFValueType.STRING), int(GGUFValueType.ARRAY), int(GGUFValueType.BOOL)
_NUMBERS = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", _BOOL: "<u1", 10: "<u8", 11: "<i8",
            12: "<f8"}  # GGUFValueType -> numpy


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor is stored. `type` is None and n_bytes 0 for a type that the gguf package does not know."""

    name: str
    type: GGMLQuantizationType | None
    type_id: int
    shape: tuple[int, ...]  # rows first, as PyTorch's
    offset: int  # in the file
    n_bytes: int


@dataclass(frozen=True)
class GgufHeader:
    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, StoredTensor]


class _Damage(Exception):
    """An error in the bytes. read_header adds the name of the file."""


def read_header(path: Path) -> GgufHeader:
    """Read the metadata of the GGUF file at `path`, and where its tensors are stored.

    Raises UserError for a file that is not GGUF, is truncated (with both sizes) or has an invalid header.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise UserError(f"{path}: not a GGUF file (it does not begin with GGUF); give a .gguf file")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _parse(path, _Cursor(data, size))
    except OSError as error:
        raise UserError(f"{path}: not readable ({error.strerror or error}); give a .gguf file") from error
    except _Damage as damage:
        raise UserError(f"{path}: {damage}; download or write the file again") from None


class _Cursor:
    """Reads values one after the other. Every length is checked before memory of that length is allocated."""

    def __init__(self, data: mmap.mmap, size: int):
        self.data, self.size, self.position = data, size, 4

    def take(self, n_bytes: int) -> int:
        """Advance by n_bytes and return where they begin."""
        start = self.position
        if n_bytes > self.size - start:
            raise _Damage(f"truncated or corrupt: its header needs {n_bytes:,} bytes at {start:,}, the file has "
                          f"{self.size:,}")
        self.position = start + n_bytes
        return start

    def integer(self, form: str) -> int:
        return int(struct.unpack_from(form, self.data, self.take(struct.calcsize(form)))[0])

    def string(self) -> str:
        n_bytes = self.integer("<Q")
        start = self.take(n_bytes)
        return self.data[start:start + n_bytes].decode("utf-8", errors="replace")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self._array(self.integer("<I"), self.integer("<Q"))
        return self._numbers(kind, 1)[0]

    def _array(self, kind: int, n: int) -> list[Any]:
        if kind == _STRING:
            if n > self.size // 8:
                raise _Damage(f"truncated or corrupt: an array of {n:,} strings in a file of {self.size:,} bytes")
            return [self.string() for _ in range(n)]
        return self._numbers(kind, n)

    def _numbers(self, kind: int, n: int) -> list[Any]:
        if kind not in _NUMBERS:
            raise _Damage(f"corrupt: a value of unknown type {kind}")
        dtype = np.dtype(_NUMBERS[kind])
        start = self.take(n * dtype.itemsize)
        numbers = np.frombuffer(self.data[start:self.position], dtype).tolist()
        return [bool(number) for number in numbers] if kind == _BOOL else numbers


def _parse(path: Path, cursor: _Cursor) -> GgufHeader:
    version = cursor.integer("<I")
    if version not in VERSIONS:
        kind = "big-endian" if version & 0xffff == 0 else f"of GGUF version {version}"
        raise _Damage(f"{kind}, need a little-endian file of version {' or '.join(map(str, VERSIONS))}")
    n_tensors, n_keys = cursor.integer("<Q"), cursor.integer("<Q")
    if max(n_tensors, n_keys) > cursor.size // 12:
        raise _Damage(f"truncated or corrupt: {n_tensors:,} tensors and {n_keys:,} keys in {cursor.size:,} bytes")
    metadata: dict[str, Any] = {}
    for _ in range(n_keys):
        key = cursor.string()
        if key in metadata:
            raise _Damage(f"corrupt: the key {key[:60]!r} is there twice")
        metadata[key] = cursor.value(cursor.integer("<I"))
    infos = [_tensor_info(cursor) for _ in range(n_tensors)]
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
        raise _Damage(f"corrupt: general.alignment is {alignment!r}, need a power of two")
    start = -(-cursor.position // alignment) * alignment
    tensors: dict[str, StoredTensor] = {}
    for name, type_id, shape, offset in infos:
        if name in tensors:
            raise _Damage(f"corrupt: the tensor {name[:60]!r} is there twice")
        if offset % alignment:
            raise _Damage(f"corrupt: {name[:60]} begins at {offset:,}, which is no multiple of {alignment}")
        type, n_bytes = _size(name, type_id, shape)
        tensors[name] = StoredTensor(name, type, type_id, shape, start + offset, n_bytes)
    end = max((tensor.offset + tensor.n_bytes for tensor in tensors.values()), default=start)
    if end > cursor.size:
        raise _Damage(f"truncated: its header describes {end:,} bytes, the file has {cursor.size:,}")
    return GgufHeader(path, metadata, tensors)


def _tensor_info(cursor: _Cursor) -> tuple[str, int, tuple[int, ...], int]:
    """(name, type, shape with the rows first, offset in the data)."""
    name, n_dims = cursor.string(), cursor.integer("<I")
    if not 1 <= n_dims <= MAX_DIMS:
        raise _Damage(f"corrupt: {name[:60]} has {n_dims} dimensions, GGUF allows 1 to {MAX_DIMS}")
    shape = tuple(cursor.integer("<Q") for _ in range(n_dims))
    return name, cursor.integer("<I"), shape[::-1], cursor.integer("<Q")


def _size(name: str, type_id: int, shape: tuple[int, ...]) -> tuple[GGMLQuantizationType | None, int]:
    """(type, bytes)"""
    try:
        type = GGMLQuantizationType(type_id)
    except ValueError:
        return None, 0
    block, block_bytes = GGML_QUANT_SIZES[type]
    if shape[-1] % block:
        raise _Damage(f"corrupt: {name[:60]} has rows of {shape[-1]:,}, no multiple of {block} ({type.name} block)")
    return type, math.prod(shape) // block * block_bytes
