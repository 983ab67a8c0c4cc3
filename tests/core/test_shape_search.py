"""The search among shapes, on losses that are known."""
from __future__ import annotations

import random
from itertools import product

import numpy as np
import pytest

from lrc_edge.shape import ModelShape
from lrc_edge.shape_search import COSTS, Search, halvings, search

TEACHER = ModelShape("llama", 32_000, 1024, 4096, 16, 16, 4, 64, 4096, True)
SHAPES = [TEACHER.resized({"hidden_size": width, "num_hidden_layers": layers, "intermediate_size": neurons,
                           "num_key_value_heads": groups})
          for width, layers, neurons, groups in product((512, 768, 1024), (8, 12, 16), (1024, 2048, 3072), (1, 2, 4))
          if 8 <= width * layers * neurons / 2**20 * (groups + 12) / 16 <= 20]
TRUE_COSTS = np.array([0.3, 0.6, 0.1, 0.05, 0.02])


def loss(shape: ModelShape, noise: random.Random | None = None) -> float:
    cut = halvings(shape, TEACHER)
    return 2 + float(TRUE_COSTS @ cut**1.3) + (noise.gauss(0, 0.01) if noise else 0)


def test_halvings_are_those_of_each_axis() -> None:
    shape = TEACHER.resized({"hidden_size": 512, "num_hidden_layers": 4})
    assert dict(zip(COSTS, halvings(shape, TEACHER), strict=True)) == {
        "hidden_size": 1, "num_hidden_layers": 2, "intermediate_size": 0, "num_attention_heads": 0,
        "num_key_value_heads": 0}


@pytest.mark.parametrize("seed", range(5))
def test_a_good_shape_is_found_with_few_trials(seed: int) -> None:
    """Of all shapes, one of the best tenth, though losses are noisy and bend where the model is straight."""
    noise, tried = random.Random(seed), []

    def evaluate(shapes: list[ModelShape]) -> dict[ModelShape, float]:
        tried.extend(shapes)
        return {shape: loss(shape, noise) for shape in shapes}

    job = Search(TEACHER, [SHAPES], seed)
    search(job, evaluate, rounds=2, per_round=4)
    found = job.best(SHAPES)
    assert len(tried) == len(set(tried)) <= 12 < len(SHAPES) / 2
    assert loss(found[0]) <= sorted(map(loss, SHAPES))[len(SHAPES) // 10]


def test_a_cut_never_counts_as_a_gain() -> None:
    """Chance, or a teacher that gains from training, must not teach that smaller is better."""
    job = Search(TEACHER, [SHAPES])
    job.trials = {shape: 2 - 0.1 * halvings(shape, TEACHER)[0] for shape in job.probes()}
    narrow, wide = (TEACHER.resized({"hidden_size": width, "num_hidden_layers": 12}) for width in (512, 1024))
    predicted = job.predict()
    assert predicted(wide) <= predicted(narrow)


def test_without_trials_the_model_is_what_cuts_cost_elsewhere() -> None:
    predicted = Search(TEACHER, [SHAPES]).predict()
    half = TEACHER.resized({"hidden_size": 512, "num_hidden_layers": 8})
    assert predicted(half) == pytest.approx(COSTS["hidden_size"] + COSTS["num_hidden_layers"])
    assert predicted(TEACHER) == pytest.approx(0, abs=1e-9)


def test_every_bin_gets_its_own_trials() -> None:
    """And half of them are mutations of the best quarter: near to it, nowhere twice."""
    small = [shape for shape in SHAPES if shape.hidden_size == 512]
    large = [shape for shape in SHAPES if shape.hidden_size != 512]
    job = Search(TEACHER, [large, small], 1)
    job.trials = {shape: loss(shape) for shape in job.probes()}
    found = job.proposals(4)
    assert len(found) == len(set(found)) == 8 and not set(found) & job.trials.keys()
    assert sum(shape in small for shape in found) == sum(shape in large for shape in found) == 4
    assert job.best(small) == sorted((s for s in job.trials if s in small), key=loss)


def test_no_more_shapes_are_proposed_than_there_are() -> None:
    job = Search(TEACHER, [SHAPES[:3]])
    assert sorted(map(SHAPES.index, job.proposals(8))) == [0, 1, 2]
