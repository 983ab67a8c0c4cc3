"""Where training computes, and in which precision."""
from __future__ import annotations

import torch

from lrc_edge.errors import UserError
from lrc_edge.machine import multiplies_bfloat16


def choose_device(wanted: str) -> torch.device:
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError("train.device = 'cuda': this machine has no usable GPU; use --set train.device=cpu")
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


def choose_precision(wanted: str, device: torch.device) -> torch.dtype:
    """Return the type to compute in. `auto` is bf16 on a GPU and on processors with instructions for it (AVX512-BF16 or
    AMX); on other processors bf16 is slower."""
    if wanted != "auto":
        return torch.bfloat16 if wanted == "bf16" else torch.float32
    if device.type == "cuda":
        return torch.bfloat16
    return torch.bfloat16 if multiplies_bfloat16() else torch.float32
