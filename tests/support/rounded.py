"""A checkpoint's PyTorch model with its matrices rounded to an ONNX precision by the gguf package."""
from __future__ import annotations

import numpy as np
import torch
from gguf import GGMLQuantizationType, quants
from transformers import PreTrainedModel

from lrc_edge.checkpoint import DenseCheckpoint
from lrc_edge.families import Weight

Q4_0, Q8_0 = GGMLQuantizationType.Q4_0, GGMLQuantizationType.Q8_0


def grid_of(weight: Weight, encoding: str) -> GGMLQuantizationType:
    return Q8_0 if encoding == "q8" or weight.role.name in ("token_embd", "output") else Q4_0


def rounded(weight: np.ndarray, grid: GGMLQuantizationType) -> np.ndarray:
    """What gguf reads back from its own blocks of each row, padded with zeros to whole blocks."""
    padded = np.pad(weight, ((0, 0), (0, -weight.shape[1] % 32)))
    return quants.dequantize(quants.quantize(padded, grid), grid)[:, :weight.shape[1]]


@torch.no_grad()
def rounded_model(checkpoint: DenseCheckpoint, encoding: str) -> PreTrainedModel:
    """`encoding`: fp32 and fp16 leave every weight as it is, q8 and q4 round the matrices."""
    model = checkpoint.model()
    for weight in checkpoint.weights():
        parameter = model.get_parameter(weight.name)
        if encoding in ("q8", "q4") and parameter.ndim == 2:
            parameter.copy_(torch.from_numpy(rounded(parameter.numpy(), grid_of(weight, encoding))))
    return model
