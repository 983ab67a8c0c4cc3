"""Our ONNX folder in optimum's ORTModelForCausalLM: only in the environment of the `optimum` extra."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from families import FAMILIES
from tiny_models import make_tiny

pytest.importorskip("optimum.onnxruntime")

from lrc_edge.checkpoint import DenseCheckpoint
from lrc_edge.export.to_onnx import export_onnx
from lrc_edge.parity import compare
from lrc_edge.targets.onnxrt import OnnxRuntime
from lrc_edge.targets.optimum_ort import OptimumOrt
from lrc_edge.targets.reference import Reference


@pytest.mark.parametrize("name", FAMILIES)
def test_ort_model_for_causal_lm(name: str, tmp_path: Path) -> None:
    """head_dim is not hidden_size / heads in all of these."""
    checkpoint = DenseCheckpoint.open(make_tiny(tmp_path / "tiny", **FAMILIES[name]))
    export_onnx(checkpoint, tmp_path / "onnx", ["fp32"])
    ids = np.random.default_rng(1).integers(0, checkpoint.shape.vocab_size, 32)
    reference = Reference(checkpoint.model())
    expected = reference.prefill(ids)
    runtime = OptimumOrt(tmp_path / "onnx")
    for logits in (runtime.prefill(ids), runtime.decode(ids)):
        assert compare(expected, logits, ids).kl_mean <= 1e-8
        assert compare(expected, logits, ids).max_abs <= 1e-4
    written = reference.generate(ids[:7].tolist(), 12, set())
    assert runtime.generate(ids[:7].tolist(), 12, set()) == written
    for level in (0, 4):
        export_onnx(checkpoint, tmp_path / "q4", ["q4"], accuracy_level=level)
        q4 = OptimumOrt(tmp_path / "q4", "onnx/model_q4.onnx").prefill(ids)
        np.testing.assert_allclose(q4, OnnxRuntime(tmp_path / "q4/onnx/model_q4.onnx").prefill(ids), atol=1e-5)


def test_without_the_line_a_narrow_student_fails(tmp_path: Path) -> None:
    """Why OptimumOrt sets embed_size_per_head. When this fails, optimum has learnt head_dim and the line can go."""
    from optimum.onnxruntime import ORTModelForCausalLM

    checkpoint = DenseCheckpoint.open(make_tiny(tmp_path / "tiny"))
    export_onnx(checkpoint, tmp_path / "onnx", ["fp32"])
    model = ORTModelForCausalLM.from_pretrained(tmp_path / "onnx", subfolder="onnx", file_name="model.onnx")
    assert model.embed_size_per_head != checkpoint.shape.head_dim
