"""The importance matrix: mean squares of the inputs of each linear, collected in PyTorch for llama.cpp's quantizer.

It is the same quantity as in llama.cpp's llama-imatrix: one mean square per input channel. Only ratios within a matrix
matter. llama.cpp finds an entry by the tensor's own name, so a tied embedding, which has no
separate output.weight, gets the head's inputs under token_embd.weight.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from lrc_edge.checkpoint import DenseCheckpoint
from lrc_edge.console import QUIET, Listener
from lrc_edge.families import EMBEDDING, HEAD, Weight
from lrc_edge.machine import multiplies_bfloat16

FLOOR = 1e-6  # of the mean: a channel that never fired on this text may fire on another, and zeros make garbage
SILENT = 1e-20  # mean square of a linear that never fired; further down the quantizer's products leave float32's range

BATCH_TOKENS = 1024  # in one run of the model
PIECE = 1 << 18  # inputs that are squared at once
_SAME_INPUT = {"attn_k": "attn_q", "attn_v": "attn_q", "ffn_up": "ffn_gate"}  # role -> role with the same inputs


def measured_weights(checkpoint: DenseCheckpoint) -> Iterator[Weight]:
    """Return the matrices that have an importance: all except an untied embedding, whose input is an id."""
    for weight in checkpoint.weights():
        if len(weight.shape) == 2 and (weight.role is not EMBEDDING or checkpoint.shape.tied):
            yield weight


@torch.inference_mode()
def collect(checkpoint: DenseCheckpoint, rows_BL: np.ndarray, progress: Listener = QUIET,
            dtype: torch.dtype | None = None) -> dict[str, np.ndarray]:
    """Return weight name -> mean square of its inputs over all tokens of `rows_BL`, (in_features,) float32, above 0.

    For measured_weights(). A matrix whose inputs are all zero gets ones, as in llama.cpp: all channels count equally.
    `dtype`: the type to compute in; by default bfloat16 if the processor has instructions for it. Its rounding changed
    a mean by at most 1 % and not the measured quality of files (docs/LOG.md). The same rows give the same bits again.
    """
    if not rows_BL.size:
        raise ValueError(f"imatrix: rows {rows_BL.shape} hold no token")
    n_rows, row_len = rows_BL.shape
    progress.expect(rows_BL.size, "tokens")
    model = checkpoint.model(dtype or (torch.bfloat16 if multiplies_bfloat16() else torch.float32))
    weights = list(measured_weights(checkpoint))
    sums = {_input_of(weight): torch.zeros(weight.shape[1]) for weight in weights}

    def adding_to(sum_I: torch.Tensor) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda _, inputs: _add(sum_I, inputs[0])

    for weight in weights:
        if weight.layer is not None and _input_of(weight) == (weight.role.name, weight.layer):
            module = model.get_submodule(weight.module)
            module.register_forward_pre_hook(adding_to(sums[_input_of(weight)]))
    done = 0
    progress.update("", done)
    for ids_BL in torch.from_numpy(rows_BL.astype(np.int64)).split(max(1, BATCH_TOKENS // row_len)):
        # Without the head: of its product only the input is wanted.
        _add(sums[HEAD.name, None], model.base_model(input_ids=ids_BL, use_cache=False).last_hidden_state)
        done += len(ids_BL)
        progress.update(f"row {done} of {n_rows}", done * row_len)
    means = {key: _never_zero((sum_I / rows_BL.size).numpy()) for key, sum_I in sums.items()}
    return {weight.name: means[_input_of(weight)] for weight in weights}


def _input_of(weight: Weight) -> tuple[str, int | None]:
    """Return role and layer of the matrix that represents all matrices with the same inputs."""
    if weight.role is EMBEDDING:  # a tied one is the head
        return HEAD.name, None
    return _SAME_INPUT.get(weight.role.name, weight.role.name), weight.layer


def _add(sum_I: torch.Tensor, inputs: torch.Tensor) -> None:
    """Add the squares of (..., I) inputs to their sum in float32, in pieces that stay in the processor's cache."""
    for piece_NI in inputs.flatten(0, -2).split(max(1, PIECE // len(sum_I))):
        sum_I += piece_NI.float().square().sum(0)


def _never_zero(mean_I: np.ndarray) -> np.ndarray:
    level = mean_I.mean()
    return np.ones_like(mean_I) if level < SILENT else np.maximum(mean_I, FLOOR * level)


def check_importance(checkpoint: DenseCheckpoint, importance: Mapping[str, np.ndarray]) -> None:
    """Raise ValueError if the importance does not belong to this checkpoint's matrices."""
    shapes = {weight.name: weight.shape[1:] for weight in measured_weights(checkpoint)}
    found = {name: values.shape for name, values in importance.items()}
    if wrong := sorted(name for name in shapes.keys() | found.keys() if shapes.get(name) != found.get(name)):
        raise ValueError(f"imatrix: {wrong[0]} is {found.get(wrong[0])}, the checkpoint has {shapes.get(wrong[0])} "
                         f"({len(wrong)} such entries)")
