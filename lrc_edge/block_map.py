"""Block maps: how an axis of the student that is not trained follows from the teacher's, in one layer.

A selection of neurons, a merge of key/value heads and a change of basis within heads are all of this form. Two such
maps in a row are one.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, eq=False)
class BlockMap:
    """Block j of the student is the sum over m of (block index[j, m] of the teacher) @ factor[j, m].

    J blocks of the student, M summands, T and S the widths of a block of the teacher and of the student. Raises
    ValueError if the tensors do not fit the size of the teacher's axis.
    """

    index_JM: torch.Tensor  # int64
    factor_JMTS: torch.Tensor  # float32
    teacher_size: int

    def __post_init__(self) -> None:
        n_blocks, rest = divmod(self.teacher_size, self.factor_JMTS.shape[2])
        if rest or self.index_JM.shape != self.factor_JMTS.shape[:2] or not self.index_JM.numel() \
                or not 0 <= int(self.index_JM.min()) <= int(self.index_JM.max()) < n_blocks:
            raise ValueError(f"block map: index {tuple(self.index_JM.shape)} and factor "
                             f"{tuple(self.factor_JMTS.shape)} do not fit an axis of {self.teacher_size}")

    @classmethod
    def selection(cls, kept: Sequence[int], teacher_size: int, block: int = 1) -> BlockMap:
        """Keep these blocks of `block` coordinates as they are, in this order."""
        import torch

        index_J1 = torch.tensor(kept, dtype=torch.int64)[:, None]
        return cls(index_J1, torch.eye(block).expand(len(kept), 1, block, block).clone(), teacher_size)

    @property
    def student_size(self) -> int:
        return self.factor_JMTS.shape[0] * self.factor_JMTS.shape[3]

    @property
    def is_selection(self) -> bool:
        """Whether coordinates are only left out or reordered."""
        import torch

        size_T, size_S = self.factor_JMTS.shape[2:]
        return self.index_JM.shape[1] == 1 and size_T == size_S and \
            bool((self.factor_JMTS == torch.eye(size_T, device=self.factor_JMTS.device)).all())

    def apply(self, tensor: torch.Tensor, dim: int = -1) -> torch.Tensor:
        """Map one dimension of a tensor from the teacher's size to the student's. The type stays."""
        import torch

        moved = tensor.movedim(dim, -1)
        factor_JMTS = self.factor_JMTS.to(tensor.dtype)
        if factor_JMTS.shape[1:] == (1, 1, 1):
            mapped = moved.index_select(-1, self.index_JM[:, 0]) * factor_JMTS.flatten()
        else:
            blocks = moved.unflatten(-1, (-1, factor_JMTS.shape[2])).index_select(-2, self.index_JM.flatten())
            blocks = blocks.unflatten(-2, tuple(self.index_JM.shape))
            mapped = torch.einsum("...jmt,jmts->...js", blocks, factor_JMTS).flatten(-2)
        return mapped.movedim(-1, dim)

    def then(self, second: BlockMap) -> BlockMap:
        """Return the map that applies this one, and then `second`. Raises ValueError if the sizes do not fit."""
        import torch

        if second.teacher_size != self.student_size or second.factor_JMTS.shape[2] != self.factor_JMTS.shape[3]:
            raise ValueError(f"block map: one to {self.student_size} in blocks of {self.factor_JMTS.shape[3]}, "
                             f"then one of {second.teacher_size} in blocks of {second.factor_JMTS.shape[2]}")
        index = self.index_JM[second.index_JM].flatten(1)
        factor = torch.einsum("jnmtu,jnus->jnmts", self.factor_JMTS[second.index_JM], second.factor_JMTS).flatten(1, 2)
        return BlockMap(index, factor, self.teacher_size)

    def to(self, device: torch.device | str) -> BlockMap:
        return BlockMap(self.index_JM.to(device), self.factor_JMTS.to(device), self.teacher_size)
