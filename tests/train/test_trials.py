"""Trials of several students beside each other are those of each alone."""
from __future__ import annotations

from pathlib import Path

import pytest
import torch
from starts import start_of
from tiny_models import make_tiny, tiny_data

from lrc_edge.checkpoint import DenseCheckpoint
from lrc_edge.corpus.held_out import HeldOut
from lrc_edge.train.data.rows import PackedRows
from lrc_edge.train.data.tokenize import HELD_OUT_FILE
from lrc_edge.train.start.build import Start
from lrc_edge.train.trials import Trial, run_trials

TOKENS = 20_480


@pytest.mark.parametrize("tied", [True, False])
def test_students_share_a_teacher_and_nothing_else(tied: bool, tmp_path: Path) -> None:
    teacher = DenseCheckpoint.open(make_tiny(tmp_path / "t", family="qwen2", tied=tied, tokenizer="qwen2"))
    rows = PackedRows(tiny_data(teacher.path, tmp_path), 64)
    held_out_BL = HeldOut.load(tmp_path / HELD_OUT_FILE).rows(64, 2000, bos=0)
    ids = torch.stack([rows[i]["input_ids"] for i in range(8)])
    starts = [start_of(teacher, ids, "weights", **sizes) for sizes in (
        {"hidden_size": 32}, {"num_hidden_layers": 1, "num_key_value_heads": 1, "num_attention_heads": 2})]
    steps: list[tuple[int, int]] = []

    def trials(chosen: list[Start], tokens: int = TOKENS) -> list[Trial]:
        return run_trials(teacher, chosen, rows, held_out_BL, tokens, torch.float32, torch.device("cpu"),
                          lambda *progress: steps.append(progress))

    together = trials(starts)
    assert steps[-1] == (20, 20)
    assert together == [trials([start])[0] for start in starts]
    untrained = trials(starts, tokens=1)  # one step at a rate of 0
    for start, trial, before in zip(starts, together, untrained, strict=True):
        assert trial.loss < before.loss == pytest.approx(start.loss, abs=0.2)
        assert trial.loss_in_4_bits != trial.loss == pytest.approx(trial.loss_in_4_bits, abs=0.1)
