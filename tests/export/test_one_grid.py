"""ONNX and GGUF files of a checkpoint hold the same numbers: every tensor, bit for bit, read from the files."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from gguf import GGUFReader, quants
from onnx import numpy_helper
from tiny_models import make_tiny

from lrc_edge.checkpoint import DenseCheckpoint
from lrc_edge.export.gguf.to_gguf import export_gguf
from lrc_edge.export.onnx.to_onnx import export_onnx
from lrc_edge.export.quantize.imatrix import collect
from lrc_edge.gguf_names import gguf_name

Tensors = dict[str, np.ndarray]
TWINS = {"q4": "q4_0", "q8": "q8_0"}  # ONNX encoding -> GGUF's
# llama's q and k stand in another order in GGUF; a narrowed qwen2 has biases, and is written as llama.
SHAPES: dict[str, dict[str, Any]] = {
    "llama": dict(family="llama"), "llama-bf16": dict(family="llama", dtype=torch.bfloat16, kv_heads=1),
    "qwen2": dict(family="qwen2", tokenizer="qwen2"), "qwen3": dict(family="qwen3", tokenizer="qwen2"),
    "qwen2-square": dict(family="qwen2", tokenizer="qwen2", head_dim=16)}


def in_gguf(file: Path, checkpoint: DenseCheckpoint) -> Tensors:
    """GGUF's tensors as the gguf package decodes them, under Hugging Face's names, q and k in its order."""
    reader = GGUFReader(file)
    is_llama = reader.fields["general.architecture"].contents() == "llama"
    heads = {"attn_q": checkpoint.shape.num_attention_heads, "attn_k": checkpoint.shape.num_key_value_heads}
    stored = {tensor.name: quants.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}
    found = {}
    for weight in checkpoint.weights():
        values = stored.pop(gguf_name(weight))
        n_heads = heads.get(weight.role.name.removesuffix("_bias"))
        if is_llama and n_heads:  # rows 2i and 2i + 1 of a head are Hugging Face's i and i + head_dim / 2
            pairs = values.reshape(n_heads, -1, 2, *values.shape[1:])
            values = pairs.swapaxes(1, 2).reshape(values.shape)
        found[weight.name] = values
    assert not stored
    return found


def in_onnx(file: Path) -> Tensors:
    """ONNX's tensors by MatMulNBits' definition: w = scale * (level - 2^(bits - 1)), 4-bit neighbours in one byte."""
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(file).graph.initializer
              if not tensor.name.startswith(("const.", "rope."))}
    found = {}
    for name in list(stored):
        if name.endswith(".q4_0"):
            low, high = stored[name] & 15, stored[name] >> 4
            levels = np.stack([low, high], axis=-1).reshape(*low.shape[:2], 32).astype(np.float32) - 8
        elif name.endswith(".q8_0"):
            levels = stored[name].astype(np.float32) - 128
        else:
            continue
        scales = stored.pop(name.rsplit(".", 1)[0] + ".scales")
        found[name.rsplit(".", 1)[0]] = (levels * scales[..., None]).reshape(len(levels), -1)
        del stored[name]
    return found | stored


def bits(tensors: Tensors) -> dict[str, bytes]:
    return {name: values.astype(np.float32).tobytes() for name, values in tensors.items()}


def importance_of(checkpoint: DenseCheckpoint, seed: int = 0) -> Tensors:
    rows = np.random.default_rng(seed).integers(0, checkpoint.shape.vocab_size, (4, 32))
    return collect(checkpoint, rows)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_every_tensor_is_the_same(name: str, tied: bool, weighted: bool, tmp_path: Path) -> None:
    checkpoint = DenseCheckpoint.open(make_tiny(tmp_path / "tiny", tied=tied, **SHAPES[name]))
    importance = importance_of(checkpoint) if weighted else None
    ggufs = export_gguf(checkpoint, tmp_path / "gguf", list(TWINS.values()), importance=importance)
    onnxes = export_onnx(checkpoint, tmp_path / "onnx", list(TWINS), importance=importance)
    for gguf_file, onnx_file in zip(ggufs, onnxes, strict=True):
        expected = in_gguf(tmp_path / gguf_file.path, checkpoint)
        assert bits(in_onnx(tmp_path / onnx_file.path)) == bits(expected)
        assert gguf_file.tensor_types == onnx_file.tensor_types
        weights = checkpoint.weights()
        assert all((expected[w.name] != checkpoint.tensor(w.name).float().numpy()).any() for w in weights
                   if len(w.shape) == 2)  # they are quantized at all


def test_a_deep_model_has_no_exceptions(tmp_path: Path) -> None:
    """From 8 layers on llama.cpp by itself puts some of ffn_down in Q4_1 when there is an importance matrix."""
    checkpoint = DenseCheckpoint.open(make_tiny(tmp_path / "tiny", layers=8))
    importance = importance_of(checkpoint)
    [gguf_file] = export_gguf(checkpoint, tmp_path / "gguf", ["q4_0"], importance=importance)
    [onnx_file] = export_onnx(checkpoint, tmp_path / "onnx", ["q4"], importance=importance)
    assert bits(in_onnx(tmp_path / onnx_file.path)) == bits(in_gguf(tmp_path / gguf_file.path, checkpoint))


def test_another_importance_makes_other_numbers(tiny_llama: Path, tmp_path: Path) -> None:
    """In q4's linears; Q8_0 has no use for it."""
    checkpoint = DenseCheckpoint.open(tiny_llama)
    found = []
    for seed in (0, 1):
        artifacts = export_onnx(checkpoint, tmp_path / "onnx", list(TWINS), importance=importance_of(checkpoint, seed))
        found.append([bits(in_onnx(tmp_path / artifact.path)) for artifact in artifacts])
    (q4, q8), (other_q4, other_q8) = found
    linears = {w.name for w in checkpoint.weights() if len(w.shape) == 2 and w.role.name != "token_embd"}
    assert {name for name in q4 if q4[name] != other_q4[name]} == linears
    assert q8 == other_q8


def test_threads_and_parts_change_nothing(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = DenseCheckpoint.open(tiny_llama)
    importance = importance_of(checkpoint)
    digests = set()
    for threads, part in ((1, 1 << 20), (2, 1 << 20), (3, 200)):
        monkeypatch.setattr("lrc_edge.export.onnx.weights.PART_WEIGHTS", part)
        artifacts = export_onnx(checkpoint, tmp_path / "onnx", ["fp32", "fp16", *TWINS], importance=importance,
                                threads=threads)
        digests.add(tuple(artifact.sha256 for artifact in artifacts))
    assert len(digests) == 1


def test_an_importance_of_another_model_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    importance = importance_of(DenseCheckpoint.open(tiny_llama))
    importance.pop("model.layers.1.mlp.down_proj.weight")
    with pytest.raises(ValueError, match=r"imatrix: model\.layers\.1\.mlp\.down_proj\.weight is None"):
        export_onnx(DenseCheckpoint.open(tiny_llama), tmp_path / "onnx", ["q4"], importance=importance)
