"""Fewer key/value heads and query heads: which go together, and the maps of queries, keys, values and outputs.

RoPE multiplies each pair of coordinates by a unit complex number, so it commutes with any other complex factor. So the
keys of the groups to be merged are first aligned, pair by pair, by the factors of their common principal component, and
the queries get the inverse factors. Values have no RoPE: they keep the directions in which the outputs of the attention
differ most. Both fold into the linears. (Plain merges take the mean: Ainslie et al., arXiv 2305.13245.
Alignment by rotations before a merge: arXiv 2412.20677.)

Q query heads, G key/value heads ("groups"), H = head_dim, P = H / 2 pairs. With q/k norms, which stand between the
linears and RoPE, keys cannot be merged: whole groups are dropped instead.
"""
from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product

import torch

from lrc_edge.block_map import BlockMap
from lrc_edge.families import family_of
from lrc_edge.shape import ModelShape
from lrc_edge.train.start.statistics import LayerStatistics

SMALLEST = 1e-6  # of the largest: what a scale or an eigenvalue counts as, at least
LEAST_GAIN = 1e-6  # of an exchange between two groups


@dataclass(frozen=True)
class Merge:
    """One group of the student: the teacher's groups M that it replaces, and the maps of their heads.

    keys, values: (M, H, H), to be summed over the members. queries, outputs: (M, H, H), for each member's query heads.
    """

    members: tuple[int, ...]
    keys_MHH: torch.Tensor
    queries_MHH: torch.Tensor
    values_MHH: torch.Tensor
    outputs_MHH: torch.Tensor


def aligned(statistics: LayerStatistics, o_QDH: torch.Tensor, n_kept: int) -> list[Merge]:
    """Return n_kept merges that together replace all groups of a layer. o_QDH: o_proj by heads.

    Those groups are merged that lose least with each other, two by two: the spectra of whole groups would cost minutes
    per layer for a model whose heads each have their own keys.
    """
    n_groups = statistics.keys_PGG.shape[1]
    gram_GHH = (o_QDH.mT @ o_QDH).unflatten(0, (n_groups, -1)).sum(1)
    aligner = Aligner(statistics, gram_GHH, o_QDH.shape[-1])
    costs = {pair: aligner.cost(pair) for pair in combinations(range(n_groups), 2)} if n_kept > 1 else {}
    return [aligner.merge(members) for members in grouping(costs, n_groups, n_kept)]


def head_maps(statistics: LayerStatistics, o_DQ: torch.Tensor, teacher: ModelShape, student: ModelShape,
              merge: Callable[[LayerStatistics, torch.Tensor, int], list[Merge]] = aligned) -> dict[str, BlockMap]:
    """Return the maps of a layer by axis; none if the heads stay. o_DQ: the layer's o_proj, (D, Q H)."""
    if (teacher.num_attention_heads, teacher.num_key_value_heads) == \
            (student.num_attention_heads, student.num_key_value_heads):
        return {}
    n_groups, n_kept = teacher.num_key_value_heads, student.num_key_value_heads
    o_QDH = o_DQ.unflatten(-1, (teacher.num_attention_heads, -1)).movedim(1, 0)
    strength_Q = ((o_QDH @ statistics.heads_QHH) * o_QDH).sum((1, 2))  # mean square of each head's output
    if n_kept == n_groups or family_of(teacher.family).normalizes_heads:
        groups = strength_Q.unflatten(0, (n_groups, -1)).sum(1).topk(n_kept).indices.sort().values.tolist()
        merges = [Merge((group,), *[torch.eye(teacher.head_dim)[None]] * 4) for group in groups]
    else:
        merges = merge(statistics, o_QDH, n_kept)
    kept = [_strongest(strength_Q, found.members, teacher, student) for found in merges]
    queries = [(head, found.queries_MHH[m], found.outputs_MHH[m]) for found, heads in zip(merges, kept, strict=True)
               for m, head in heads]
    members = torch.tensor([found.members for found in merges])
    heads_J1 = torch.tensor([[head] for head, _, _ in queries])
    return {
        "q_size": BlockMap(heads_J1, torch.stack([q for _, q, _ in queries])[:, None], teacher.q_size),
        "k_size": BlockMap(members, torch.stack([found.keys_MHH for found in merges]), teacher.k_size),
        "v_size": BlockMap(members, torch.stack([found.values_MHH for found in merges]), teacher.v_size),
        "o_size": BlockMap(heads_J1, torch.stack([o for _, _, o in queries])[:, None], teacher.o_size)}


def _strongest(strength_Q: torch.Tensor, members: Sequence[int], teacher: ModelShape, student: ModelShape
               ) -> list[tuple[int, int]]:
    """Return the query heads that a group of the student keeps, as (position of its member, teacher's head)."""
    per_group = teacher.num_attention_heads // teacher.num_key_value_heads
    heads = [(m, group * per_group + i) for (m, group), i in product(enumerate(members), range(per_group))]
    n_kept = student.num_attention_heads // student.num_key_value_heads
    return sorted(sorted(heads, key=lambda head: -strength_Q[head[1]].item())[:n_kept])


