"""Initial values of a clone: principal components, channel selection (RED), published Gaussian, and the identity.

D teacher width, S student width. A norm of the student divides by the RMS of S numbers where the teacher's divides by
that of D, so both data-aware inits scale its gain by the ratio of the two, measured on the calibration rows.
"""
from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import torch
from torch import nn

from lrc_edge.roles import norm_before
from lrc_edge.train import lowrank
from lrc_edge.train.clone import Clone

CALIBRATION_ROWS = 16


def gaussian_values(clone: Clone, seed: int) -> dict[str, torch.Tensor]:
    """P ~ N(0, 0.02), norms 1: as published."""
    generator = torch.Generator().manual_seed(seed)
    return _values(clone, lambda: lowrank.gaussian(clone.teacher_width, clone.shape.hidden_size, generator),
                   lambda name: torch.ones(clone.shape.hidden_size))


def identity_values(clone: Clone) -> dict[str, torch.Tensor]:
    """P = I and the teacher's norms, for a student as wide as its teacher: it must be the teacher."""
    return _values(clone, lambda: lowrank.identity(clone.teacher_width),
                   lambda name: _gain(clone, name))


def selection_values(clone: Clone, rows: torch.Tensor) -> dict[str, torch.Tensor]:
    """P picks the residual channels that carry most on `rows` (B, L); norms keep the scale that the teacher's had.

    A channel's weight is its mean absolute value relative to the RMS of the stream, averaged over the places where a
    norm reads it (arXiv 2605.29327).
    """
    weight = torch.zeros(clone.teacher_width, device=rows.device)
    _visit_streams(clone, rows, lambda name, h: weight.add_(h.abs().mean(0)))
    channels = weight.topk(clone.shape.hidden_size).indices.sort().values
    rms = _rms_by_norm(clone, rows, lambda h: h[:, channels])
    channels = channels.cpu()
    p = lowrank.selection(channels, clone.teacher_width)
    return _values(clone, lambda: p, lambda name: _gain(clone, name)[channels] * rms[name])


def pca_values(clone: Clone, rows: torch.Tensor, turned: bool = True) -> dict[str, torch.Tensor]:
    """P spans the S principal components of the residual stream on `rows` (B, L): what the student loses is least.

    U (D x S) is a random basis of that span, not the components themselves: those differ in size by orders, so that a
    quantization block holds channels of unlike weight. Turned, 4 bits cost half the KL (docs/LOG.md); `turned` is off
    only to measure that. Whatever writes into the stream or reads it raw takes P = U. Whatever reads it through a
    norm takes P = diag(gain) U, and the student's own gain starts at 1. A tied head shares the embedding's U, so there
    the gain stays in the norm, as near to U^T diag(gain) U as a diagonal can be.
    """
    covariance = torch.zeros(clone.teacher_width, clone.teacher_width, device=rows.device)
    _visit_streams(clone, rows, lambda name, h: covariance.addmm_(h.T, h, alpha=1 / rows.numel()))
    width = clone.shape.hidden_size
    turn_SS = torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(0))).Q
    u_DS = torch.linalg.eigh(covariance.cpu()).eigenvectors[:, -width:]
    if turned:
        u_DS = u_DS @ turn_SS
    u_there = u_DS.to(rows.device)
    rms = _rms_by_norm(clone, rows, lambda h: h @ u_there)
    values: dict[str, torch.Tensor] = {}
    for weight in clone.weights:
        norm = norm_before(weight, clone.shape)
        if weight.role.kind == "norm":
            keeps_gain = weight.layer is None and clone.shape.tied
            gain = u_DS.square().T @ _gain(clone, weight.name) if keeps_gain else torch.ones(width)
            values[weight.name] = gain * rms[weight.name]
        elif norm is not None:
            values[weight.name] = _gain(clone, norm)[:, None] * u_DS
        elif weight.role.kind != "copy":
            values[weight.name] = u_DS
    return values


def _gain(clone: Clone, norm: str) -> torch.Tensor:
    return clone.teacher_weights[norm].detach().float().cpu()


def _values(clone: Clone, projection: Callable[[], torch.Tensor], norm: Callable[[str], torch.Tensor]
            ) -> dict[str, torch.Tensor]:
    return {weight.name: norm(weight.name) if weight.role.kind == "norm" else projection()
            for weight in clone.weights if weight.role.kind != "copy"}


def _rms_by_norm(clone: Clone, rows: torch.Tensor, student_of: Callable[[torch.Tensor], torch.Tensor]
                 ) -> dict[str, torch.Tensor]:
    """What the RMS of the student's stream, (L, S) made of the teacher's (L, D) at unit RMS, is in the mean before each
    norm."""
    rms: dict[str, torch.Tensor] = defaultdict(lambda: torch.zeros((), device=rows.device))
    _visit_streams(clone, rows, lambda name, h: rms[name].add_(student_of(h).square().mean(-1).sqrt().mean()))
    return {name: total.cpu() / len(rows) for name, total in rms.items()}


@torch.no_grad()
def _visit_streams(clone: Clone, rows: torch.Tensor, visit: Callable[[str, torch.Tensor], object]) -> None:
    """Show `visit` the residual stream where each norm of the teacher reads it, row by row: nothing of them is kept.

    It gets the norm's name and (L, D) float32 on the device, every position at unit RMS: no depth outweighs the others.
    """
    def visitor(name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        def show(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            h = inputs[0][0].float()
            visit(name, h / h.square().mean(-1, keepdim=True).sqrt())
        return show

    modules = dict(clone.teacher.named_modules())
    names = [w.name for w in clone.weights if w.role.kind == "norm"]
    handles = [modules[name.removesuffix(".weight")].register_forward_pre_hook(visitor(name)) for name in names]
    try:
        with clone.untapped() as teacher:
            for row in rows:
                teacher.model(input_ids=row[None], use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
