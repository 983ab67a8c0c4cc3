"""Identity projections at full width, folded, are the teacher: every family, against transformers' own logits."""
from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import FAMILIES
from tiny_models import make_tiny

from lrc_edge.checkpoint import DenseCheckpoint
from lrc_edge.pipeline.training_stages import fold_identity
from lrc_edge.recipe import Gates
from lrc_edge.targets.proof.reference import Reference


@pytest.mark.parametrize("name", FAMILIES)
def test_identity_folds_to_the_teacher(name: str, tmp_path: Path) -> None:
    teacher = DenseCheckpoint.open(make_tiny(tmp_path / "teacher", **FAMILIES[name]))
    student = fold_identity(teacher, tmp_path / "identity")
    ids = torch.randint(0, 500, (4, 128), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected, got = teacher.model()(ids).logits, student.model()(ids).logits
    assert expected.std() > 0.1, "the model says nothing: the comparison would prove nothing"
    rounding = Reference(teacher.model()).rounding(ids.numpy())
    assert (expected - got).abs().max() <= Gates().max_abs_rounding * rounding < 1e-3
    assert (expected.argmax(-1) == got.argmax(-1)).all()
