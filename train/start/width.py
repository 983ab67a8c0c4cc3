"""The residual stream of the student: the projections of all matrices, and the gains of its norms.

D teacher width, S student width. A norm of the student divides by the RMS of S numbers, a norm of the teacher by the
RMS of D numbers. So the gains of norms are scaled by the ratio of the two, measured on the calibration rows.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from lrc_edge.families import FINAL_NORM, Role
from lrc_edge.lineage import Lineage
from lrc_edge.train import lowrank
from lrc_edge.train.start.statistics import Statistics


class Width(Protocol):
    """How a start sets projections and norms. is_linear: the student's stream is a linear image of the teacher's."""

    is_linear: bool

    def stream(self, stream: torch.Tensor) -> torch.Tensor:
        """Return the student's image (..., S) of the teacher's stream (..., D)."""

    def projection(self, gain_D: torch.Tensor | None) -> torch.Tensor:
        """Return P (D, S) of a matrix. gain_D: of the teacher's norm that it reads; None if it reads none."""

    def gain(self, role: Role, gain_D: torch.Tensor, rms: torch.Tensor) -> torch.Tensor:
        """Return the gain (S,) of a norm. rms: of its input, where the teacher's has unit RMS."""


class Basis:
    """The student's stream is the teacher's times one matrix.

    folds_gains: a matrix that reads the stream through a norm takes over the norm's gain, and the student's gain starts
    at 1. A tied head shares the embedding's projection, so the final norm keeps its gain: the diagonal of U^T g U.
    """

    is_linear = True

    def __init__(self, u_DS: torch.Tensor, folds_gains: bool, tied: bool):
        self.u_DS, self.folds_gains, self.tied = u_DS, folds_gains, tied

    def stream(self, stream: torch.Tensor) -> torch.Tensor:
        return stream @ self.u_DS.to(stream.device)

    def projection(self, gain_D: torch.Tensor | None) -> torch.Tensor:
        return self.u_DS if gain_D is None or not self.folds_gains else gain_D[:, None] * self.u_DS

    def gain(self, role: Role, gain_D: torch.Tensor, rms: torch.Tensor) -> torch.Tensor:
        keeps_gain = not self.folds_gains or (self.tied and role is FINAL_NORM)
        return (self.u_DS.square().T @ gain_D if keeps_gain else torch.ones(self.u_DS.shape[1])) * rms


class Gaussian:
    """As published: every P is random, and gains are 1 (arXiv 2505.12781)."""

    is_linear = False

    def __init__(self, width: int, student_width: int, seed: int):
        self.widths, self.generator = (width, student_width), torch.Generator().manual_seed(seed)

    def stream(self, stream: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError("the streams are not related")

    def projection(self, gain_D: torch.Tensor | None) -> torch.Tensor:
        return lowrank.gaussian(*self.widths, self.generator)

    def gain(self, role: Role, gain_D: torch.Tensor, rms: torch.Tensor) -> torch.Tensor:
        return torch.ones(self.widths[1])


def principal_components(statistics: Statistics, lineage: Lineage, seed: int = 0, turned: bool = True) -> Width:
    """Return the first S principal components of the residual stream (as in SliceGPT, arXiv 2401.15024).

    The components themselves differ in size by orders of magnitude, so a quantization block would mix large and small
    channels: rotated randomly (`turned`), 4 bits cost half the KL (docs/LOG.md). `turned` is off only to measure that.
    A student as wide as its teacher keeps the teacher's coordinates.
    """
    teacher_width, width, tied = lineage.teacher.hidden_size, lineage.student.hidden_size, lineage.student.tied
    if width == teacher_width:
        return Basis(lowrank.identity(width), folds_gains=False, tied=tied)
    u_DS = torch.linalg.eigh(statistics.stream_DD).eigenvectors[:, -width:]
    turn_SS = torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(0))).Q
    return Basis(u_DS @ turn_SS if turned else u_DS, folds_gains=True, tied=tied)


def strongest_channels(statistics: Statistics, lineage: Lineage, seed: int = 0) -> Width:
    """Return the residual channels with the largest mean absolute value (RED, arXiv 2605.29327)."""
    channels_S = statistics.stream_abs_D.topk(lineage.student.hidden_size).indices.sort().values
    return Basis(lowrank.selection(channels_S, lineage.teacher.hidden_size), folds_gains=False,
                 tied=lineage.student.tied)


def gaussian(statistics: Statistics, lineage: Lineage, seed: int = 0) -> Width:
    return Gaussian(lineage.teacher.hidden_size, lineage.student.hidden_size, seed)


# train.init -> the width from statistics, lineage and seed.
INITS: dict[str, Callable[[Statistics, Lineage, int], Width]] = {
    "pca": principal_components, "selection": strongest_channels, "gaussian": gaussian}
