"""The terms of the training loss, and the losses at the LM head. Shapes: N tokens, V vocabulary, D width.

TERMS is the only list of terms: the objective, the guard, the log and the report's chart read it. A new term is a row
there, a field of Objective, and its weight in lrc_edge/recipe.py.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from lrc_edge import recipe as recipes

CHUNK_TOKENS = 2048  # tokens whose logits exist at one time
NO_LABEL = -100


@dataclass(frozen=True)
class Objective:
    """The weight of each term, and its settings. Loss = sum of weight * term (arXiv 2505.12781, section 3.2)."""

    lm: float = 1.0
    kl: float = 1.0
    clone: float = 0.2
    temperature: float = 1.0  # of the KL
    clone_terms: str = "relative"  # a name of CLONE_ERRORS

    @classmethod
    def of(cls, train: recipes.Train, phase: str) -> Objective:
        """Return the objective of a phase, by its name in train/phases.py."""
        return cls(**{name: getattr(train, term.settings[phase]) for name, term in TERMS.items()},
                   temperature=train.kl_temperature, clone_terms=train.clone_terms)

    def weight(self, term: str) -> float:
        return float(getattr(self, term))

    @property
    def needs_teacher(self) -> bool:
        return any(self.weight(name) for name, term in TERMS.items() if term.needs_teacher)

    @property
    def compares_logits(self) -> bool:
        return any(self.weight(name) for name in TOKEN_TERMS if TERMS[name].needs_teacher)

    @property
    def compares_activations(self) -> bool:
        return any(self.weight(name) for name in ACTIVATION_TERMS)


class Tokens(NamedTuple):
    """Float32 logits of some tokens. The shapes of labels and mask fit the logits'."""

    student_NV: torch.Tensor
    teacher_NV: torch.Tensor | None
    log_q_NV: torch.Tensor | None  # the student's log-probabilities, if the KL has temperature 1 and can use them, too
    labels_N1: torch.Tensor  # 0 where there is none
    mask_N1: torch.Tensor  # whether there is one


def cross_entropy(tokens: Tokens, objective: Objective) -> tuple[torch.Tensor, torch.Tensor]:
    """(sum of -log q of the labels, gradient (N, V) of lm * that to the logits, before the mask: q - onehot)."""
    log_q = F.log_softmax(tokens.student_NV, dim=-1) if tokens.log_q_NV is None else tokens.log_q_NV
    loss = -(log_q.gather(1, tokens.labels_N1) * tokens.mask_N1).sum()
    grad = log_q.exp() * objective.lm
    grad.scatter_add_(1, tokens.labels_N1, torch.full_like(tokens.labels_N1, -objective.lm, dtype=grad.dtype))
    return loss, grad


def kl_divergence(tokens: Tokens, objective: Objective) -> tuple[torch.Tensor, torch.Tensor]:
    """(sum of T^2 KL(teacher || student), gradient (N, V) of kl * that to the logits, before the mask: T (q_T - p_T)).

    T is the temperature, which softens both distributions (Hinton et al., 2015).
    """
    assert tokens.teacher_NV is not None
    t = objective.temperature
    log_q = F.log_softmax(tokens.student_NV / t, dim=-1) if tokens.log_q_NV is None else tokens.log_q_NV
    log_p = F.log_softmax(tokens.teacher_NV / t, dim=-1)
    p = log_p.exp()
    loss = ((p * (log_p - log_q)).sum(1, keepdim=True) * tokens.mask_N1).sum() * t**2
    return loss, (log_q.exp() - p) * (t * objective.kl)


