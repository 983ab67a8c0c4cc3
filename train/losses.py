"""Losses as pure functions. Shapes: N tokens, V vocabulary, D width."""
from __future__ import annotations

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

CHUNK_TOKENS = 2048  # tokens whose logits exist at one time


def mse(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Mean squared error in float32: one clone term."""
    return (student.float() - teacher.float()).square().mean()


def kl_divergence(student_NV: torch.Tensor, teacher_NV: torch.Tensor, temperature: float) -> torch.Tensor:
    """Sum over tokens of T^2 KL(teacher || student) in nats, both softened by T (Hinton et al., 2015)."""
    log_q = F.log_softmax(student_NV.float() / temperature, dim=-1)
    log_p = F.log_softmax(teacher_NV.float() / temperature, dim=-1)
    return F.kl_div(log_q, log_p, reduction="sum", log_target=True) * temperature**2


def head_losses(student_ND: torch.Tensor, student_head_VD: torch.Tensor, teacher_ND: torch.Tensor,
                teacher_head_VD: torch.Tensor, labels_N: torch.Tensor, temperature: float
                ) -> tuple[torch.Tensor, torch.Tensor]:
    """(cross entropy, KL), both means a token, heads included; label -100 is left out of the cross entropy.

    Goes chunk by chunk and recomputes in the backward pass: no N x V tensor outlives its chunk.
    """
    def chunk(student: torch.Tensor, head: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor
              ) -> tuple[torch.Tensor, torch.Tensor]:
        logits = F.linear(student, head)
        with torch.no_grad():
            target = F.linear(teacher, teacher_head_VD)
        lm = F.cross_entropy(logits.float(), labels, ignore_index=-100, reduction="sum")
        return lm, kl_divergence(logits, target, temperature)

    lm = kl = student_ND.new_zeros((), dtype=torch.float32)
    for s, t, y in zip(student_ND.split(CHUNK_TOKENS), teacher_ND.split(CHUNK_TOKENS), labels_N.split(CHUNK_TOKENS),
                       strict=True):
        part_lm, part_kl = checkpoint(chunk, s, student_head_VD, t, y, use_reentrant=False)
        lm, kl = lm + part_lm, kl + part_kl
    n_labels = (labels_N != -100).sum().clamp(min=1)
    return lm / n_labels, kl / len(labels_N)
