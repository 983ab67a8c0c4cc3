"""Biases and the gains of q/k norms: the teacher's in the clone phase, trained from the dense phase on."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from safetensors.torch import load_file, save_file
from tiny_models import make_tiny, tiny_data
from train_runs import run

from lrc_edge.checkpoint import DenseCheckpoint
from lrc_edge.errors import UserError
from lrc_edge.export.fold import fold, with_weights
from lrc_edge.lineage import Lineage
from lrc_edge.train.loop.stage import load_trained
from lrc_edge.train.loop.trainer import TRAINED_FILE, Trainer

WITH_COPIED = ["qwen2-untied", "qwen3-tied"]
IDS = torch.randint(0, 500, (4, 64), generator=torch.Generator().manual_seed(0))


def prepared(name: str, folder: Path) -> tuple[DenseCheckpoint, Path]:
    """Return the teacher and its tokens."""
    teacher = DenseCheckpoint.open(make_tiny(folder / "teacher", **FAMILIES[name]))
    (folder / "data").mkdir()
    return teacher, tiny_data(teacher.path, folder / "data")


def copied_of(model: DenseCheckpoint) -> dict[str, torch.Tensor]:
    return {w.name: model.tensor(w.name).float() for w in model.weights() if w.role.is_inner}


@pytest.mark.parametrize("name", [*WITH_COPIED, "llama-tied"])
def test_the_clone_phase_leaves_them_the_teachers(name: str, tmp_path: Path) -> None:
    teacher, data = prepared(name, tmp_path)
    run(teacher.path, data, tmp_path / "train", "train.dense_share=0", "train.precision=fp32")
    trained = tmp_path / "train" / TRAINED_FILE
    expected = copied_of(teacher)
    assert bool(expected) == (name in WITH_COPIED) and expected.keys().isdisjoint(load_file(trained))
    student = fold(teacher, trained, tmp_path / "student", {"name": "x", "teacher": "x"})
    found = copied_of(student)
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    assert not any(p.requires_grad for key, p in load_trained(teacher, trained).student_weights.items()
                   if key in expected)


@pytest.mark.parametrize("name", WITH_COPIED)
def test_the_dense_and_the_quantized_phase_train_them(name: str, tmp_path: Path) -> None:
    """Through every file: trained tensors, the fold, quantization-aware training, the student on the grid."""
    teacher, data = prepared(name, tmp_path)
    run(teacher.path, data, tmp_path / "train", "train.dense_share=0.5", "train.precision=fp32")
    trained, facts = tmp_path / "train" / TRAINED_FILE, {"name": "x", "teacher": "x"}
    student = fold(teacher, trained, tmp_path / "student", facts)
    before, after = copied_of(teacher), copied_of(student)
    assert before and all(not torch.equal(after[key], value) for key, value in before.items())
    with torch.inference_mode():
        assert torch.equal(student.model()(IDS).logits, load_trained(teacher, trained).student(IDS).logits)
    run(student.path, data, tmp_path / "quantize", "train.precision=fp32", "quantize.tokens=1024")
    placed = with_weights(student, tmp_path / "quantize" / TRAINED_FILE, tmp_path / "student-q4_0", facts)
    assert all(not torch.equal(copied_of(placed)[key], value) for key, value in after.items())


def test_without_dense_steps_the_same_initial_weights_do_not_move(tmp_path: Path) -> None:
    """The negative of the above: a rate of nearly 0 leaves them where they were."""
    teacher, data = prepared("qwen2-untied", tmp_path)
    run(teacher.path, data, tmp_path / "train", "train.dense_learning_rate=1e-30", "train.precision=fp32")
    found = load_file(tmp_path / "train" / TRAINED_FILE)
    assert all(torch.equal(found[key], value) for key, value in copied_of(teacher).items())


@pytest.mark.parametrize("step", [6, 14])
def test_a_run_that_was_stopped_resumes_with_them(step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped in the clone phase, and in the dense phase, which begins at step 10."""
    teacher, data = prepared("qwen2-untied", tmp_path)
    settings = "train.dense_share=0.5", "train.precision=fp32"
    run(teacher.path, data, tmp_path / "whole", *settings)
    real = Trainer.row

    def stops(self: Trainer, row: dict[str, Any]) -> None:
        real(self, row)
        if row["step"] == step:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "row", stops)
        run(teacher.path, data, tmp_path / "stopped", *settings)
    run(teacher.path, data, tmp_path / "stopped", *settings)
    assert (tmp_path / "stopped" / TRAINED_FILE).read_bytes() == (tmp_path / "whole" / TRAINED_FILE).read_bytes()


def test_trained_weights_without_them_are_refused(tmp_path: Path) -> None:
    """As versions wrote that did not train them: whether they are the teacher's is not known."""
    teacher, data = prepared("qwen3-tied", tmp_path)
    run(teacher.path, data, tmp_path / "train", "train.tokens=256")
    trained = load_file(tmp_path / "train" / TRAINED_FILE)
    lineage = Lineage.of(teacher.shape, teacher.shape.with_hidden_size(32))
    older = {key: value for key, value in trained.items() if key not in copied_of(teacher)}
    save_file(older, tmp_path / "older.safetensors", lineage.metadata("weights"))
    with pytest.raises(UserError, match=r"q_norm.weight is missing, need \[24\] .* or train again"):
        fold(teacher, tmp_path / "older.safetensors", tmp_path / "student", {"name": "x", "teacher": "x"})
    assert not (tmp_path / "student").exists()
