"""Projections: initial values, and the gradient derived from that of a composed weight.

Shapes: T teacher width, S student width, O out, I in. P_TS is a projection; a composed weight is W_OT P_TS or
P_TS^T W_TI (lrc_edge.lineage.compose).
"""
from __future__ import annotations

import torch
from torch.distributed.tensor import DTensor

from lrc_edge.families import Role

GAUSSIAN_STD = 0.02  # arXiv 2505.12781, appendix: every P ~ N(0, 0.02)


def gaussian(teacher_width: int, student_width: int, generator: torch.Generator) -> torch.Tensor:
    """Return a random P_TS, as published."""
    return torch.randn(teacher_width, student_width, generator=generator) * GAUSSIAN_STD


def selection(channels_S: torch.Tensor, teacher_width: int) -> torch.Tensor:
    """Return P_TS that selects the given residual channels: ones at (channels[s], s). RED, arXiv 2605.29327."""
    p_TS = torch.zeros(teacher_width, len(channels_S))
    p_TS[channels_S, torch.arange(len(channels_S))] = 1.0
    return p_TS


def identity(width: int) -> torch.Tensor:
    return torch.eye(width)


def pull_back(role: Role, teacher: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """Return dL/dP_TS from the gradient of the composed weight. `teacher`: its W after the block maps.

    W = W_OT P_TS gives W_OT^T dW_OS; W = P_TS^T W_TI gives W_TI dW_SI^T.
    """
    return teacher @ grad.T if role.writes_stream else teacher.T @ grad


def placed_as(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Redistribute a product of shards as `like` is, if parameters are sharded; else return the tensor."""
    if isinstance(tensor, DTensor) and isinstance(like, DTensor):
        return tensor.redistribute(placements=like.placements)
    return tensor


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Return this process's rows of a sharded tensor; else the tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
