"""The calibration text of a build and of an export: what it is, and that none of it is the proof's."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tiny_models import TEXT, make_tiny

from lrc_edge.checkpoint import DenseCheckpoint
from lrc_edge.corpus.held_out import OVERLAP, Calibration, HeldOut, is_held_out
from lrc_edge.errors import UserError
from lrc_edge.pipeline import texts
from lrc_edge.recipe import Recipe, load_recipe
from lrc_edge.train.data.tokenize import prepare

SHARE = 0.2


def recipe_of(*settings: str) -> Recipe:
    return load_recipe(None, ["parity.row_len=64", "parity.positions=256", "export.calibration_tokens=1024", *settings])


def calibration(folder: Path, model: DenseCheckpoint, *settings: str) -> Calibration:
    recipe = recipe_of(*settings)
    return texts.calibration(folder, texts.held_out_text(folder, recipe, model), recipe, model)


def prepared(folder: Path, model: DenseCheckpoint, texts: list[str]) -> np.ndarray:
    """A build's data folder; returns the held-out ids."""
    (folder / "data").mkdir(parents=True)
    prepare([("text", texts)], model.tokenizer(), folder / "data", held_out_share=SHARE, max_tokens=None, seq_len=64,
            progress=lambda n: None)
    return HeldOut.load(folder / "data" / "held_out.npz").ids


def shared_windows(rows: np.ndarray, evaluation: np.ndarray) -> int:
    """By trying every pair of places."""
    view = np.lib.stride_tricks.sliding_window_view
    known = {tuple(window) for window in view(evaluation, OVERLAP).tolist()}
    return sum(tuple(window) in known for row in rows for window in view(row, OVERLAP).tolist())


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> DenseCheckpoint:
    return DenseCheckpoint.open(make_tiny(tmp_path_factory.mktemp("model") / "tiny"))


def test_a_builds_rows_leave_out_what_the_proof_holds(model: DenseCheckpoint, tmp_path: Path) -> None:
    texts = [TEXT[i:i + 900] for i in range(0, 90_000, 900)]
    held_out = [text for text in texts if is_held_out(text, SHARE)]
    trained = [text for text in texts if not is_held_out(text, SHARE)]
    # Documents that are trained on, with most of a held-out one inside: another hash, the same text.
    copies = [text for i in range(400) if not is_held_out(text := f"{i}: {held_out[i % 5]}", SHARE)]
    mixed = [text for pair in zip(copies, trained, strict=False) for text in pair]
    evaluation = prepared(tmp_path, model, held_out + mixed)
    got = calibration(tmp_path, model)
    assert got.rows.shape == (16, 64) and got.source == "training text"
    assert got.n_left_out > 3 and shared_windows(got.rows, evaluation) == 0
    assert got.as_dict()["sha256"] == calibration(tmp_path, model).sha256
    prepared(tmp_path / "copies", model, held_out + [f"{i}{held_out[0]}" for i in range(30)])
    with pytest.raises(UserError, match=r"apart from the verification text \(all \d+ sequences overlap it\)"):
        calibration(tmp_path / "copies", model)


def test_an_exports_rows_lie_behind_the_proofs(model: DenseCheckpoint, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT[:40_000])
    sources = f"data.sources=[{str(tmp_path / 'text.txt')!r}]"
    got, recipe = calibration(tmp_path, model, sources), recipe_of(sources)
    proof = texts.held_out_rows(texts.held_out_text(tmp_path, recipe, model), recipe, model)
    assert 0 < len(got.rows) <= 16 and got.source.startswith("--data")
    assert shared_windows(got.rows, proof[:, 1:].flatten()) == 0  # without the BOS of each row
    assert calibration(tmp_path, model).source == "Python's documentation"
    (tmp_path / "short.txt").write_text(TEXT[:300])
    with pytest.raises(UserError, match=r"apart from the verification text \(fewer than 64 tokens\); add --data"):
        calibration(tmp_path, model, f"data.sources=[{str(tmp_path / 'short.txt')!r}]")
