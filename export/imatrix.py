"""The importance matrix: how strongly each input of each linear fires, collected in PyTorch for llama.cpp's quantizer.

Same quantity as llama.cpp's llama-imatrix: the mean square of a linear's inputs, one number an input channel. Only
ratios within a matrix matter. llama.cpp finds an entry by the tensor's own name, so a tied embedding, which has no
output.weight beside it, takes the head's inputs as token_embd.weight.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from lrc_edge.checkpoint import DenseCheckpoint
from lrc_edge.roles import EMBEDDING, HEAD, Weight

FLOOR = 1e-6  # of the mean: a channel that never fired on this text may fire on another, and zeros make garbage
SILENT = 1e-20  # mean square of a linear that never fired; further down the quantizer's products leave float32's range


def measured_weights(checkpoint: DenseCheckpoint) -> Iterator[Weight]:
    """The matrices that have an importance: all but an untied embedding, whose input is no vector."""
    for weight in checkpoint.weights():
        if len(weight.shape) == 2 and (weight.role is not EMBEDDING or checkpoint.shape.tied):
            yield weight


@torch.inference_mode()
def collect(checkpoint: DenseCheckpoint, rows_BL: np.ndarray, progress: Callable[[str], None] | None = None
            ) -> dict[str, np.ndarray]:
    """Weight name -> mean square of its inputs over all tokens of `rows_BL`, (in_features,) float32, above 0.

    For measured_weights(). A matrix whose inputs are all silent gets ones, as in llama.cpp: every channel counts alike.
    """
    if not rows_BL.size:
        raise ValueError(f"imatrix: rows {rows_BL.shape} hold no token")
    model = checkpoint.model()
    squares: dict[str, torch.Tensor] = {}

    def keeper(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def keep(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            total = inputs[0].float().square().flatten(0, -2).sum(0)
            squares[name] = squares.get(name, torch.zeros(())) + total
        return keep

    for weight in measured_weights(checkpoint):
        user = HEAD.weight if weight.role is EMBEDDING else weight.name
        model.get_submodule(user.removesuffix(".weight")).register_forward_pre_hook(keeper(weight.name))
    for number, row in enumerate(rows_BL, 1):
        model(input_ids=torch.tensor(row.astype(np.int64))[None], use_cache=False)
        if progress:
            progress(f"row {number} of {len(rows_BL)}")
    return {name: _never_zero((total / rows_BL.size).numpy().astype(np.float32)) for name, total in squares.items()}


def _never_zero(mean_I: np.ndarray) -> np.ndarray:
    level = mean_I.mean()
    return np.ones_like(mean_I) if level < SILENT else np.maximum(mean_I, FLOOR * level)


def check_importance(checkpoint: DenseCheckpoint, importance: Mapping[str, np.ndarray]) -> None:
    """Raise ValueError when the importance is not the one of this checkpoint's matrices."""
    shapes = {weight.name: weight.shape[1:] for weight in measured_weights(checkpoint)}
    found = {name: values.shape for name, values in importance.items()}
    if wrong := sorted(name for name in shapes.keys() | found.keys() if shapes.get(name) != found.get(name)):
        raise ValueError(f"imatrix: {wrong[0]} is {found.get(wrong[0])}, the checkpoint has {shapes.get(wrong[0])} "
                         f"({len(wrong)} such entries)")
