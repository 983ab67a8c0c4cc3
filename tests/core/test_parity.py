"""The metrics against scipy-free arithmetic written out by hand, and the gates at their limits."""
from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from lrc_edge import parity
from lrc_edge.parity import Gate, compare, gates_of_artifact, gates_of_device, gates_of_grid, next_ids
from lrc_edge.recipe import Gates

RNG = np.random.default_rng(0)
REFERENCE = RNG.normal(size=(300, 40)).astype(np.float32) * 3
IDS = RNG.integers(0, 40, 300)


def test_kl_and_perplexity_equal_torchs() -> None:
    model = REFERENCE + RNG.normal(size=REFERENCE.shape).astype(np.float32) * 0.3
    got = compare(REFERENCE, model, IDS)
    p, q = (F.log_softmax(torch.from_numpy(x).double(), -1) for x in (REFERENCE, model))
    kl = F.kl_div(q, p, log_target=True, reduction="none").sum(-1)
    assert got.kl_mean == pytest.approx(kl.mean().item(), rel=1e-9)
    assert got.kl_max == pytest.approx(kl.max().item(), rel=1e-9)
    assert got.kl_p99 == pytest.approx(np.quantile(kl.numpy(), 0.99), rel=1e-9)
    labels = torch.from_numpy(IDS[1:])
    ppl_p, ppl_q = (F.nll_loss(x[:-1], labels).exp().item() for x in (p, q))
    assert got.ppl == pytest.approx(ppl_q, rel=1e-9) and got.delta_ppl == pytest.approx(ppl_q - ppl_p, rel=1e-6)
    assert got.nmse == pytest.approx(((model - REFERENCE).astype(np.float64) ** 2).sum()
                                     / ((REFERENCE - REFERENCE.mean(-1, keepdims=True)) ** 2).sum(), rel=1e-4)
    assert got.max_abs == pytest.approx(np.abs(model - REFERENCE).max(), rel=1e-6)


def test_standard_error_of_delta_perplexity_is_that_of_resampling() -> None:
    model = REFERENCE + RNG.normal(size=REFERENCE.shape).astype(np.float32) * 0.5
    got = compare(REFERENCE, model, IDS)
    nll = [-np.take_along_axis(parity._log_softmax(x.astype(np.float64))[:-1], IDS[1:, None], 1)[:, 0]
           for x in (REFERENCE, model)]
    picks = RNG.integers(0, 299, (4000, 299))
    deltas = np.exp(nll[1][picks].mean(1)) - np.exp(nll[0][picks].mean(1))
    assert got.delta_ppl_se == pytest.approx(deltas.std(), rel=0.15)


def test_equal_logits_are_equal() -> None:
    got = compare(REFERENCE, REFERENCE, IDS)
    assert (got.kl_mean, got.max_abs, got.top1, got.nmse, got.delta_ppl) == (0.0, 0.0, 1.0, 0.0, 0.0)


def test_near_ties_are_left_out_of_top1() -> None:
    reference = np.array([[1.0, 1.001, 0.0], [5.0, 0.0, 0.0], [5.0, 0.0, 0.0]], dtype=np.float32)
    model = np.array([[1.001, 1.0, 0.0], [5.0, 0.0, 0.0], [0.0, 5.0, 0.0]], dtype=np.float32)
    got = compare(reference, model, np.array([0, 0, 0]))
    assert got.near_ties == 1 and got.top1 == 0.5


def test_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    model = REFERENCE * 1.1
    whole = compare(REFERENCE, model, IDS)
    monkeypatch.setattr(parity, "CHUNK_ELEMENTS", 40 * 7)
    assert compare(REFERENCE, model, IDS).kl_mean == pytest.approx(whole.kl_mean, rel=1e-12)


def test_nan_passes_no_gate() -> None:
    broken = REFERENCE.copy()
    broken[3, 4] = np.nan
    metrics = compare(REFERENCE, broken, IDS)
    assert math.isnan(metrics.kl_mean) and metrics.as_dict()["kl_mean"] is None
    json.dumps(metrics.as_dict(), allow_nan=False)
    assert not any(g.passed for g in gates_of_artifact("a", "onnx:fp32", "prefill", metrics, Gates(), 1e-5))
    assert not any(g.passed for g in gates_of_artifact("a", "onnx:fp32", "prefill", None, Gates(), 1e-5, "it crashed"))


def test_shapes_that_differ_are_an_error() -> None:
    with pytest.raises(ValueError, match="logits"):
        compare(REFERENCE, REFERENCE[:, :-1], IDS)


@pytest.mark.parametrize(("relation", "value", "passed"), [
    ("<=", 1.0, True), ("<=", 1.1, False), (">=", 1.0, True), (">=", 0.9, False), ("==", 1.0, True), ("==", 2.0, False),
    ("<=", None, False)])
def test_gate_relations(relation: str, value: float | None, passed: bool) -> None:
    assert Gate("n", "a", "m", value, 1.0, relation).passed is passed  # type: ignore[arg-type]


@pytest.mark.parametrize(("kind", "limits"), [
    ("gguf:f32", [("kl_mean", 1e-6), ("top1", 0.999)]), ("onnx:fp32", [("kl_mean", 1e-8), ("max_abs", 8e-5)]),
    ("gguf:f16", [("kl_mean", 1e-4)]), ("gguf:bf16", [("kl_mean", 1e-3)]), ("gguf:q8_0", [("kl_mean", 5e-3)]),
    ("gguf:q4_k_m", [("kl_mean", 0.15)]), ("onnx:q4", [("kl_mean", 0.15)]),
    ("onnx:fp16", [("kl_mean", 1e-4)]), ("onnx:q8", [("kl_mean", 5e-3)])])
def test_each_artifact_has_its_gates(kind: str, limits: list[tuple[str, float]]) -> None:
    gates = gates_of_artifact("a", kind, "decode", compare(REFERENCE, REFERENCE, IDS), Gates(), 1e-5)
    assert [(g.metric, pytest.approx(g.limit)) for g in gates] == limits and all(g.passed for g in gates)


def test_a_file_that_is_not_as_trained_fails() -> None:
    near, far = (compare(REFERENCE, REFERENCE + RNG.normal(size=REFERENCE.shape) * sd, IDS) for sd in (0.01, 0.3))
    assert near.kl_mean < 0.01 < far.kl_mean
    assert [g.passed for g in gates_of_grid("a", 1.0, near, Gates())] == [True, True]
    assert [g.passed for g in gates_of_grid("a", 0.98, far, Gates())] == [False, False]


def test_labels() -> None:
    assert next_ids(np.array([4, 5, 6])).tolist() == [5, 6, -1]


@pytest.mark.parametrize(("kind", "kl", "top1"), [
    ("gguf:f32", 1e-4, 0.99), ("gguf:f16", 1e-4, 0.99), ("gguf:q8_0", 5e-3, 0.95), ("onnx:q8", 5e-3, 0.95),
    ("gguf:q4_0", 0.15, 0.75), ("onnx:q4", 0.15, 0.75)])
def test_limits_of_devices(kind: str, kl: float, top1: float) -> None:
    good = gates_of_device("a", kind, {"kl_mean": kl, "top1": top1}, Gates())
    assert [(g.metric, g.limit, g.passed) for g in good] == [("kl_mean", kl, True), ("top1", top1, True)]
    bad = gates_of_device("a", kind, {"kl_mean": 1.01 * kl, "top1": top1 - 0.001}, Gates())
    assert not any(g.passed for g in bad)
    assert not any(g.passed for g in gates_of_device("a", kind, {"kl_mean": None, "top1": None}, Gates()))
