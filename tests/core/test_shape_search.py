"""The search among shapes, on losses that are known."""
from __future__ import annotations

import random
from itertools import product

import numpy as np
import pytest

from lrc_edge.shape import ModelShape
from lrc_edge.shape_search import AXES, Search, halvings, search

TEACHER = ModelShape("llama", 32_000, 1024, 4096, 16, 16, 4, 64, 4096, True)
SHAPES = [TEACHER.resized({"hidden_size": width, "num_hidden_layers": layers, "intermediate_size": neurons,
                           "num_key_value_heads": groups})
          for width, layers, neurons, groups in product((512, 768, 1024), (8, 12, 16), (1024, 2048, 3072), (1, 2, 4))
          if 8 <= width * layers * neurons / 2**20 * (groups + 12) / 16 <= 20]
COSTS = np.array([0.3, 0.6, 0.1, 0.05, 0.02])


def loss(shape: ModelShape, noise: random.Random | None = None) -> float:
    cut = halvings(shape, TEACHER)
    return 2 + float(COSTS @ cut**1.3) + (noise.gauss(0, 0.01) if noise else 0)


def test_halvings_are_those_of_each_axis() -> None:
    shape = TEACHER.resized({"hidden_size": 512, "num_hidden_layers": 4})
    assert dict(zip(AXES, halvings(shape, TEACHER), strict=True)) == {
        "hidden_size": 1, "num_hidden_layers": 2, "intermediate_size": 0, "num_attention_heads": 0,
        "num_key_value_heads": 0}


@pytest.mark.parametrize("seed", range(5))
def test_a_good_shape_is_found_with_few_trials(seed: int) -> None:
    """Of all shapes, one of the best tenth, though losses are noisy and bend where the model is straight."""
    noise, tried = random.Random(seed), []

    def evaluate(shapes: list[ModelShape]) -> dict[ModelShape, float]:
        tried.extend(shapes)
        return {shape: loss(shape, noise) for shape in shapes}

    found = search(Search(TEACHER, SHAPES, seed), evaluate, rounds=2, per_round=4)
    assert len(tried) == len(set(tried)) <= 12 < len(SHAPES) / 2
    assert loss(found[0]) <= sorted(map(loss, SHAPES))[len(SHAPES) // 10]


def test_a_cut_never_counts_as_a_gain() -> None:
    """Chance, or a teacher that gains from training, must not teach that smaller is better."""
    job = Search(TEACHER, SHAPES)
    job.add({shape: 2 - 0.1 * halvings(shape, TEACHER)[0] for shape in job.probes()})
    predicted = job.predicted()
    narrow, wide = (TEACHER.resized({"hidden_size": width, "num_hidden_layers": 12}) for width in (512, 1024))
    job.shapes = [*SHAPES, narrow, wide]
    predicted = job.predicted()
    assert predicted[wide] <= predicted[narrow]
