"""Our ONNX folder in transformers.js on node, as it lies, and its files in a browser's onnxruntime."""
from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from paths import NODE
from rounded import rounded_model
from tiny_models import make_tiny

from lrc_edge.checkpoint import DenseCheckpoint
from lrc_edge.export.onnx.to_onnx import FILES, export_onnx
from lrc_edge.targets.proof.reference import Reference

TEXT = "Once upon a time, naïve 日本 😀\n\nthere were 3 cats."
SHAPES: dict[str, dict[str, Any]] = {
    "llama-tied": dict(family="llama"), "qwen2-untied": dict(family="qwen2", tied=False, tokenizer="qwen2"),
    "qwen3-tied": dict(family="qwen3", tokenizer="qwen2")}

pytestmark = [
    pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed"),
    pytest.mark.skipif(not (NODE / "node_modules").exists(), reason="`make test` installs tests/node with npm"),
]


def run_node(script: str, *args: str, stdin: str = "") -> dict[str, Any]:
    done = subprocess.run(["node", NODE / script, *args], input=stdin, capture_output=True, text=True, timeout=120,
                          check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def probe(folder: Path, dtypes: list[str], ids: np.ndarray) -> dict[str, Any]:
    """What tests/node/probe.mjs says; the prompt to continue is the first 7 ids."""
    asked = {"folder": str(folder), "dtypes": dtypes, "text": TEXT, "ids": ids.tolist(), "prompt": ids[:7].tolist(),
             "n_tokens": 12}
    return run_node("probe.mjs", stdin=json.dumps(asked))


def assert_top5(found: list[list[tuple[int, float]]], logits_TV: np.ndarray, tolerance: float) -> None:
    """At each position: the five largest log-probabilities, and those of the ids that were named."""
    expected = torch.log_softmax(torch.from_numpy(logits_TV).double(), -1)
    assert len(found) == len(expected)
    for row, pairs in zip(expected, found, strict=True):
        ids, values = zip(*pairs, strict=True)
        assert len(set(ids)) == 5
        np.testing.assert_allclose(values, row[list(ids)], atol=tolerance)
        np.testing.assert_allclose(values, row.topk(5).values, atol=tolerance)


@pytest.mark.parametrize("name", SHAPES)
def test_transformers_js(name: str, tmp_path: Path) -> None:
    checkpoint = DenseCheckpoint.open(make_tiny(tmp_path / "tiny", **SHAPES[name]))
    export_onnx(checkpoint, tmp_path / "onnx", list(FILES), accuracy_level=0)
    ids = np.random.default_rng(1).integers(0, checkpoint.shape.vocab_size, 24)
    found = probe(tmp_path / "onnx", list(FILES), ids)
    assert found["text_ids"] == checkpoint.tokenizer()(TEXT)["input_ids"]
    for encoding in FILES:
        reference, got = Reference(rounded_model(checkpoint, encoding)), found[encoding]
        assert (got["dtype"], got["logits"]) == (encoding, "float32")
        assert_top5(got["top5"], reference.prefill(ids), 1e-2 if encoding == "fp16" else 1e-5)
        assert got["generated"] == reference.generate(ids[:7].tolist(), 12, set())


def test_what_is_shipped(tiny_llama: Path, tmp_path: Path) -> None:
    """int8 activations, three data files each, and the smallest model for who names none."""
    checkpoint = DenseCheckpoint.open(tiny_llama)
    whole = export_onnx(checkpoint, tmp_path / "whole", ["fp32", "q4"])
    export_onnx(checkpoint, tmp_path / "onnx", ["fp32", "q4"], shard_bytes=whole[1].bytes * 2 // 5)
    assert (tmp_path / "onnx/onnx/model_q4.onnx_data_2").exists()
    ids = np.random.default_rng(1).integers(0, checkpoint.shape.vocab_size, 24)
    found = probe(tmp_path / "onnx", ["default", "fp32"], ids)
    assert found["default"]["dtype"] == "q4"
    assert_top5(found["default"]["top5"], Reference(rounded_model(checkpoint, "q4")).prefill(ids), 0.1)
    assert_top5(found["fp32"]["top5"], Reference(checkpoint.model()).prefill(ids), 1e-5)


@pytest.mark.parametrize("encoding", FILES)
def test_a_browsers_onnxruntime(encoding: str, tiny_llama: Path, tmp_path: Path) -> None:
    """onnxruntime-web's WebAssembly, run by node: it has every operator, and takes shards as buffers."""
    checkpoint = DenseCheckpoint.open(tiny_llama)
    [artifact] = export_onnx(checkpoint, tmp_path / "onnx", [encoding], accuracy_level=0, shard_bytes=60_000)
    assert (tmp_path / f"{artifact.path}_data_1").exists()
    ids = np.random.default_rng(1).integers(0, checkpoint.shape.vocab_size, 12)
    found = run_node("wasm.mjs", str(tmp_path / artifact.path), ",".join(map(str, ids)))
    logits = np.array(found["data"], dtype=np.float32).reshape(found["dims"])[0]
    expected = Reference(rounded_model(checkpoint, encoding)).prefill(ids)
    np.testing.assert_allclose(logits, expected, atol=2e-2 if encoding == "fp16" else 1e-4)


def test_wrong_logits_are_noticed(tiny_llama: Path, tmp_path: Path) -> None:
    """q4 is not fp32: the tolerances tell them apart."""
    checkpoint = DenseCheckpoint.open(tiny_llama)
    export_onnx(checkpoint, tmp_path / "onnx", ["q4"])
    ids = np.random.default_rng(1).integers(0, checkpoint.shape.vocab_size, 24)
    found, logits = probe(tmp_path / "onnx", ["q4"], ids)["q4"], Reference(checkpoint.model()).prefill(ids)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        assert_top5(found["top5"], logits, 0.1)
