"""This machine: its processors, how many of them a model should use, and the type in which they compute."""
from __future__ import annotations

import os
import platform

from lrc_edge.shape import ModelShape

SMALL = 50_000_000  # parameters


def processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads_for(shape: ModelShape) -> int:
    """One for models below SMALL: a token takes less time than waking a second thread (measured: 0.04 s, 0.33 s)."""
    return 1 if shape.n_params < SMALL else processors()


def multiplies_bfloat16() -> bool:
    """Whether the processor has instructions for it (AVX512-BF16 or AMX); elsewhere float32 is faster."""
    import torch

    return torch.cpu._is_avx512_bf16_supported()


def architecture() -> str:
    """The processor's: "x86_64", "aarch64", or the system's name for it."""
    name = platform.machine()
    return {"AMD64": "x86_64", "arm64": "aarch64"}.get(name, name)
