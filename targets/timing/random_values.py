"""Random numbers for weights that are only timed."""
from __future__ import annotations

import numpy as np

SCALE = 0.01  # about that of trained weights, so that no activation overflows
PERIOD = 1 << 16  # values or blocks; a tensor repeats them


def normal(n: int, type: np.dtype) -> np.ndarray:
    """Return n weights."""
    return np.resize((np.random.default_rng(0).standard_normal(PERIOD) * SCALE).astype(type), n)


def levels(n: int) -> np.ndarray:
    """Return n bytes, each of them one 8-bit level or two 4-bit levels."""
    return np.resize(np.random.default_rng(0).integers(0, 256, PERIOD, np.uint8), n)
