"""Initial values of a clone: principal components, channel selection (RED), published Gaussian, and the identity.

D teacher width, S student width. A norm of the student divides by the RMS of S numbers, a norm of the teacher
by the RMS of D numbers. So `pca` and `selection` scale the norm's gain by the ratio of the two, measured on the
calibration rows.
"""
from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import torch
from torch import nn

from lrc_edge.families import FINAL_NORM, Weight, norm_before, weights_of
from lrc_edge.train import lowrank
from lrc_edge.train.clone import Clone

CALIBRATION_ROWS = 16


def gaussian_values(clone: Clone, seed: int) -> dict[str, torch.Tensor]:
    """Return P ~ N(0, 0.02) and norms 1, as published."""
    generator = torch.Generator().manual_seed(seed)
    width, student_width = _widths(clone)
    return _values(clone, lambda _: lowrank.gaussian(width, student_width, generator),
                   lambda name: torch.ones(student_width))


def identity_values(clone: Clone) -> dict[str, torch.Tensor]:
    """Return P = I and the teacher's norms, for a student as wide as its teacher, which must equal the teacher."""
    return _values(clone, lambda _: lowrank.identity(_widths(clone)[0]), lambda name: _gain(clone, name))


def selection_values(clone: Clone, rows: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return P that selects the strongest residual channels on `rows` (B, L), and norms of the teacher's scale.

    A channel's strength is its mean absolute value relative to the RMS of the stream, averaged over the places where a
    norm reads it (arXiv 2605.29327).
    """
    width, student_width = _widths(clone)
    strength = torch.zeros(width, device=rows.device)
    _visit_streams(clone, rows, lambda name, h: strength.add_(h.abs().mean(0)))
    channels = strength.topk(student_width).indices.sort().values
    rms = _rms_by_norm(clone, rows, lambda h: h[:, channels])
    channels = channels.cpu()
    p = lowrank.selection(channels, width)
    return _values(clone, lambda _: p, lambda name: _gain(clone, name)[channels] * rms[name])


def pca_values(clone: Clone, rows: torch.Tensor, turned: bool = True) -> dict[str, torch.Tensor]:
    """Return P that spans the first S principal components of the residual stream on `rows` (B, L).

    U (D x S) is a random basis of that span. The components themselves differ in size by orders of magnitude, so a
    quantization block would mix large and small channels: rotated randomly (`turned`), 4 bits cost half the KL
    (docs/LOG.md). `turned` is off only to measure that. Matrices that write into the stream, and the embedding, get
    P = U. Matrices that read it through a norm get P = diag(gain) U, and the student's own gain starts at 1. A tied
    head shares the embedding's U, so the gain stays in its norm: the diagonal of U^T diag(gain) U.
    """
    teacher_width, width = _widths(clone)
    covariance = torch.zeros(teacher_width, teacher_width, device=rows.device)
    _visit_streams(clone, rows, lambda name, h: covariance.addmm_(h.T, h, alpha=1 / rows.numel()))
    turn_SS = torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(0))).Q
    u_DS = torch.linalg.eigh(covariance.cpu()).eigenvectors[:, -width:]
    if turned:
        u_DS = u_DS @ turn_SS
    u_on_device = u_DS.to(rows.device)
    rms = _rms_by_norm(clone, rows, lambda h: h @ u_on_device)

    def projection(weight: Weight) -> torch.Tensor:
        norm = norm_before(weight, clone.lineage.student)
        return u_DS if norm is None else _gain(clone, norm)[:, None] * u_DS

    def gain(name: str) -> torch.Tensor:
        keeps_gain = name == FINAL_NORM.weight and clone.lineage.student.tied
        return (u_DS.square().T @ _gain(clone, name) if keeps_gain else torch.ones(width)) * rms[name]

    return _values(clone, projection, gain)


# train.init -> initial values from calibration rows and the seed.
INITS: dict[str, Callable[[Clone, torch.Tensor, int], dict[str, torch.Tensor]]] = {
    "pca": lambda clone, rows, seed: pca_values(clone, rows),
    "selection": lambda clone, rows, seed: selection_values(clone, rows),
    "gaussian": lambda clone, rows, seed: gaussian_values(clone, seed),
}


def _widths(clone: Clone) -> tuple[int, int]:
    """The residual widths (D, S)."""
    return clone.lineage.teacher.hidden_size, clone.lineage.student.hidden_size


def _gain(clone: Clone, norm: str) -> torch.Tensor:
    return clone.teacher_weights[norm].detach().float().cpu()


def _values(clone: Clone, projection: Callable[[Weight], torch.Tensor], gain: Callable[[str], torch.Tensor]
            ) -> dict[str, torch.Tensor]:
    """Return, by weight name, the projection of each composed matrix and the gain of each norm."""
    return {weight.name: gain(weight.name) if weight.role.is_norm else projection(weight)
            for weight in clone.weights if not weight.role.is_inner}


def _rms_by_norm(clone: Clone, rows: torch.Tensor, student_of: Callable[[torch.Tensor], torch.Tensor]
                 ) -> dict[str, torch.Tensor]:
    """Return, by norm, the mean RMS of its input in the student (L, S) if the teacher's (L, D) has unit RMS."""
    rms: dict[str, torch.Tensor] = defaultdict(lambda: torch.zeros((), device=rows.device))
    _visit_streams(clone, rows, lambda name, h: rms[name].add_(student_of(h).square().mean(-1).sqrt().mean()))
    return {name: total.cpu() / len(rows) for name, total in rms.items()}


@torch.no_grad()
def _visit_streams(clone: Clone, rows: torch.Tensor, visit: Callable[[str, torch.Tensor], object]) -> None:
    """Call `visit` with the residual stream that each norm of the teacher reads, row by row. Nothing is kept.

    Its arguments are the norm's name and (L, D) float32 on the device, every position at unit RMS, so that all depths
    count alike.
    """
    def visitor(name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        def show(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            h = inputs[0][0].float()
            visit(name, h / h.square().mean(-1, keepdim=True).sqrt())
        return show

    handles = [clone.teacher.get_submodule(weight.module).register_forward_pre_hook(visitor(weight.name))
               for weight in weights_of(clone.lineage.teacher) if weight.role.is_norm]
    try:
        for row in rows:
            clone.teacher.base_model(input_ids=row[None], use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
