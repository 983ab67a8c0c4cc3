"""The quantization grids of llama.cpp's Q4_0 and Q8_0 in torch: the value that a weight has in the exported file.

Blocks of 32 along a row share a scale d, stored as float16: w = d (level - 8) with 16 levels, or w = d level with 255.
These are ggml's reference quantizers (quantize_row_q4_0_ref, quantize_row_q8_0_ref), bit for bit. In both, the scale
comes from the block's largest value, which becomes the last level of the grid. So llama.cpp
quantizes weights that are already on the grid to the same blocks, and the file holds the trained levels.
"""
from __future__ import annotations

import torch

from lrc_edge.families import EMBEDDING, HEAD, Weight

BLOCK = 32


def on_q4_0(weight: torch.Tensor) -> torch.Tensor:
    """(..., I) float32 -> the same shape, on the grid; I a multiple of 32."""
    blocks = weight.unflatten(-1, (-1, BLOCK))
    largest = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))  # with its sign: it becomes level 0
    scale = largest / -8
    levels = (blocks * _inverse(scale) + 8.5).trunc().clamp(0, 15)
    return (_stored(scale) * (levels - 8)).flatten(-2)


def on_q8_0(weight: torch.Tensor) -> torch.Tensor:
    """(..., I) float32 -> the same shape, on the grid; I a multiple of 32."""
    blocks = weight.unflatten(-1, (-1, BLOCK))
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    ratio = blocks * _inverse(scale)
    levels = (ratio.abs() + 0.5).floor().copysign(ratio)  # C's roundf: halves go away from zero
    return (_stored(scale) * levels).flatten(-2)


def _inverse(scale: torch.Tensor) -> torch.Tensor:
    return torch.where(scale == 0, 0.0, 1 / scale)


def _stored(scale: torch.Tensor) -> torch.Tensor:
    return scale.half().float()


def on_grid(weight: Weight, values: torch.Tensor) -> torch.Tensor:
    """Round a matrix to its values in the Q4_0 files: linears to Q4_0, embedding and LM head to Q8_0."""
    return on_q8_0(values) if weight.role in (EMBEDDING, HEAD) else on_q4_0(values)
