"""Losses as pure functions. Shapes: N tokens, V vocabulary, D width."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

CHUNK_TOKENS = 2048  # tokens whose logits exist at one time
NO_LABEL = -100


@dataclass(frozen=True)
class Objective:
    """Loss = lm * LM + kl * KL at `temperature` + alpha * clone (arXiv 2505.12781, section 3.2)."""

    lm: float = 1.0
    kl: float = 1.0
    alpha: float = 0.2
    temperature: float = 1.0
    relative: bool = True  # clone terms are errors relative to the teacher's activations, not absolute

    @property
    def needs_teacher(self) -> bool:
        return self.kl != 0 or self.alpha != 0


def clone_term(student: torch.Tensor, teacher: torch.Tensor, relative: bool) -> torch.Tensor:
    """Mean over rows of the mean squared error of an activation (rows, ...), summed in float32; `relative`: of each
    row's over the teacher's mean square there, so that a row counts the same whatever rows it is computed with.

    What is kept for the backward pass is the difference in the type of its operands, not a float32 copy of it.
    """
    errors = _squares_of_rows(student - teacher)
    if not relative:
        return errors.sum() / student.numel()
    return (errors / _squares_of_rows(teacher.detach())).mean()


def _squares_of_rows(x: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(x.flatten(1), dim=1, dtype=torch.float32).square()


def token_losses(student_NV: torch.Tensor, teacher_NV: torch.Tensor | None, labels_N: torch.Tensor,
                 objective: Objective) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(cross entropy, KL, gradient): sums over the tokens that have a label, in nats, from float32 logits.

    KL is T^2 KL(teacher || student), both softened by T (Hinton et al., 2015). The gradient (N, V) is of
    lm * cross entropy + kl * KL to the student's logits, in closed form: q - onehot, and T (q_T - p_T).
    """
    mask_N1 = (labels_N != NO_LABEL)[:, None]
    label_N1 = labels_N.clamp(min=0)[:, None]
    log_q = F.log_softmax(student_NV, dim=-1)
    lm = -(log_q.gather(1, label_N1) * mask_N1).sum()
    grad = log_q.exp() * objective.lm
    grad.scatter_add_(1, label_N1, torch.full_like(label_N1, -objective.lm, dtype=grad.dtype))
    kl = torch.zeros_like(lm)
    if teacher_NV is not None:
        t = objective.temperature
        if t != 1.0:
            log_q = F.log_softmax(student_NV / t, dim=-1)
        log_p = F.log_softmax(teacher_NV / t, dim=-1)
        p = log_p.exp()
        kl = ((p * (log_p - log_q)).sum(1, keepdim=True) * mask_N1).sum() * t**2
        grad += (log_q.exp() - p) * (t * objective.kl)
    return lm, kl, grad * mask_N1


TokenLosses = Callable[[torch.Tensor, torch.Tensor | None, torch.Tensor, Objective],
                       tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


class _HeadLosses(torch.autograd.Function):
    """Forward and backward in one pass over chunks: the gradients are ready when the losses are."""

    @staticmethod
    def forward(ctx: Any, student_ND: torch.Tensor, student_head_VD: torch.Tensor, teacher_ND: torch.Tensor | None,
                teacher_head_VD: torch.Tensor | None, labels_N: torch.Tensor, n_labels: torch.Tensor,
                objective: Objective, with_grad: bool, per_token: TokenLosses
                ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        kind = student_ND.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else student_ND.dtype
        head = student_head_VD.to(dtype)
        lm = kl = student_ND.new_zeros((), dtype=torch.float32)
        if with_grad:
            ctx.grad_hidden = torch.empty_like(student_ND)
            ctx.grad_head = torch.zeros_like(student_head_VD)
        for start in range(0, len(labels_N), CHUNK_TOKENS):
            part = slice(start, start + CHUNK_TOKENS)
            hidden = student_ND[part].to(dtype)
            target = None
            if teacher_ND is not None and teacher_head_VD is not None:
                target = F.linear(teacher_ND[part].to(teacher_head_VD.dtype), teacher_head_VD).float()
            logits = F.linear(hidden, head).float()
            part_lm, part_kl, grad = per_token(logits, target, labels_N[part], objective)
            lm, kl = lm + part_lm, kl + part_kl
            del logits, target
            if with_grad:
                grad = (grad / n_labels).to(dtype)
                ctx.grad_hidden[part] = grad @ head
                ctx.grad_head += grad.T @ hidden
        lm, kl = lm / n_labels, kl / n_labels
        ctx.mark_non_differentiable(lm, kl)
        return objective.lm * lm + objective.kl * kl, lm, kl

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, *_: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # Called once a forward pass: scaling in place spares a copy of the head's size.
        return ctx.grad_hidden.mul_(grad), ctx.grad_head.mul_(grad), None, None, None, None, None, None, None


def head_losses(student_ND: torch.Tensor, student_head_VD: torch.Tensor, teacher_ND: torch.Tensor | None,
                teacher_head_VD: torch.Tensor | None, labels_N: torch.Tensor, objective: Objective,
                n_labels: torch.Tensor | None = None, per_token: TokenLosses = token_losses
                ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(lm * cross entropy + kl * KL, cross entropy, KL) of hidden states, heads included; only the first has gradients.

    Means over `n_labels` tokens (default: those of `labels_N` that have a label): a step of several batches divides
    each by the step's count. Without a teacher the KL is 0. No tensor of N x V exists: CHUNK_TOKENS x V at most.
    `per_token` is `token_losses` or that compiled.
    """
    if n_labels is None:
        n_labels = (labels_N != NO_LABEL).sum().clamp(min=1)
    total: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = _HeadLosses.apply(
        student_ND, student_head_VD, teacher_ND, teacher_head_VD, labels_N, n_labels, objective,
        torch.is_grad_enabled(), per_token)
    return total
