"""Measure how much each quantized type degrades each matrix: the KL divergence from the unquantized model.

One matrix at a time is quantized to Q4_0, and the model runs in PyTorch on a few calibration rows. The divergence grows
with the square of the error in the matrix's outputs (how closely: docs/LOG.md), so the other types follow from their
errors on the same inputs, without further runs of the model.
"""
from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, quants
from torch import nn

from lrc_edge.checkpoint import DenseCheckpoint
from lrc_edge.console import QUIET, Listener
from lrc_edge.export.quantize.encodings import quantize_matrix
from lrc_edge.export.quantize.mixed_precision import candidates
from lrc_edge.families import EMBEDDING, HEAD, Weight, parts_of

PROBE = GGMLQuantizationType.Q4_0  # its error has the size that matters, and it fits every row of blocks of 32
SAMPLE = (2, 128)  # calibration rows, and tokens of each, that the model runs on; more change little (docs/LOG.md)
ERROR_ROWS = 256  # rows of a matrix on which types are compared


@torch.inference_mode()
def measure(checkpoint: DenseCheckpoint, rows_BL: np.ndarray, importance: Mapping[str, np.ndarray],
            progress: Listener = QUIET) -> dict[str, dict[str, float]]:
    """Return weight name -> type -> KL(model || model with this matrix in this type).

    The KL is the mean on `rows_BL`, in nats per token. It covers every matrix and its candidates().
    importance: of imatrix.collect, as for the quantizer. The model runs in float32, because bfloat16's rounding changes
    the outputs more than quantizing most single matrices does. `progress` counts layers that have run.
    """
    progress.expect(sum(_work(checkpoint, weight) for weight in _matrices(checkpoint)), "layers")
    sample = _Sample(checkpoint, rows_BL)
    costs: dict[str, dict[str, float]] = {}
    done = 0
    for weight in _matrices(checkpoint):
        progress.update(weight.name, done)
        types = candidates(weight.shape[1])
        if types == (GGMLQuantizationType.F16,):  # no choice
            costs[weight.name] = {"F16": 0.0}
        else:
            errors = _errors(checkpoint, weight, (PROBE, *types), importance.get(weight.name), sample)
            kl = sample.kl_with(weight, _quantized(checkpoint.tensor(weight.name), PROBE, importance.get(weight.name)))
            ratio = kl / errors[PROBE] if errors[PROBE] else 0.0
            costs[weight.name] = {type.name: ratio * errors[type] for type in types}
        done += _work(checkpoint, weight)
    return costs


def _matrices(checkpoint: DenseCheckpoint) -> Iterable[Weight]:
    return (weight for weight in checkpoint.weights() if len(weight.shape) > 1)


def _first_layer(checkpoint: DenseCheckpoint, weight: Weight) -> int:
    """Return the first layer that a change of the weight affects; the number of layers for the LM head."""
    if weight.layer is not None:
        return weight.layer
    return 0 if weight.role is EMBEDDING else checkpoint.shape.num_hidden_layers


def _work(checkpoint: DenseCheckpoint, weight: Weight) -> int:
    """Return the number of layers to run when the weight changes, counting the LM head."""
    return 1 + checkpoint.shape.num_hidden_layers - _first_layer(checkpoint, weight)


