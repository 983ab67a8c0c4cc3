"""The importance matrix: how strongly each input of each linear fires, collected in PyTorch for llama.cpp's quantizer.

Same quantity as llama.cpp's llama-imatrix: the mean square of a linear's inputs, one number an input channel.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from lrc_edge.checkpoint import DenseCheckpoint
from lrc_edge.roles import EMBEDDING, HEAD

FLOOR = 1e-6  # of the mean: a channel that never fired on this text may fire on another


@torch.inference_mode()
def collect(checkpoint: DenseCheckpoint, rows_BL: np.ndarray, progress: Callable[[str], None] | None = None
            ) -> dict[str, np.ndarray]:
    """Weight name -> mean square of its inputs over all tokens of `rows_BL`, (in_features,) float32, above 0.

    Every matrix but an untied embedding, whose input is no vector. A tied embedding is listed with the head's inputs.
    """
    model = checkpoint.model()
    squares: dict[str, torch.Tensor] = {}

    def keeper(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def keep(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            total = inputs[0].float().square().flatten(0, -2).sum(0)
            squares[name] = squares.get(name, torch.zeros(())) + total
        return keep

    for weight in checkpoint.weights():
        if len(weight.shape) == 2 and weight.role is not EMBEDDING:
            model.get_submodule(weight.name.removesuffix(".weight")).register_forward_pre_hook(keeper(weight.name))
    if checkpoint.shape.tied:
        model.get_submodule(HEAD.weight.removesuffix(".weight")).register_forward_pre_hook(keeper(EMBEDDING.weight))
    for number, row in enumerate(rows_BL, 1):
        model(input_ids=torch.from_numpy(row)[None], use_cache=False)
        if progress:
            progress(f"row {number} of {len(rows_BL)}")
    means = {name: (total / rows_BL.size).numpy().astype(np.float32) for name, total in squares.items()}
    return {name: np.maximum(mean, FLOOR * mean.mean() + np.finfo(np.float32).tiny) for name, mean in means.items()}
