"""The name of the method is that of what ran: the paper's for the paper's settings, and of each change otherwise."""
from __future__ import annotations

from typing import get_args, get_type_hints

import pytest

from lrc_edge.pipeline.method import CLONE_TERMS, LRC, PUBLISHED_ALPHAS, STARTS, method_of
from lrc_edge.recipe import Train, load_recipe

PAPER = ["train.init=gaussian", "train.clone_terms=absolute", "train.kl_weight=1.28", "train.kl_temperature=40"]


def named(*settings: str, dense_from: int = 10) -> str:
    return method_of(load_recipe(None, settings).train, dense_from, 10)


def test_the_tables_are_total() -> None:
    hints = get_type_hints(Train)
    assert STARTS.keys() == set(get_args(hints["init"]))
    assert CLONE_TERMS.keys() == set(get_args(hints["clone_terms"]))


@pytest.mark.parametrize("alpha", PUBLISHED_ALPHAS)
def test_the_papers_settings_are_low_rank_clone_and_nothing_else(alpha: float) -> None:
    assert named(*PAPER, f"train.alpha={alpha}") == LRC == "Low-Rank Clone (arXiv 2505.12781)"
    assert named(*PAPER, f"train.alpha={alpha}", "train.dense_alpha=7", "train.learning_rate=1e-3") == LRC, \
        "what no phase of the run used, and rates, are not part of the method"


@pytest.mark.parametrize(("setting", "words"), [
    ("train.init=selection", "a start from selected channels (RED, arXiv 2605.29327)"),
    ("train.init=pca", "a start from principal components (arXiv 2401.15024)"),
    ("train.clone_terms=relative", "relative clone terms"),
    ("train.alpha=0", "no clone terms"),
    ("train.alpha=0.02", "clone weight 0.02"),
    ("train.kl_weight=1", "KL weight 1 at temperature 40"),
    ("train.kl_temperature=1", "KL weight 1.28 at temperature 1"),
    ("train.kl_weight=0", "no KL"),
    ("train.lm_weight=0", "no LM loss"),
    ("train.lm_weight=0.5", "LM weight 0.5"),
])
def test_each_change_is_named(setting: str, words: str) -> None:
    assert named(*PAPER, setting) == f"{LRC}, with {words}"


@pytest.mark.parametrize(("settings", "dense_from", "expected"), [
    ([], 0, "dense distillation from principal components (arXiv 2401.15024), with relative clone "
            "terms (arXiv 2505.12781)"),
    (["train.dense_alpha=0", "train.init=selection"], 0,
     "dense distillation from selected channels (RED, arXiv 2605.29327), with no clone terms"),
    (["train.clone_terms=absolute", "train.init=gaussian", "train.kl_weight=0"], 0,
     "dense distillation from random projections, with clone terms (arXiv 2505.12781), no KL"),
    (PAPER, 4, f"{LRC}, for 4 steps, then dense distillation (arXiv 2609.02006), with clone terms (arXiv 2505.12781), "
               "for 6"),
    (["train.init=selection", "train.dense_alpha=0"], 4,
     f"{LRC}, with a start from selected channels (RED, arXiv 2605.29327), relative clone terms, KL weight 1 at "
     "temperature 1, for 4 steps, then dense distillation (arXiv 2609.02006), with no clone terms, for 6"),
])
def test_phases_are_named_by_what_ran(settings: list[str], dense_from: int, expected: str) -> None:
    assert named(*settings, dense_from=dense_from) == expected


def test_a_student_as_wide_as_its_teacher_has_no_principal_components() -> None:
    train = load_recipe(None, ()).train
    assert method_of(train, 0, 10, is_narrower=False).startswith("dense distillation from the teacher's own channels")
    assert "principal components" in method_of(train, 0, 10)
