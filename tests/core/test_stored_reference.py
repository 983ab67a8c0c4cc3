"""The stored reference: what it keeps of PyTorch's answers, and how a device is judged by them."""
from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lrc_edge.errors import UserError
from lrc_edge.parity import Comparison, next_ids
from lrc_edge.shape import ModelShape
from lrc_edge.stored_reference import TOP, DeviceComparison, StoredReference, _divergence

V, L = 500, 40
SHAPE = ModelShape("llama", V, 64, 96, 2, 4, 2, 16, 128, True)


def logits(seed: int, scale: float = 3.0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [(scale * rng.standard_normal((L, V))).astype(np.float32) for _ in range(3)]


@pytest.fixture
def ids() -> np.ndarray:
    return np.random.default_rng(7).integers(0, V, (3, L))


@pytest.fixture
def reference(ids: np.ndarray) -> StoredReference:
    return StoredReference.of(ids, logits(0), ["Hallo\ud800", "é"], [[1, 2], [3]], SHAPE)


def answers(reference: StoredReference, rows: list[np.ndarray]) -> DeviceComparison:
    comparison = DeviceComparison(reference, near_tie=0.01)
    for i, row in enumerate(rows):
        logprobs = torch.log_softmax(torch.from_numpy(row).double(), -1).numpy()
        comparison.update(i, np.take_along_axis(logprobs, reference.wanted(i), -1).tolist(), row.argmax(-1).tolist())
    return comparison


def test_it_comes_back_from_its_file(reference: StoredReference, tmp_path: Path) -> None:
    reference.save(tmp_path / "check" / "reference.npz")
    again = StoredReference.load(tmp_path / "check" / "reference.npz")
    for name, value in vars(reference).items():
        np.testing.assert_array_equal(getattr(again, name), value) if isinstance(value, np.ndarray) else None
    assert (again.texts, again.text_ids, again.shape) == (reference.texts, reference.text_ids, SHAPE)
    assert again.top_ids.shape == (3, L, TOP) and again.long_prompt(200)[120:160] == reference.ids[0].tolist()


def test_the_same_answers_differ_by_nothing(reference: StoredReference) -> None:
    figures = answers(reference, logits(0)).figures()
    assert figures["positions"] == 3 * L
    assert figures["kl_max"] < 1e-6 and figures["top1"] == 1.0 and abs(figures["delta_ppl"]) < 1e-3


def test_a_known_difference(reference: StoredReference, ids: np.ndarray) -> None:
    """Close to the divergence over the whole vocabulary and never above it; the other figures are the whole ones."""
    noisy = [a + 0.3 * b for a, b in zip(logits(0), logits(1, 1.0), strict=True)]
    figures = answers(reference, noisy).figures()
    whole = Comparison(near_tie=0.01)
    for row, ref, got in zip(ids, logits(0), noisy, strict=True):
        whole.update(ref, got, next_ids(row))
    metrics = whole.metrics()
    assert 0.85 * metrics.kl_mean < figures["kl_mean"] <= metrics.kl_mean
    assert figures["top1"] == metrics.top1 < 1 and figures["near_ties"] == metrics.near_ties
    assert figures["delta_ppl"] == pytest.approx(metrics.delta_ppl, rel=1e-3)


def test_what_is_no_number_is_no_figure(reference: StoredReference) -> None:
    comparison = DeviceComparison(reference, near_tie=0.01)
    comparison.update(0, [[None] * (TOP + 1)] * L, [0] * L)
    assert comparison.figures()["kl_mean"] is None
    with pytest.raises(UserError, match="shape"):
        comparison.update(1, [[0.0] * TOP] * L, [0] * L)


def test_a_small_vocabulary_is_kept_whole() -> None:
    rng = np.random.default_rng(0)
    rows = [rng.standard_normal((L, 20)).astype(np.float32)]
    kept = StoredReference.of(rng.integers(0, 20, (1, L)), rows, [], [], SHAPE)
    assert kept.top_ids.shape == (1, L, 20)
    assert answers(kept, rows).figures()["kl_max"] < 1e-6


def test_the_divergence_counts_all_others_together() -> None:
    p, q = np.log([[0.4, 0.3]]), np.log([[0.3, 0.3]])
    assert _divergence(p, q)[0] == pytest.approx(0.4 * np.log(0.4 / 0.3) + 0.3 * np.log(0.3 / 0.4))


def test_what_is_no_distribution_is_no_figure(reference: StoredReference) -> None:
    """Logits instead of log-probabilities: a sum without the normalizer would be negative, and pass as nothing."""
    comparison = DeviceComparison(reference, near_tie=0.01)
    row = logits(0)[0].astype(np.float64)
    comparison.update(0, np.take_along_axis(row, reference.wanted(0), -1).tolist(), row.argmax(-1).tolist())
    assert comparison.figures()["kl_mean"] is None


def test_near_ties_are_not_judged(ids: np.ndarray) -> None:
    """Only where the two best are closer than the limit may a device say the other one."""
    for gap, top1, ties in ((0.02, 0.0, 0), (0.005, None, L)):
        row = np.zeros((L, V), np.float32)
        row[:, 3], row[:, 4] = 9 + gap, 9
        kept = StoredReference.of(ids[:1], [row], [], [], SHAPE)
        swapped = row.copy()
        swapped[:, 3], swapped[:, 4] = 9, 9 + gap
        figures = answers(kept, [swapped]).figures()
        assert (figures["top1"], figures["near_ties"]) == (top1, ties)


@pytest.mark.parametrize("damage", ["missing", "truncated", "text", "other", "bits"])
def test_a_damaged_file_is_one_line(damage: str, reference: StoredReference, tmp_path: Path) -> None:
    file = tmp_path / "reference.npz"
    if damage == "truncated":
        reference.save(file)
        file.write_bytes(file.read_bytes()[:5000])
    elif damage == "bits":  # in the compressed stream
        reference.save(file)
        data = bytearray(file.read_bytes())
        data[len(data) // 3:len(data) // 3 + 40] = bytes(40)
        file.write_bytes(data)
    elif damage == "text":
        file.write_text("not a table")
    elif damage == "other":
        np.savez(file, ids=np.zeros(3))
    with pytest.raises(UserError, match="not found" if damage == "missing" else "damaged"):
        StoredReference.load(file)


@pytest.mark.parametrize(("name", "changed"), [
    ("ids", lambda a: a + V), ("ids", lambda a: -a - 1), ("ids", lambda a: a[:, :-1]), ("ids", lambda a: a[:0]),
    ("ids", lambda a: a.astype(float)), ("top_ids", lambda a: a[:1]), ("top_ids", lambda a: a[..., 0]),
    ("top_logprobs", lambda a: a * np.nan), ("top_logprobs", lambda a: a + 9), ("next_logprobs", lambda a: a.T),
    ("texts", lambda a: a[:1]), ("texts", lambda a: (1, 2)), ("text_ids", lambda a: ((1.5,), ())),
    ("text_ids", lambda a: ((V,), ()))])
def test_a_file_that_contradicts_itself_is_refused(name: str, changed: Any, reference: StoredReference,
                                                   tmp_path: Path) -> None:
    """Whole, readable, and not what was written."""
    replace(reference, **{name: changed(getattr(reference, name))}).save(tmp_path / "reference.npz")
    with pytest.raises(UserError, match=r"reference\.npz: damaged \(.*copy it again"):
        StoredReference.load(tmp_path / "reference.npz")


@pytest.mark.parametrize("change", [{"vocab_size": -1}, {"head_dim": 1.5}, {"tied": 1}, {"x": 1}, {"family": None}])
def test_a_shape_that_is_none_is_refused(change: dict[str, Any]) -> None:
    assert ModelShape.from_dict(SHAPE.as_dict()) == SHAPE
    with pytest.raises((TypeError, ValueError)):
        ModelShape.from_dict({**SHAPE.as_dict(), **change})