class _Sample:
    """The model on a few rows. The inputs of each layer are kept, so a change there runs only the layers after it."""

    def __init__(self, checkpoint: DenseCheckpoint, rows_BL: np.ndarray):
        self.checkpoint, self.model = checkpoint, checkpoint.model()
        self.parts = parts_of(self.model)
        self.ids_BL = torch.from_numpy(rows_BL.astype(np.int64))
        self._entering: list[torch.Tensor] = []
        self._arguments: list[dict[str, Any]] = []  # of each layer's call: positions, mask

        def keep(module: nn.Module, inputs: tuple[Any, ...], arguments: dict[str, Any]) -> None:
            self._entering.append(inputs[0])
            self._arguments.append(arguments)

        hooks = [layer.register_forward_pre_hook(keep, with_kwargs=True) for layer in self.parts.layers]
        self._log_p_BLV = self.model(input_ids=self.ids_BL, use_cache=False).logits.log_softmax(-1)
        for hook in hooks:
            hook.remove()
        self._entering.append(self._run(self._entering[-1], len(self._entering) - 1))

    def _run(self, hidden_BLD: torch.Tensor, first_layer: int) -> torch.Tensor:
        """Map the inputs of `first_layer` to the outputs of the last layer."""
        for layer, arguments in zip(self.parts.layers[first_layer:], self._arguments[first_layer:], strict=True):
            out = layer(hidden_BLD, **arguments)
            hidden_BLD = out[0] if isinstance(out, tuple) else out  # a tuple in older transformers
        return hidden_BLD

    def kl_with(self, weight: Weight, changed_OI: torch.Tensor) -> float:
        """Return the mean KL(model || model whose `weight` is changed_OI), in nats per token."""
        parameter = self.model.get_parameter(weight.name)
        original_OI = parameter.data.clone()
        parameter.data.copy_(changed_OI)
        try:
            first = _first_layer(self.checkpoint, weight)
            embedded = self.parts.embedding(self.ids_BL) if weight.role is EMBEDDING else self._entering[first]
            hidden_BLD = self.parts.norm(self._run(embedded, first))
            total = 0.0
            for log_p_LV, hidden_LD in zip(self._log_p_BLV, hidden_BLD, strict=True):  # row by row: less memory
                log_q_LV = self.parts.head(hidden_LD).log_softmax(-1)
                total += float((log_p_LV.exp() * (log_p_LV - log_q_LV)).sum(-1, dtype=torch.float64).mean())
            return max(0.0, total / len(self.ids_BL))
        finally:
            parameter.data.copy_(original_OI)

    def inputs_of(self, weight: Weight) -> torch.Tensor | None:
        """Return the inputs of the matrix, (N, I); None for an embedding that is not also the LM head."""
        if weight.role is EMBEDDING and not self.checkpoint.shape.tied:
            return None
        if weight.role in (EMBEDDING, HEAD):
            return self.parts.norm(self._entering[-1]).flatten(0, -2)
        seen: list[torch.Tensor] = []
        module = self.model.get_submodule(weight.module)
        hook = module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].flatten(0, -2)))
        layer = _first_layer(self.checkpoint, weight)
        self.parts.layers[layer](self._entering[layer], **self._arguments[layer])
        hook.remove()
        return seen[0]


def _errors(checkpoint: DenseCheckpoint, weight: Weight, types: Iterable[GGMLQuantizationType],
            importance_I: np.ndarray | None, sample: _Sample) -> dict[GGMLQuantizationType, float]:
    """Return type -> squared error of the matrix's outputs on the sample, over at most ERROR_ROWS of them."""
    inputs_NI = sample.inputs_of(weight)
    if inputs_NI is None:
        rows = sample.ids_BL.unique()
    else:
        rows = torch.linspace(0, weight.shape[0] - 1, min(weight.shape[0], ERROR_ROWS)).long()
    weight_RI = checkpoint.tensor(weight.name)[rows].float()
    errors = {}
    for type in types:
        error_RI = _quantized(weight_RI, type, importance_I) - weight_RI
        outputs = error_RI if inputs_NI is None else inputs_NI @ error_RI.T
        errors[type] = float(outputs.square().sum(dtype=torch.float64))
    return errors


def _quantized(weight_OI: torch.Tensor, type: GGMLQuantizationType, importance_I: np.ndarray | None) -> torch.Tensor:
    """Return the matrix as a runtime decodes it from this type."""
    return torch.from_numpy(quants.dequantize(quantize_matrix(weight_OI.float().numpy(), type, importance_I), type))
