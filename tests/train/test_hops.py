"""Progressive cuts: each student is cut from the trained one before, and compared with the same teacher."""
from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from starts import started
from tiny_models import make_tiny, tiny_data
from train_runs import SETTINGS

from lrc_edge.checkpoint import DenseCheckpoint
from lrc_edge.errors import UserError
from lrc_edge.export.fold import fold
from lrc_edge.pipeline.commands import _check_rows_divide
from lrc_edge.pipeline.plan import Plan
from lrc_edge.recipe import Recipe, load_recipe
from lrc_edge.student import hops_of, student_of
from lrc_edge.train.hops import hop_settings, hop_summaries, train_in_hops
from lrc_edge.train.loop.checkpoints import claim
from lrc_edge.train.loop.stage import lineage_of, load_trained
from lrc_edge.train.loop.trainer import TRAINED_FILE, Trainer
from lrc_edge.train.losses import Objective
from lrc_edge.train.start.stage import calibration_rows, load_start

SIZES = ["student.num_hidden_layers=2", "student.intermediate_size=64", "student.num_key_value_heads=1",
         "student.num_attention_heads=2"]
HOPS = ["num_hidden_layers=3 hidden_size=48", "num_hidden_layers=2 num_key_value_heads=1"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> DenseCheckpoint:
    return DenseCheckpoint.open(make_tiny(tmp_path_factory.mktemp("teacher") / "t", layers=4))


def run(teacher: DenseCheckpoint, data: Path, folder: Path, recipe: Recipe) -> list[dict[str, float]]:
    student, _ = student_of(recipe, teacher.shape, "t")
    shapes = [*hops_of(recipe, teacher.shape, student), student]
    rows: list[dict[str, float]] = []
    first = started(teacher, shapes[0], recipe, data, folder.with_name("start"))
    train_in_hops(teacher, recipe, shapes, first, data, folder, rows.append)
    return rows


def recipe_of(*settings: str) -> Recipe:
    return load_recipe(None, [*SETTINGS, *SIZES, "train.dense_alpha=0.2", *settings], student={"hops": HOPS})


def test_hops_lead_to_the_student_and_are_not_repeated(teacher: DenseCheckpoint, tmp_path: Path,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    folder, recipe = tmp_path / "train", recipe_of()
    for made in (folder, tmp_path / "data"):
        made.mkdir()
    data = tiny_data(teacher.path, tmp_path / "data")
    rows = run(teacher, data, folder, recipe)
    assert [row["step"] for row in rows if "held_out_loss" in row] == [0, 5, 0, 5, 0, 5, 10]
    assert all(np.isfinite(row["clone"]) and row["clone"] > 0 for row in rows if "clone" in row)
    summaries = hop_summaries(folder)
    assert [summary["tokens"] for summary in summaries] == [1280, 1280]
    cut, rows_BL = load_start(folder / "hop-2" / "next"), calibration_rows(data, recipe.train, teacher.shape)
    with torch.no_grad():
        parts = cut.clone(teacher.model())(rows_BL, objective=Objective(clone=0.0)).parts
    # Not the same rows: the last student has its own seed.
    assert cut.kl == pytest.approx(parts["kl"].item(), rel=0.1) and cut.loss == pytest.approx(
        parts["lm"].item(), rel=0.1) and summaries[1]["next"]["kl"] == cut.kl
    lineage = lineage_of(folder / TRAINED_FILE)
    assert lineage.teacher == teacher.shape and lineage.student == student_of(recipe, teacher.shape, "t")[0]
    student = fold(teacher, folder / TRAINED_FILE, tmp_path / "student", {"name": "tiny", "teacher": "t"})
    clone, ids = load_trained(teacher, folder / TRAINED_FILE), torch.arange(40)[None]
    with torch.no_grad():
        torch.testing.assert_close(student.model()(ids).logits, clone.student(ids).logits)
    before = (folder / TRAINED_FILE).read_bytes()
    steps: list[int] = []
    step = Trainer._step
    monkeypatch.setattr(Trainer, "_step", lambda self, n, batch: (steps.append(n), step(self, n, batch)))
    run(teacher, data, folder, recipe)
    assert steps == [8, 9] and (folder / TRAINED_FILE).read_bytes() == before, "resumes from the last checkpoint"


def test_the_budget_is_shared() -> None:
    settings = hop_settings(recipe_of("train.tokens=1000", "train.hop_share=0.3").train, 0, 2)
    assert [(one.tokens, one.seed) for one in settings] == [(150, 0), (150, 1), (700, 2)]
    assert [one.tokens for one in hop_settings(recipe_of("train.tokens=0").train, 400, 1)] == [200, 200]


@pytest.mark.parametrize(("hops", "message"), [
    (["layers=3"], "student.hops: 'layers=3' in 'layers=3': need a size and a number"),
    (["num_hidden_layers=x"], "student.hops: 'num_hidden_layers=x'"),
    (["num_key_value_heads=0"], "student.hops: 'num_key_value_heads=0' in 'num_key_value_heads=0': need a size"),
    (["num_hidden_layers=5"], "num_hidden_layers = 5: the teacher before 'num_hidden_layers=5' of student.hops has 4"),
    (["num_hidden_layers=1"], "num_hidden_layers = 2: the teacher of the last of student.hops has 1")])
def test_hops_that_do_not_lead_to_the_student_are_refused(hops: list[str], message: str, teacher: DenseCheckpoint
                                                          ) -> None:
    recipe = load_recipe(None, SIZES, student={"hops": hops})
    with pytest.raises(UserError) as caught:
        hops_of(recipe, teacher.shape, student_of(recipe, teacher.shape, "t")[0])
    assert message in str(caught.value)


def test_hops_need_dense_training() -> None:
    with pytest.raises(UserError, match=r"student.hops with train.dense_share = 0.5.*set train.dense_share=1"):
        recipe_of("train.dense_share=0.5")
    with pytest.raises(UserError, match=r"student.hops with train.init = 'gaussian'.*set train.init=pca"):
        recipe_of("train.init=gaussian")


def test_another_setting_does_not_remove_hops(tmp_path: Path) -> None:
    claim(tmp_path / "train", {"train.seed": 0})
    (tmp_path / "train" / "hop-1").mkdir()
    (tmp_path / "train" / "hop-1" / TRAINED_FILE).touch()
    with pytest.raises(UserError, match=r"train\.seed was 0, is 1"):
        claim(tmp_path / "train", {"train.seed": 1})
    assert (tmp_path / "train" / "hop-1" / TRAINED_FILE).exists()


def test_steps_of_every_hop_must_divide_among_the_processes(teacher: DenseCheckpoint) -> None:
    """Half the tokens in one hop: its steps are smaller than those of the whole budget."""
    settings = ["train.tokens=15400000", "train.seq_len=512", "student.num_hidden_layers=2"]
    _check_rows_divide(Plan.of_build(str(teacher.path), load_recipe(None, settings), writes=False), 5)
    hops = load_recipe(None, settings, student={"hops": ["num_hidden_layers=3"]})
    with pytest.raises(UserError, match="does not divide among 5 processes"):
        _check_rows_divide(Plan.of_build(str(teacher.path), hops, writes=False), 5)


def test_summaries_are_in_the_order_of_the_hops(tmp_path: Path) -> None:
    for hop in (10, 2):
        (tmp_path / f"hop-{hop}" / "next").mkdir(parents=True)
        (tmp_path / f"hop-{hop}" / "training.json").write_text(json.dumps({"tokens": hop}))
        (tmp_path / f"hop-{hop}" / "next" / "start.json").write_text(json.dumps({"kl": hop / 10}))
    assert hop_summaries(tmp_path) == [{"tokens": 2, "next": {"kl": 0.2}}, {"tokens": 10, "next": {"kl": 1.0}}]
