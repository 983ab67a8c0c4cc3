"""The schedule: token counts as steps, rows and rates."""
from __future__ import annotations

import pytest

from lrc_edge.recipe import load_recipe
from lrc_edge.shape import ModelShape
from lrc_edge.train.loop.schedule import FAR_RATE, MAX_RATE, NEAR_RATE, Schedule, default_rate


def student(width: int, positions: int) -> ModelShape:
    return ModelShape("llama", 512, width, 96, 2, 4, 2, 24, positions, tied=True)


def schedule(*settings: str, n_tokens: int = 10**7, positions: int = 4096, width: int = 64) -> Schedule:
    return Schedule.of(load_recipe(None, settings).train, student(width, positions), n_tokens)


@pytest.mark.parametrize(("settings", "n_tokens", "expected"), [
    (["train.tokens=1000000", "train.batch_tokens=8192"], 1, (2048, 4, 122)),
    (["train.tokens=1000000", "train.batch_tokens=65536"], 1, (2048, 32, 15)),
    ([], 2000 * 4096, (2048, 2, 2000)),  # one pass, a 2000th of it a step
    (["train.seq_len=256"], 40_960, (256, 4, 40)),  # at least 1,024 tokens a step
    (["train.seq_len=100"], 10**10, (100, 328, 304878)),  # at most 32,768 tokens a step
])
def test_steps_and_rows(settings: list[str], n_tokens: int, expected: tuple[int, int, int]) -> None:
    found = schedule(*settings, n_tokens=n_tokens)
    assert (found.seq_len, found.rows, found.steps) == expected
    assert found.tokens == found.steps * found.rows * found.seq_len


def test_rows_are_never_longer_than_the_teacher_can_read() -> None:
    assert schedule(positions=512).seq_len == 512


@pytest.mark.parametrize(("rows", "world", "micro_batch", "expected"), [
    (24, 1, 8, (24, 8)), (25, 1, 8, (25, 5)), (24, 8, 2, (3, 1)), (24, 8, 3, (3, 3)), (7, 1, 4, (7, 1))])
def test_forward_passes_divide_the_rows(rows: int, world: int, micro_batch: int, expected: tuple[int, int]) -> None:
    assert Schedule(64, rows, 10, 10, 1, 1e-3, 1, 1e-3).rows_of_process(world, micro_batch) == expected


@pytest.mark.parametrize(("width", "steps", "batch", "kl", "expected"), [
    (1024, 200, 1024, 0.1, NEAR_RATE / 1024), (256, 200, 1024, 0.1, NEAR_RATE / 256),  # falls with the width
    (1024, 50, 1024, 0.1, NEAR_RATE / 2048), (1024, 200, 1024, 0.025, NEAR_RATE / 2048),  # near start, few steps
    (1024, 200, 1024, -1e-9, NEAR_RATE / 10_240), (1024, 200, 1024, 0.0, NEAR_RATE / 10_240),  # as if the KL were 1e-3
    (1024, 100, 1024, 0.8, 2 * NEAR_RATE / 1024),  # grows with the distance from the teacher
    (1024, 100, 1024, 9.0, FAR_RATE / 1024),
    (1024, 200, 4096, 0.1, 2 * NEAR_RATE / 1024), (1024, 10**5, 32_768, 0.1, FAR_RATE / 1024),  # grows with the batch
    (1024, 50, 4096, 0.4, NEAR_RATE / 1024),  # but not in a few steps
    (16, 100, 1024, 9.0, MAX_RATE)])
def test_default_rates(width: int, steps: int, batch: int, kl: float, expected: float) -> None:
    assert default_rate(width, steps, batch, kl) == pytest.approx(expected)


def test_both_phases_have_the_default_rate_unless_it_is_set() -> None:
    recipe = load_recipe(None, ["train.learning_rate=1e-4", "train.dense_share=0.5"]).train
    found = Schedule.of(recipe, student(1024, 2048), 10**6, start_kl=0.1)
    assert found.clone_rate == 1e-4 and found.dense_rate == pytest.approx(NEAR_RATE / 1024 * 2**0.5)
    assert {name: phase["learning_rate"] for name, phase in found.phases.items()} == {
        "clone": found.clone_rate, "dense": found.dense_rate}
    assert [*schedule("train.dense_share=0").phases] == ["clone"] and [*schedule().phases] == ["dense"]


@pytest.mark.parametrize(("steps", "warmup"), [(1, 1), (5, 1), (10, 2), (50, 10), (100, 20), (1000, 20), (5000, 100)])
def test_the_default_warmup_is_neither_a_single_step_nor_most_of_a_short_run(steps: int, warmup: int) -> None:
    assert schedule(f"train.tokens={steps * 2048}", "train.batch_tokens=2048").dense_warmup == warmup


def test_rates_warm_up_in_both_phases_and_end_at_zero() -> None:
    found = schedule("train.tokens=409600", "train.batch_tokens=4096", "train.dense_share=0.6",
                     "train.warmup_share=0.1", "train.dense_warmup_share=0.05", "train.learning_rate=0.1",
                     "train.dense_learning_rate=0.2")
    assert (found.steps, found.dense_from, found.clone_warmup, found.dense_warmup) == (100, 40, 10, 5)
    rates = [found.learning_rate(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.01) and rates[9] == pytest.approx(0.1 * 0.91)
    assert rates[39] == pytest.approx(0.1 * 0.61) and rates[40] == pytest.approx(0.04 * 0.6)
    assert rates[43] == pytest.approx(0.16 * 0.57) and rates[44] == pytest.approx(0.2 * 0.56)
    assert rates[49] == pytest.approx(0.2 * 0.51) and rates[99] == pytest.approx(0.2 * 0.01)
    assert [found.is_dense(step) for step in (39, 40)] == [False, True]