def _absolute(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    return _squares(student - teacher).sum() / student.numel()


def _relative(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    return _ratio(_squares(student - teacher).sum(1), _squares(teacher.detach()).sum(1)).mean()


def _relative_per_token(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    sizes_BL = _squares(teacher.detach())
    # A token with almost no activation, such as attention's output at an attention sink, must not dominate the term.
    smallest_B1 = SMALLEST_TOKEN * sizes_BL.median(1, keepdim=True).values
    return _ratio(_squares(student - teacher), sizes_BL.maximum(smallest_B1)).mean()


def _ratio(error: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
    """Return error / size; 0 where the size is 0, as where a teacher has layers that write nothing."""
    return torch.where(size > 0, error / torch.where(size > 0, size, 1), 0)


def _squares(x_BLD: torch.Tensor) -> torch.Tensor:
    """Return each token's sum of squares, (B, L), in float32. For the backward pass only the operand is kept."""
    return torch.linalg.vector_norm(x_BLD, dim=-1, dtype=torch.float32).square()


# train.clone_terms -> the clone loss of an activation (B, L, D): the student's, the teacher's -> a mean over rows.
CLONE_ERRORS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "relative": _relative,  # a row's squared error / the teacher's mean square in the row
    "per_token": _relative_per_token,  # the same for each token, then the mean over tokens
    "absolute": _absolute,  # the mean squared error (arXiv 2505.12781)
}
SMALLEST_TOKEN = 0.01  # of the row's median: what a token's size counts as, at least, in `per_token`


def clone_term(student: torch.Tensor, teacher: torch.Tensor, terms: str) -> torch.Tensor:
    """Return the clone loss of an activation (B, L, D), by the name in CLONE_ERRORS.

    No row's contribution depends on the other rows of its batch. Sums are in float32; for the backward pass, only the
    difference is kept, in its operands' type.
    """
    return CLONE_ERRORS[terms](student, teacher)


@dataclass(frozen=True)
class Term:
    """One term of the loss. It is computed from the logits (`of_tokens`) or from activations (`of_activations`)."""

    label: str  # in the report
    settings: Mapping[str, str]  # phase -> the field of recipe.Train that is the term's weight
    needs_teacher: bool
    of_tokens: Callable[[Tokens, Objective], tuple[torch.Tensor, torch.Tensor]] | None = None
    of_activations: Callable[[torch.Tensor, torch.Tensor, str], torch.Tensor] | None = None  # summed over all of them


def _always(setting: str) -> dict[str, str]:
    return {"clone": setting, "dense": setting, "quantized": setting}


TERMS = {  # name, which is also the column of metrics.jsonl
    "lm": Term("LM", _always("lm_weight"), needs_teacher=False, of_tokens=cross_entropy),
    "kl": Term("KL", _always("kl_weight"), needs_teacher=True, of_tokens=kl_divergence),
    "clone": Term("clone", {**_always("dense_alpha"), "clone": "alpha"}, needs_teacher=True,
                  of_activations=clone_term),
}
TOKEN_TERMS = {name: term.of_tokens for name, term in TERMS.items() if term.of_tokens}
ACTIVATION_TERMS = {name: term.of_activations for name, term in TERMS.items() if term.of_activations}


@dataclass
class Losses:
    """`total` is weighted and has gradients. `parts`: every term of TERMS, unweighted, as a detached 0-d tensor."""

    total: torch.Tensor
    parts: dict[str, torch.Tensor]

    @classmethod
    def of(cls, token_loss: torch.Tensor, token_terms: torch.Tensor, activation_terms: torch.Tensor,
           objective: Objective) -> Losses:
        """`token_loss` is already weighted. The terms of tokens and of activations are in the order of their tables."""
        total = token_loss
        for name, value in zip(ACTIVATION_TERMS, activation_terms, strict=True):
            total = total + objective.weight(name) * value
        found = dict(zip([*TOKEN_TERMS, *ACTIVATION_TERMS], [*token_terms, *activation_terms.detach()], strict=True))
        return cls(total, {name: found[name] for name in TERMS})


def token_losses(student_NV: torch.Tensor, teacher_NV: torch.Tensor | None, labels_N: torch.Tensor,
                 objective: Objective) -> tuple[torch.Tensor, torch.Tensor]:
    """(the terms of TOKEN_TERMS, the gradient (N, V) of their weighted sum to the student's logits).

    Terms are sums over the tokens that have a label, in nats. Gradients are in closed form. Logits of any type are
    converted to float32 here, so that a compiled pass reads them in their own type.
    """
    student_NV, teacher_NV = student_NV.float(), None if teacher_NV is None else teacher_NV.float()
    mask_N1 = (labels_N != NO_LABEL)[:, None]
    log_q = F.log_softmax(student_NV, dim=-1) if objective.temperature == 1.0 else None
    tokens = Tokens(student_NV, teacher_NV, log_q, labels_N.clamp(min=0)[:, None], mask_N1)
    sums: list[torch.Tensor] = []
    grad = None
    for name, of_tokens in TOKEN_TERMS.items():
        if teacher_NV is None and TERMS[name].needs_teacher:
            sums.append(student_NV.new_zeros(()))
            continue
        loss, part = of_tokens(tokens, objective)
        sums.append(loss)
        grad = part if grad is None else grad.add_(part)
    assert grad is not None
    return torch.stack(sums), grad * mask_N1


def _teacher_logits(teacher_ND: torch.Tensor | None, head_VD: torch.Tensor | None, part: slice) -> torch.Tensor | None:
    if teacher_ND is None or head_VD is None:
        return None
    return F.linear(teacher_ND[part].to(head_VD.dtype), head_VD)


TokenLosses = Callable[[torch.Tensor, torch.Tensor | None, torch.Tensor, Objective], tuple[torch.Tensor, torch.Tensor]]


class _HeadLosses(torch.autograd.Function):
    """Forward and backward in one pass over chunks: the gradients are ready when the losses are."""

    @staticmethod
    def forward(ctx: Any, student_ND: torch.Tensor, student_head_VD: torch.Tensor, teacher_ND: torch.Tensor | None,
                teacher_head_VD: torch.Tensor | None, labels_N: torch.Tensor, n_labels: torch.Tensor,
                objective: Objective, with_grad: bool, per_token: TokenLosses) -> tuple[torch.Tensor, torch.Tensor]:
        kind = student_ND.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else student_ND.dtype
        head = student_head_VD.to(dtype)
        sums = student_ND.new_zeros(len(TOKEN_TERMS), dtype=torch.float32)
        if with_grad:
            ctx.grad_hidden = torch.empty_like(student_ND)
            ctx.grad_head = torch.zeros_like(student_head_VD)
        for start in range(0, len(labels_N), CHUNK_TOKENS):
            part = slice(start, start + CHUNK_TOKENS)
            hidden = student_ND[part].to(dtype)
            # Logits have no name here, so that `per_token` frees them once it has their float32 copies.
            part_sums, grad = per_token(F.linear(hidden, head), _teacher_logits(teacher_ND, teacher_head_VD, part),
                                        labels_N[part], objective)
            sums = sums + part_sums
            if with_grad:
                grad = (grad / n_labels).to(dtype)
                ctx.grad_hidden[part] = grad @ head
                ctx.grad_head += grad.T @ hidden
        means = sums / n_labels
        ctx.mark_non_differentiable(means)
        total = student_ND.new_zeros((), dtype=torch.float32)
        for name, mean in zip(TOKEN_TERMS, means, strict=True):
            total = total + objective.weight(name) * mean
        return total, means

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, *_: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # Called once per forward pass: scaling in place saves a copy of the head's size.
        return ctx.grad_hidden.mul_(grad), ctx.grad_head.mul_(grad), None, None, None, None, None, None, None


def head_losses(student_ND: torch.Tensor, student_head_VD: torch.Tensor, teacher_ND: torch.Tensor | None,
                teacher_head_VD: torch.Tensor | None, labels_N: torch.Tensor, objective: Objective,
                n_labels: torch.Tensor | None = None, per_token: TokenLosses = token_losses
                ) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (weighted sum, the terms of TOKEN_TERMS) of hidden states; only the first has gradients.

    The losses are divided by `n_labels` (default: the number of labels in `labels_N`); a step of several batches passes
    the number of labels in the step. Without a teacher the KL is 0. The largest tensor is CHUNK_TOKENS x V, never
    N x V. `per_token` is `token_losses`, compiled or not.
    """
    if n_labels is None:
        n_labels = (labels_N != NO_LABEL).sum().clamp(min=1)
    total: tuple[torch.Tensor, torch.Tensor] = _HeadLosses.apply(
        student_ND, student_head_VD, teacher_ND, teacher_head_VD, labels_N, n_labels, objective,
        torch.is_grad_enabled(), per_token)
    return total
