"""This machine: its processor, the number of threads for a model, and support for bfloat16."""
from __future__ import annotations

import os
import platform

from lrc_edge.shape import ModelShape

SMALL = 50_000_000  # parameters


def processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads_for(shape: ModelShape) -> int:
    """Return the number of threads: one for models below SMALL, where two are slower (0.33 s, not 0.04 s)."""
    return 1 if shape.n_params < SMALL else processors()


def multiplies_bfloat16() -> bool:
    """Whether the processor has bfloat16 instructions (AVX512-BF16 or AMX). Without them float32 is faster."""
    import torch

    return torch.cpu._is_avx512_bf16_supported()


def architecture() -> str:
    """Return the architecture of the processor: "x86_64", "aarch64", or the system's name for another."""
    name = platform.machine()
    return {"AMD64": "x86_64", "arm64": "aarch64"}.get(name, name)
