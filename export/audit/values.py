"""Compare values in a file with a checkpoint's: which rows to compare, and how to measure their difference.

A tensor of more than WHOLE values is compared by SAMPLE rows: one random row from each of SAMPLE equal ranges. So no
regular pattern of rows is missed, and any damage longer than two ranges is found.
"""
from __future__ import annotations

import zlib

import numpy as np
import torch

WHOLE = 1 << 18  # values up to which all rows of a tensor are compared
SAMPLE = 256  # rows of a larger one


def sample_rows(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return the rows to compare, in order; the same on every call. A vector is one row."""
    if len(shape) == 1:
        return np.zeros(1, int)
    if shape[0] <= SAMPLE or shape[0] * shape[1] <= WHOLE:
        return np.arange(shape[0])
    edges = np.linspace(0, shape[0], SAMPLE + 1).astype(int)
    return np.random.default_rng(zlib.crc32(name.encode())).integers(edges[:-1], edges[1:])


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the RMS of the difference divided by the RMS of the expected values; 0 if both are zero."""
    error, size = float((found - expected).double().square().sum()), float(expected.double().square().sum())
    return (error / size) ** 0.5 if size else float("inf") if error else 0.0


def rounded_before(found: torch.Tensor, expected: torch.Tensor, limit: float) -> bool:
    """Whether the values are the expected ones rounded to bfloat16 or float16."""
    return any(relative_error(found, expected.to(half).float()) <= limit for half in (torch.bfloat16, torch.float16))
