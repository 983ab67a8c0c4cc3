"""Our ONNX folder in optimum's ORTModelForCausalLM: only in the environment of the `optimum` extra."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from families import FAMILIES
from rounded import rounded_model
from tiny_models import make_tiny

pytest.importorskip("optimum.onnxruntime")

from optimum_ort import OptimumOrt

from lrc_edge.checkpoint import DenseCheckpoint
from lrc_edge.export.onnx.to_onnx import FILES, export_onnx
from lrc_edge.parity import compare
from lrc_edge.targets.proof.reference import Reference
from lrc_edge.targets.runtimes.onnxrt import OnnxRuntime


@pytest.mark.parametrize("name", FAMILIES)
def test_ort_model_for_causal_lm(name: str, tmp_path: Path) -> None:
    """head_dim is not hidden_size / heads in all of these. Every precision, prefill, token by token, and generation."""
    checkpoint = DenseCheckpoint.open(make_tiny(tmp_path / "tiny", **FAMILIES[name]))
    export_onnx(checkpoint, tmp_path / "onnx", list(FILES), accuracy_level=0)
    ids = np.random.default_rng(1).integers(0, checkpoint.shape.vocab_size, 32)
    for encoding, file in FILES.items():
        reference, runtime = Reference(rounded_model(checkpoint, encoding)), OptimumOrt(tmp_path / "onnx", file)
        expected = reference.prefill(ids)
        for logits in (runtime.prefill(ids), runtime.decode(ids)):
            assert_top5(logits, expected, 1e-2 if encoding == "fp16" else 1e-5)
            assert compare(expected, logits, ids).kl_mean <= (1e-5 if encoding == "fp16" else 1e-8)
        assert runtime.generate(ids[:7].tolist(), 12, set()) == reference.generate(ids[:7].tolist(), 12, set())


def assert_top5(logits_TV: np.ndarray, expected_TV: np.ndarray, tolerance: float) -> None:
    """At each position: the five largest log-probabilities, and those of the same ids."""
    found, expected = (torch.log_softmax(torch.from_numpy(logits).double(), -1) for logits in (logits_TV, expected_TV))
    best = found.topk(5)
    torch.testing.assert_close(best.values, expected.gather(-1, best.indices), rtol=0, atol=tolerance)
    torch.testing.assert_close(best.values, expected.topk(5).values, rtol=0, atol=tolerance)


def test_int8_activations_and_shards(tmp_path: Path) -> None:
    """As shipped, and in three data files: what plain onnxruntime says."""
    checkpoint = DenseCheckpoint.open(make_tiny(tmp_path / "tiny"))
    ids = np.random.default_rng(1).integers(0, checkpoint.shape.vocab_size, 32)
    for encoding in ("q8", "q4"):
        [artifact] = export_onnx(checkpoint, tmp_path / "onnx", [encoding], shard_bytes=60_000)
        assert (tmp_path / f"{artifact.path}_data_1").exists()
        logits = OptimumOrt(tmp_path / "onnx", FILES[encoding]).prefill(ids)
        np.testing.assert_allclose(logits, OnnxRuntime(tmp_path / artifact.path).prefill(ids), atol=1e-5)


def test_without_the_line_a_narrow_student_fails(tmp_path: Path) -> None:
    """Why OptimumOrt sets embed_size_per_head. When this fails, optimum has learnt head_dim and the line can go."""
    from optimum.onnxruntime import ORTModelForCausalLM

    checkpoint = DenseCheckpoint.open(make_tiny(tmp_path / "tiny"))
    export_onnx(checkpoint, tmp_path / "onnx", ["fp32"])
    model = ORTModelForCausalLM.from_pretrained(tmp_path / "onnx", subfolder="onnx", file_name="model.onnx")
    assert model.embed_size_per_head != checkpoint.shape.head_dim
