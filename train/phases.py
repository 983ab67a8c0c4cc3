"""The three phases of training. The phase decides from which tensors the student's matrices follow.

clone      projections P. The matrices are W = f(teacher's W, P), composed once per optimizer step, whatever the number
           of batches. The gradients of the matrices are then mapped to P.
dense      the matrices themselves, as in a folded student (Train What You Deploy, arXiv 2609.02006).
quantized  latent matrices. The model uses them rounded to the grid of the 4-bit files; gradients pass through the
           rounding unchanged (straight-through, Bengio et al., arXiv 1308.3432).

The gains of the student's norms are trained directly in every phase. Biases and the gains of q/k norms follow from the
teacher's: they stay frozen in the clone phase, as published, and are trained with all other weights from the dense
phase on.
"""
from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from torch import nn

from lrc_edge.families import Weight
from lrc_edge.lineage import Holds, compose
from lrc_edge.train import lowrank
from lrc_edge.train.grids import on_grid

if TYPE_CHECKING:
    from lrc_edge.train.clone import Clone


class Phase:
    """What the optimizer trains during the phase. It has no state; the clone holds all tensors."""

    name: ClassVar[str]
    holds: ClassVar[Holds] = "weights"  # what a file of trained tensors has
    trains_inner: ClassVar[bool] = True  # biases, gains of q/k norms

    def begin(self, clone: Clone, previous: Phase | None) -> None:
        """Prepare the clone's tensors. `previous` is None for a clone whose student has no values yet."""
        raise NotImplementedError

    def master(self, clone: Clone, weight: Weight) -> nn.Parameter:
        """Return the trained tensor from which a matrix of the student follows."""
        raise NotImplementedError

    def compose_(self, clone: Clone, dtype: torch.dtype) -> None:
        """Write the matrices that follow from the trained tensors; `dtype` is the type to multiply in."""

    def pull_back_(self, clone: Clone, dtype: torch.dtype) -> None:
        """Map the gradients of the matrices to the trained tensors, add them there, and clear the originals."""

    def kept(self, clone: Clone) -> dict[str, nn.Parameter]:
        """Return the tensors, by weight name, that are not trained in this phase but that a resumed run needs."""
        return {}

    def result(self, clone: Clone) -> dict[str, nn.Parameter]:
        """Return the tensors of a trained file, by weight name."""
        return {name: clone.student_weights[name] for name in clone.trainable()}


class ClonePhase(Phase):
    """Trains projections. Projections of matrices that write into the stream also map the teacher's outputs."""

    name, holds, trains_inner = "clone", "projections", False

    def begin(self, clone: Clone, previous: Phase | None) -> None:
        sizes = clone.lineage.teacher.hidden_size, clone.lineage.student.hidden_size
        clone.unread.update({key(weight.name): nn.Parameter(torch.zeros(sizes)) for weight, _ in clone.composed()
                             if not weight.role.writes_stream})
        # Mapped once, because a sharded weight cannot be mapped.
        clone.mapped.update({key(weight.name): nn.Parameter(
            clone.lineage.mapped(weight, clone.teacher_of(weight).data).contiguous(), requires_grad=False)
            for weight, _ in clone.composed() if clone.lineage.has_maps(weight.role)})

    def master(self, clone: Clone, weight: Weight) -> nn.Parameter:
        return clone.writer(weight) if weight.role.writes_stream else clone.unread[key(weight.name)]

    @torch.no_grad()
    def compose_(self, clone: Clone, dtype: torch.dtype) -> None:
        for weight, matrix in clone.composed():
            composed = compose(weight.role, self._base(clone, weight).to(dtype), self.master(clone, weight).to(dtype))
            matrix.copy_(lowrank.placed_as(composed, matrix))

    @torch.no_grad()
    def pull_back_(self, clone: Clone, dtype: torch.dtype) -> None:
        for weight, matrix in clone.composed():
            if matrix.grad is not None:
                p = self.master(clone, weight)
                grad = lowrank.pull_back(weight.role, self._base(clone, weight).to(dtype), matrix.grad.to(dtype))
                _move(lowrank.placed_as(grad, p).float(), matrix, p)

    def result(self, clone: Clone) -> dict[str, nn.Parameter]:
        return clone.trainable()

    @staticmethod
    def _base(clone: Clone, weight: Weight) -> nn.Parameter:
        """Return the teacher's weight after its block maps."""
        name = key(weight.name)
        return clone.mapped[name] if name in clone.mapped else clone.teacher_of(weight)


class DensePhase(Phase):
    """Trains every weight. The projections through which the clone loss compares outputs stay fixed."""

    name = "dense"

    def begin(self, clone: Clone, previous: Phase | None) -> None:
        if previous:
            previous.compose_(clone, torch.float32)  # the first dense weights must not be rounded to the compute type
        clone.unread.clear()
        clone.mapped.clear()
        for p in clone.writers().values():
            p.requires_grad_(False)
            p.grad = None

    def master(self, clone: Clone, weight: Weight) -> nn.Parameter:
        return clone.student_weights[weight.name]

    def kept(self, clone: Clone) -> dict[str, nn.Parameter]:
        return clone.writers()


class QuantizedPhase(Phase):
    """Trains latent matrices, and every other weight. No output is compared through a projection: the teacher is the
    unquantized student, which has the same width, or there is no clone loss."""

    name = "quantized"

    def begin(self, clone: Clone, previous: Phase | None) -> None:
        clone.unread.update({key(weight.name): nn.Parameter(matrix.detach().clone())
                             for weight, matrix in clone.composed()})
        for pair in clone.layer_pairs():
            pair.projections.clear()
        self.compose_(clone, torch.float32)

    def master(self, clone: Clone, weight: Weight) -> nn.Parameter:
        return clone.unread[key(weight.name)]

    @torch.no_grad()
    def compose_(self, clone: Clone, dtype: torch.dtype) -> None:
        """Round the latent matrices. Blocks lie within a row, and shards hold complete rows."""
        for weight, matrix in clone.composed():
            lowrank.local(matrix).copy_(on_grid(weight, lowrank.local(self.master(clone, weight))))

    @torch.no_grad()
    def pull_back_(self, clone: Clone, dtype: torch.dtype) -> None:
        for weight, matrix in clone.composed():
            if matrix.grad is not None:
                _move(matrix.grad, matrix, self.master(clone, weight))


CLONE, DENSE, QUANTIZED = ClonePhase(), DensePhase(), QuantizedPhase()
PHASES: dict[str, Phase] = {phase.name: phase for phase in (CLONE, DENSE, QUANTIZED)}


def _move(grad: torch.Tensor, matrix: nn.Parameter, master: nn.Parameter) -> None:
    """Add `grad` to the master's gradient, and clear the matrix's."""
    master.grad = grad if master.grad is None else master.grad.add_(grad)
    matrix.grad = None


def key(name: str) -> str:
    """Return the name of a weight or module as a key of a ParameterDict, where dots are not allowed."""
    return name.replace(".", "|")
