"""Mixed precision: choose the type of every matrix for the least predicted KL at a given size.

Given the KL that each type costs in each matrix (sensitivity.py), choosing one type per matrix under a limit on the
bytes is the multiple-choice knapsack problem. Dynamic programming solves it.
"""
from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from lrc_edge.errors import UserError
from lrc_edge.families import Weight

QType = GGMLQuantizationType

# Block that the row must be a multiple of -> types, in order of size. The codebook types of 3 bits and fewer (IQ3_S,
# IQ2_XS) are left out: they gain little (docs/LOG.md), and look weights up in tables where the others compute.
_TYPES = {
    256: (QType.Q2_K, QType.Q3_K, QType.IQ4_XS, QType.Q4_K, QType.Q5_K, QType.Q6_K, QType.Q8_0),
    32: (QType.IQ4_NL, QType.Q5_0, QType.Q5_1, QType.Q8_0),
    1: (QType.F16,),
}
STEPS = 2**16  # of the dynamic programming: what is left of the budget is divided into at most so many


def candidates(row: int) -> tuple[GGMLQuantizationType, ...]:
    """Return the types that a matrix with rows of this length may get, in order of size."""
    return next(types for block, types in _TYPES.items() if row % block == 0)


def tensor_bytes(weight: Weight, type: GGMLQuantizationType) -> int:
    block, block_bytes = GGML_QUANT_SIZES[type]
    return weight.numel // block * block_bytes


def check_size(weights: Iterable[Weight], bits_per_weight: float, extra_bytes: int = 0) -> None:
    """Raise UserError, with the possible range, if every choice of types is larger, or every choice is smaller.

    extra_bytes: of tensors that are not weights.
    """
    weights = list(weights)
    n_params = sum(weight.numel for weight in weights)
    low, high = (8 * (_fixed_bytes(weights, extra_bytes) + sum(
        tensor_bytes(weight, candidates(weight.shape[1])[end]) for weight in weights if len(weight.shape) > 1))
        / n_params for end in (0, -1))
    if not low <= bits_per_weight <= high:
        raise UserError(f"export.bits_per_weight = {bits_per_weight:g}: a model of this shape can have {_up(low)} to "
                        f"{_down(high)}; " + ("take more" if bits_per_weight < low else "take fewer, or gguf:q8_0"))


def _up(bits: float) -> str:
    return f"{math.ceil(bits * 100) / 100:g}"


def _down(bits: float) -> str:
    return f"{math.floor(bits * 100) / 100:g}"


@dataclass(frozen=True)
class Allocation:
    """One type per matrix, and the expected cost."""

    bits_per_weight: float  # requested
    types: Mapping[str, GGMLQuantizationType]  # weight name -> type
    main_type: GGMLQuantizationType  # of most quantized weights
    predicted_kl: float  # nats per token on the calibration text: the sum over the matrices


def allocate(weights: Iterable[Weight], costs: Mapping[str, Mapping[str, float]], bits_per_weight: float,
             extra_bytes: int = 0) -> Allocation:
    """Return the types of least total cost whose file has at most `bits_per_weight`, counting all tensors.

    costs: weight name -> type's name -> KL divergence of that type alone, for every matrix and its candidates.
    Raises UserError when the size is impossible.
    """
    weights = list(weights)
    check_size(weights, bits_per_weight, extra_bytes)
    matrices = [weight for weight in weights if len(weight.shape) > 1]
    sizes = [[tensor_bytes(weight, type) for type in candidates(weight.shape[1])] for weight in matrices]
    losses = [[costs[weight.name][type.name] for type in candidates(weight.shape[1])] for weight in matrices]
    budget = int(bits_per_weight * sum(weight.numel for weight in weights) / 8) - _fixed_bytes(weights, extra_bytes)
    chosen = choose(sizes, losses, budget)
    types = {weight.name: candidates(weight.shape[1])[i] for weight, i in zip(matrices, chosen, strict=True)}
    n_weights = Counter[GGMLQuantizationType]()
    for weight in matrices:
        if types[weight.name] != QType.F16:
            n_weights[types[weight.name]] += weight.numel
    return Allocation(bits_per_weight, types, n_weights.most_common(1)[0][0],
                      sum(row[i] for row, i in zip(losses, chosen, strict=True)))


def choose(sizes: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], budget: int) -> list[int]:
    """Choose one option of each item, with the least total loss and a total size of at most `budget`.

    Each item's first option is its smallest. Raises ValueError if the first options exceed the budget. This is the
    multiple-choice knapsack problem. Let `step` be what the first options leave of the budget, divided by STEPS. The
    solution is exact if the sizes' common divisor is at least `step`. Otherwise sizes are rounded up to multiples of
    `step`, which wastes at most one step per item.
    """
    slack = budget - sum(row[0] for row in sizes)
    if slack < 0:
        raise ValueError(f"knapsack: the smallest options exceed the budget of {budget} by {-slack}")
    common = math.gcd(*(size - row[0] for row in sizes for size in row))
    step = max(common, -(-slack // STEPS), 1)
    best = np.zeros(slack // step + 1)  # [n] least loss of the items so far within n steps beyond the smallest options
    picks = []
    for row, loss in zip(sizes, losses, strict=True):
        now, pick = best + loss[0], np.zeros(len(best), np.int8)
        for option in range(1, len(row)):
            n_steps = -(-(row[option] - row[0]) // step)
            if n_steps < len(best):
                loss_then = best[:len(best) - n_steps] + loss[option]
                better = loss_then < now[n_steps:]
                now[n_steps:][better], pick[n_steps:][better] = loss_then[better], option
        best = now
        picks.append(pick)
    chosen, left = [], len(best) - 1
    for row, pick in zip(reversed(sizes), reversed(picks), strict=True):
        option = int(pick[left])
        chosen.append(option)
        left -= -(-(row[option] - row[0]) // step)
    return chosen[::-1]


def _fixed_bytes(weights: Iterable[Weight], extra_bytes: int) -> int:
    """Bytes of tensors with a fixed type: vectors (always F32), plus `extra_bytes`."""
    return extra_bytes + sum(4 * weight.numel for weight in weights if len(weight.shape) == 1)
