"""The loss of a student and its KL from the teacher, from their residual streams on calibration rows.

Shapes: B rows, L positions.
"""
from __future__ import annotations

from pathlib import Path

import torch
from torch.nn import functional as F

from lrc_edge.families import EMBEDDING
from lrc_edge.train.start.layers import Layers
from lrc_edge.train.start.streams import Streams

LOGIT_TOKENS = 512  # tokens whose logits exist at one time


def losses(teacher: Layers, student: Layers, rows_BL: torch.Tensor, streams: Streams) -> tuple[float, float]:
    """Return the student's loss and its KL from the teacher, in nats per token. `streams`: "teacher" and "student"
    hold the residual streams after the last layers."""
    heads = [model.head() for model in (teacher, student)]
    loss = kl = 0.0
    for part in streams.parts():
        next_ids = rows_BL[part][:, 1:].flatten().to(teacher.device)
        flat = [streams.get(name, part)[:, :-1].flatten(0, 1) for name in ("teacher", "student")]
        for ids, *pair in zip(*(x.split(LOGIT_TOKENS) for x in (next_ids, *flat)), strict=True):
            log_p, log_q = (F.log_softmax(head(stream), -1) for head, stream in zip(heads, pair, strict=True))
            loss += F.nll_loss(log_q, ids, reduction="sum").item()
            kl += F.kl_div(log_q, log_p, reduction="sum", log_target=True).item()
    n_predictions = rows_BL[:, 1:].numel()
    return loss / n_predictions, kl / n_predictions


@torch.no_grad()
def losses_of(teacher: Layers, student: Layers, rows_BL: torch.Tensor, folder: Path) -> tuple[float, float]:
    """Return the student's loss and its KL from the teacher. `folder`: for temporary files."""
    streams = Streams(folder, rows_BL.shape, teacher.device)
    for name, model in (("teacher", teacher), ("student", student)):
        _read_through(model, rows_BL, streams, name)
    return losses(teacher, student, rows_BL, streams)


def _read_through(model: Layers, rows_BL: torch.Tensor, streams: Streams, name: str) -> None:
    """Put the residual stream of `model` after its last layer under this name."""
    table_VD, masks = model.outside(EMBEDDING), model.masks(rows_BL)
    for part in streams.parts():
        streams.put(name, part, table_VD[rows_BL[part].to(model.device)])
    for layer in range(model.shape.num_hidden_layers):
        model.load(layer)
        for part in streams.parts():
            streams.put(name, part, model.run(streams.get(name, part), masks[layer]))