class Aligner:
    """Merges of some groups of a layer. gram_GHH: the sum over a group's query heads of O^T O, O its part of o_proj."""

    def __init__(self, statistics: LayerStatistics, gram_GHH: torch.Tensor, head_dim: int):
        n_groups = len(gram_GHH)
        self.head_dim, self.keys_PGG = head_dim, statistics.keys_PGG
        queries_GP = statistics.queries_QP.unflatten(0, (n_groups, -1)).sum(1).sqrt()
        self.weights_GP = floored(queries_GP)
        self.values_GGHH = statistics.values_VV.unflatten(0, (n_groups, -1)).unflatten(-1, (n_groups, -1)).movedim(2, 1)
        values, vectors = torch.linalg.eigh(gram_GHH)
        roots = floored(values).sqrt()
        self.root_GHH = vectors @ (roots[..., None] * vectors.mT)
        self.inverse_GHH = vectors @ (vectors.mT / roots[..., None])
        self.turn_HH = torch.linalg.qr(torch.randn(head_dim, head_dim, generator=torch.Generator().manual_seed(0))).Q

    def cost(self, members: tuple[int, ...]) -> float:
        """Return the share of the keys' and of the values' weighted energy that a merge of these groups loses."""
        keys, values = (torch.linalg.eigvalsh(matrix) for matrix in self._weighted(members))
        kept = (keys[:, -1].sum(), keys.sum()), (values[-self.head_dim:].sum(), values.sum())
        return sum(1 - (part / whole).item() for part, whole in kept if whole > 0)

    def merge(self, members: tuple[int, ...]) -> Merge:
        """Merge these groups. The magnitudes of the new keys and values are the members' own, so that the optimizer's
        steps are as large for them as for the others."""
        index = list(members)
        keys_PMM, values_XX = self._weighted(members)
        energy_P, u_PM = (found[..., -1] for found in torch.linalg.eigh(keys_PMM))
        own_P = self.keys_PGG.diagonal(dim1=1, dim2=2).real[:, index].mean(1)
        scale_P = torch.where(own_P > 0, own_P / floored(energy_P), 1).sqrt()
        factors_MP = u_PM.T.conj() * self.weights_GP[index]
        inverse_MP = (u_PM.T / self.weights_GP[index]).conj()
        values, vectors = torch.linalg.eigh(values_XX)
        # Components differ in size by orders of magnitude, and a block of o_proj holds several: turned, they do not.
        p_MHH = (vectors[:, -self.head_dim:] @ self.turn_HH).unflatten(0, (len(index), -1))
        own = torch.stack([self.values_GGHH[g, g].trace() for g in index]).mean()
        scale = (own / values[-self.head_dim:].sum()).sqrt() if own > 0 else 1.0
        return Merge(members, as_blocks(factors_MP * scale_P), as_blocks(inverse_MP / scale_P),
                     self.root_GHH[index] @ p_MHH * scale, self.inverse_GHH[index] @ p_MHH / scale)

    def _weighted(self, members: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        """((P, M, M) keys times the size of their queries, (M H, M H) values as the outputs see them)."""
        index = list(members)
        weights_PM = self.weights_GP[index].T
        keys_PMM = self.keys_PGG[:, index][:, :, index] * weights_PM[:, :, None] * weights_PM[:, None]
        values_MMHH = self.root_GHH[index][:, None] @ self.values_GGHH[index][:, index] @ self.root_GHH[index][None]
        return keys_PMM, values_MMHH.movedim(1, 2).flatten(2).flatten(0, 1)


def floored(x: torch.Tensor) -> torch.Tensor:
    """Return x with values of at least SMALLEST of the largest; ones if none is above 0."""
    largest = x.max().item()
    return x.clamp(min=SMALLEST * largest) if largest > 0 else torch.ones_like(x)


def as_blocks(factors: torch.Tensor) -> torch.Tensor:
    """(..., P) complex factors of pairs -> (..., H, H) real matrices that multiply a row vector by them."""
    real, imaginary = torch.diag_embed(factors.real), torch.diag_embed(factors.imag)
    return torch.cat([torch.cat([real, imaginary], -1), torch.cat([-imaginary, real], -1)], -2).float()


def grouping(costs: Mapping[tuple[int, int], float], n_groups: int, n_kept: int) -> list[tuple[int, ...]]:
    """Return n_kept groups of equal size with a low total cost: neighbours, improved by the best exchanges of two.

    costs: of each pair (a < b) in one group; a group's cost is the sum over its pairs.
    """
    size = n_groups // n_kept
    found = [tuple(range(first, first + size)) for first in range(0, n_groups, size)]

    def cost_of(member: int, others: Iterable[int]) -> float:
        return sum(costs[min(member, other), max(member, other)] for other in others)

    def exchanges() -> Iterator[tuple[float, int, int, tuple[int, ...], tuple[int, ...]]]:
        for (i, first), (j, second) in combinations(enumerate(found), 2):
            for a, b in product(first, second):
                with_b, with_a = {*first} - {a}, {*second} - {b}
                gain = cost_of(b, with_b) + cost_of(a, with_a) - cost_of(a, with_b) - cost_of(b, with_a)
                yield gain, i, j, tuple(sorted(with_b | {b})), tuple(sorted(with_a | {a}))

    while (best := min(exchanges(), default=None)) and best[0] < -LEAST_GAIN:
        _, i, j, found[i], found[j] = best
    return sorted(found)
