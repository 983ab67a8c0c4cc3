"""Initial values of a clone: published Gaussian, channel selection (RED), and the identity that proves the algebra."""
from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn

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
                   lambda name: clone.teacher_weights[name].detach().float())


def selection_values(clone: Clone, rows: torch.Tensor) -> dict[str, torch.Tensor]:
    """P picks the residual channels that carry most on `rows` (B, L); norms keep the scale that the teacher's had.

    A channel's weight is its mean absolute value relative to the RMS of the stream, averaged over the places where a
    norm reads it. A student norm divides by the RMS of the picked channels alone, so its gain is scaled by their ratio.
    """
    streams = _norm_inputs(clone, rows)
    weight = sum((h / h.square().mean(-1, keepdim=True).sqrt()).abs().mean((0, 1)) for h in streams.values())
    channels = torch.as_tensor(weight).topk(clone.shape.hidden_size).indices.sort().values

    def norm_gain(name: str) -> torch.Tensor:
        h = streams[name]
        ratio = h[..., channels].square().mean(-1).sqrt() / h.square().mean(-1).sqrt()
        return clone.teacher_weights[name].detach().float().cpu()[channels] * ratio.mean()

    p = lowrank.selection(channels, clone.teacher_width)
    return _values(clone, lambda: p, norm_gain)


def _values(clone: Clone, projection: Callable[[], torch.Tensor], norm: Callable[[str], torch.Tensor]
            ) -> dict[str, torch.Tensor]:
    return {weight.name: norm(weight.name) if weight.role.kind == "norm" else projection()
            for weight in clone.weights if weight.role.kind != "copy"}


@torch.no_grad()
def _norm_inputs(clone: Clone, rows: torch.Tensor) -> dict[str, torch.Tensor]:
    """The residual stream where each norm of the teacher reads it: (B, L, teacher width), float32 on the CPU."""
    streams: dict[str, torch.Tensor] = {}

    def keeper(name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        def keep(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            streams[name] = inputs[0].float().cpu()
        return keep

    modules = dict(clone.teacher.named_modules())
    names: Iterable[str] = [w.name for w in clone.weights if w.role.kind == "norm"]
    handles = [modules[name.removesuffix(".weight")].register_forward_pre_hook(keeper(name)) for name in names]
    try:
        clone.teacher.model(input_ids=rows, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return streams
