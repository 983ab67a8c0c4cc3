"""Training: the schedule, what stops it, what it continues from."""
from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_models import TEXT

from lrc_edge.checkpoint import DenseCheckpoint
from lrc_edge.corpus import HeldOut
from lrc_edge.errors import UserError
from lrc_edge.recipe import load_recipe
from lrc_edge.train.data import prepare
from lrc_edge.train.stage import Plan, load_clone, train
from lrc_edge.train.trainer import (
    COMPLETE_MARK,
    EVAL_TOKENS,
    PROJECTIONS_FILE,
    Schedule,
    choose_device,
    choose_precision,
    held_out_loss,
    last_checkpoint,
    peak_learning_rate,
)


@pytest.fixture
def data(tiny_llama: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    texts = (TEXT[i:i + 500] for i in range(0, 60_000, 500))
    prepare([("text", texts)], DenseCheckpoint.open(tiny_llama).tokenizer(), folder, held_out_share=0.1,
            max_tokens=None, seq_len=64, progress=lambda n: None)
    return folder


def run(teacher: Path, data: Path, folder: Path, *settings: str) -> list[dict[str, float]]:
    recipe = load_recipe(None, ["train.seq_len=64", "train.batch_tokens=256", "train.tokens=5120", "train.eval_every=5",
                                "train.log_every=1", "train.checkpoint_every=4", "student.hidden_size=32", *settings])
    model = DenseCheckpoint.open(teacher)
    rows: list[dict[str, float]] = []
    folder.mkdir(exist_ok=True)
    train(model, recipe, Plan.of(recipe, model, 32, data), data, folder, rows.append)
    return rows


@pytest.mark.parametrize(("settings", "n_tokens", "expected"), [
    (["train.tokens=1000000", "train.batch_tokens=8192"], 1, Schedule(2048, 4, 1, 122)),
    (["train.tokens=1000000", "train.batch_tokens=65536"], 1, Schedule(2048, 8, 4, 15)),
    ([], 400 * 4096, Schedule(2048, 2, 1, 400)),  # one pass, a 400th of it a step
    (["train.seq_len=100"], 10**10, Schedule(100, 8, 41, 304878)),  # at most 32,768 tokens a step
])
def test_schedule(settings: list[str], n_tokens: int, expected: Schedule) -> None:
    assert Schedule.of(load_recipe(None, settings).train, 4096, n_tokens) == expected


def test_rows_are_never_longer_than_the_teacher_can_read() -> None:
    assert Schedule.of(load_recipe(None).train, 512, 10**7).seq_len == 512


def test_default_learning_rate_follows_the_width() -> None:
    settings = load_recipe(None).train
    assert peak_learning_rate(settings, 64) == pytest.approx(3e-3)
    assert peak_learning_rate(load_recipe(None, ["train.learning_rate=1e-4"]).train, 64) == 1e-4


def test_device_and_precision() -> None:
    assert choose_device("cpu").type == "cpu"
    assert choose_precision("fp32", torch.device("cpu")) == torch.float32
    assert choose_precision("auto", torch.device("cuda")) == torch.bfloat16
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="no usable GPU"):
            choose_device("cuda")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_learns_and_its_losses_add_up(precision: str, tiny_llama: Path, data: Path, tmp_path: Path) -> None:
    rows = run(tiny_llama, data, tmp_path / "train", f"train.precision={precision}", "train.alpha=0.3",
               "train.kl_weight=0.7", "train.lm_weight=0.9")
    logged = [row for row in rows if "loss" in row]
    held_out = [row["held_out_loss"] for row in rows if "held_out_loss" in row]
    assert [row["step"] for row in logged] == list(range(1, 21)) and logged[-1]["tokens"] == 5120
    assert logged[-1]["loss"] < logged[0]["loss"] and held_out[-1] < held_out[0]
    for row in logged:
        assert row["loss"] == pytest.approx(0.9 * row["lm"] + 0.7 * row["kl"] + 0.3 * row["clone"], rel=1e-5)
    on_disk = [json.loads(line) for line in (tmp_path / "train" / "metrics.jsonl").read_text().splitlines()]
    assert on_disk == rows
    assert not (tmp_path / "train" / "checkpoints").exists()


def test_accumulation_is_the_same_as_a_large_batch(tiny_llama: Path, data: Path, tmp_path: Path) -> None:
    whole = run(tiny_llama, data, tmp_path / "whole", "train.precision=fp32", "train.micro_batch=4")
    parts = run(tiny_llama, data, tmp_path / "parts", "train.precision=fp32", "train.micro_batch=1")
    for a, b in zip(whole, parts, strict=True):
        for key in {"lm", "kl", "clone", "held_out_loss"} & a.keys():
            assert a[key] == pytest.approx(b[key], rel=2e-3)


def test_saved_projections_make_the_same_student(tiny_llama: Path, data: Path, tmp_path: Path) -> None:
    run(tiny_llama, data, tmp_path / "train", "train.precision=fp32")
    clone = load_clone(DenseCheckpoint.open(tiny_llama), 32, projections=tmp_path / "train" / PROJECTIONS_FILE)
    summary = json.loads((tmp_path / "train" / "training.json").read_text())
    assert summary["steps"] == 20 and summary["init"] == "pca" and summary["precision"] == "fp32"
    rows = HeldOut.load(data / "held_out.npz").rows(64, EVAL_TOKENS, clone.teacher.config.bos_token_id)
    expected = summary["student_held_out_loss"]
    assert held_out_loss(clone.student, rows, torch.float32) == pytest.approx(expected, rel=1e-5)


def test_a_loss_that_is_not_finite_stops_and_is_named(tiny_llama: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"loss is (nan|inf) at step \d+ of 20; lower train.learning_rate"):
        run(tiny_llama, data, tmp_path / "train", "train.learning_rate=1e30", "train.warmup_share=0",
            "train.max_grad_norm=1e30")


def test_only_a_whole_checkpoint_is_continued(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path) is None
    for step, whole in ((8, True), (16, True), (120, False)):
        folder = tmp_path / "checkpoints" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        if whole:
            (folder / COMPLETE_MARK).touch()
    found = last_checkpoint(tmp_path)
    assert found is not None and found.name == "checkpoint-16"
