"""The audit of GGUF files: faithful ones pass, by whomever they are written; each kind of damage is named."""
from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES
from gguf import GGMLQuantizationType as QType
from gguf import GGUFReader, quants
from gguf_damage import Metadata, Tensors, rewrite
from safetensors.torch import load_file, save_file
from tiny_models import make_tiny

from lrc_edge.checkpoint import DenseCheckpoint
from lrc_edge.errors import UserError
from lrc_edge.export.audit import values as audit_values
from lrc_edge.export.audit.gguf_file import audit_gguf
from lrc_edge.export.gguf.to_gguf import export_gguf
from lrc_edge.export.quantize.encodings import ENCODINGS, dequantize, quantize_file, quantize_matrix
from lrc_edge.finding import Finding, faults

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
MORE_SHAPES: dict[str, dict[str, Any]] = {
    "llama-linear": dict(rope_scaling={"rope_type": "linear", "factor": 2.0}), "llama-yarn": dict(rope_scaling=YARN),
    "llama-yarn-attention-factor": dict(rope_scaling={**YARN, "attention_factor": 0.7}),
    "llama-padded-vocabulary": dict(vocab_size=600), "llama-bf16": dict(dtype=torch.bfloat16),
    "mistral-window": dict(family="mistral", tokenizer="spm", sliding_window=96),
    "qwen2-native": dict(family="qwen2", head_dim=16, tokenizer="qwen2"),
}
# Which matrices have rows that are multiples of 256, so that K-quants are K-quants.
WIDE = dict(hidden_size=256, intermediate_size=256, layers=1, head_dim=64)


def exported(checkpoint: DenseCheckpoint, folder: Path, encoding: str = "f32") -> Path:
    [artifact] = export_gguf(checkpoint, folder / "gguf", [encoding])
    return folder / artifact.path


def texts(findings: list[Finding]) -> list[str]:
    return [finding.text for finding in findings]


# -- faithful files --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("shape", FAMILIES | MORE_SHAPES)
def test_what_this_project_writes_passes(shape: str, tmp_path: Path) -> None:
    checkpoint = DenseCheckpoint.open(make_tiny(tmp_path / "model", **(FAMILIES | MORE_SHAPES)[shape]))
    for encoding in ("f32", "f16", "q8_0", "q4_0"):
        assert texts(audit_gguf(exported(checkpoint, tmp_path, encoding), checkpoint)) == []


@pytest.mark.parametrize("encoding", [name for name, one in ENCODINGS.items() if not one.needs_imatrix])
def test_every_encoding_passes(encoding: str, tmp_path: Path) -> None:
    checkpoint = DenseCheckpoint.open(make_tiny(tmp_path / "model", **WIDE))
    assert texts(audit_gguf(exported(checkpoint, tmp_path, encoding), checkpoint)) == []


def test_a_quantized_file_of_large_tensors_is_sampled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its rows are compared in part, and still none is taken for another."""
    monkeypatch.setattr(audit_values, "WHOLE", 0)
    monkeypatch.setattr(audit_values, "SAMPLE", 16)
    checkpoint = DenseCheckpoint.open(make_tiny(tmp_path / "model"))
    file = exported(checkpoint, tmp_path, "q4_0")
    read: list[int] = []
    rows = DenseCheckpoint.rows
    monkeypatch.setattr(DenseCheckpoint, "rows", lambda self, name, chosen: (read.append(len(chosen)),
                                                                             rows(self, name, chosen))[1])
    assert texts(audit_gguf(file, checkpoint)) == []
    assert set(read) == {16}
    damaged = rewrite(file, tmp_path / "damaged.gguf", tensors=swap("blk.0.ffn_gate.weight", "blk.1.ffn_gate.weight"))
    assert texts(audit_gguf(damaged, checkpoint)) == [
        "tensor swapped: ffn_gate.weight of layer 0 holds blk.1.ffn_gate.weight instead",
        "tensor swapped: ffn_gate.weight of layer 1 holds blk.0.ffn_gate.weight instead"]


@pytest.mark.parametrize("kind", [QType.Q4_0, QType.Q5_1, QType.Q8_0, QType.Q2_K, QType.Q4_K, QType.Q6_K, QType.IQ4_XS,
                                  QType.TQ2_0])
def test_dequantize_agrees_with_the_gguf_package(kind: QType) -> None:
    blocks = quantize_matrix(np.random.default_rng(0).standard_normal((4, 512)).astype(np.float32), kind)
    found = dequantize(blocks.reshape(-1), kind, 4 * 512)
    assert found is not None
    np.testing.assert_allclose(found.reshape(4, 512), quants.dequantize(blocks, kind), rtol=1e-6, atol=1e-7)
    with pytest.raises(ValueError, match="are not 2049 values"):
        dequantize(blocks.reshape(-1), kind, 2049)


def test_relative_error() -> None:
    one, none = torch.ones(4), torch.zeros(4)
    assert audit_values.relative_error(one, one) == 0 and audit_values.relative_error(one * 3, one) == 2
    assert audit_values.relative_error(none, none) == 0 and audit_values.relative_error(one, none) == float("inf")


def what_others_do(table: Metadata) -> None:
    """Keys that have defaults left out, values per layer, other names of the same rule, no file type or name."""
    for key in ("llama.rope.freq_base", "llama.rope.dimension_count", "llama.vocab_size", "general.file_type",
                "general.name", "tokenizer.ggml.add_bos_token", "tokenizer.ggml.add_eos_token",
                "tokenizer.ggml.eot_token_id"):
        del table[key]
    table["tokenizer.ggml.pre"] = "llama-v3"
    table["tokenizer.ggml.add_sep_token"] = False
    table["llama.feed_forward_length"] = [table["llama.feed_forward_length"]] * table["llama.block_count"]


def test_what_other_writers_do_differently_is_no_fault(tiny_llama: Path, tmp_path: Path) -> None:
    checkpoint = DenseCheckpoint.open(tiny_llama)
    file = rewrite(exported(checkpoint, tmp_path), tmp_path / "other.gguf", what_others_do)
    assert texts(audit_gguf(file, checkpoint)) == []


def test_one_tensor_for_q_k_and_v(tmp_path: Path) -> None:
    checkpoint = DenseCheckpoint.open(make_tiny(tmp_path / "model", **FAMILIES["qwen2-tied"]))

    def fuse(table: Tensors) -> None:
        for layer in range(2):
            for suffix in ("weight", "bias"):
                parts = [table.pop(f"blk.{layer}.attn_{kind}.{suffix}") for kind in "qkv"]
                table[f"blk.{layer}.attn_qkv.{suffix}"] = np.concatenate([part[0] for part in parts]), parts[0][1]

    fused = rewrite(exported(checkpoint, tmp_path), tmp_path / "fused.gguf", tensors=fuse)
    assert texts(audit_gguf(fused, checkpoint)) == []

    def flip(table: Tensors) -> None:
        fuse(table)
        for name in ("blk.1.attn_qkv.weight", "blk.0.attn_qkv.bias"):
            table[name] = table[name][0][::-1], table[name][1]

    found = texts(audit_gguf(rewrite(exported(checkpoint, tmp_path), tmp_path / "flipped.gguf", tensors=flip),
                             checkpoint))
    assert [text.partition(" differs")[0] for text in found] == [
        f"tensor values: attn_{kind}.{suffix} of layer {layer}"
        for layer, suffix in ((0, "bias"), (1, "weight")) for kind in "qkv"]


def test_differences_that_change_nothing_are_notes(tiny_llama: Path, tmp_path: Path) -> None:
    checkpoint = DenseCheckpoint.open(tiny_llama)

    def metadata(table: Metadata) -> None:
        table["general.name"] = "Another name"
        table["tokenizer.ggml.token_type"][2] = 4  # user-defined: still found in a text
        table["tokenizer.chat_template"] = "{#- a comment #}" + table["tokenizer.chat_template"]
        table["tokenizer.ggml.pre"] = "smaug-bpe"

    def tensors(table: Tensors) -> None:
        table["output.weight"] = table["token_embd.weight"]
        table["blk.1.attn_output.bias"] = np.zeros(64, np.float32), QType.F32
        table["blk.0.attn_v.weight"] = table["blk.0.attn_v.weight"][0].astype(np.float16).astype(np.float32), QType.F32

    findings = audit_gguf(rewrite(exported(checkpoint, tmp_path), tmp_path / "f.gguf", metadata, tensors), checkpoint)
    assert faults(findings) == []
    assert {finding.name for finding in findings} == {
        "name", "token types", "chat template", "pre-tokenizer", "tied head", "extra tensor", "tensor rounding"}


# -- damage ----------------------------------------------------------------------------------------------------------

def put(key: str, value: Any) -> Callable[[Metadata], None]:
    return lambda table: table.__setitem__(key, value)


def drop(key: str) -> Callable[[dict[str, Any]], None]:
    return lambda table: table.__delitem__(key)


def change(key: str, index: int, value: Any) -> Callable[[Metadata], None]:
    return lambda table: table[key].__setitem__(index, value)


def swap(a: str, b: str) -> Callable[[Tensors], None]:
    return lambda table: table.update({a: table[b], b: table[a]})


def swapped_items(key: str, a: int, b: int) -> Callable[[Metadata], None]:
    def edit(table: Metadata) -> None:
        table[key][a], table[key][b] = table[key][b], table[key][a]
    return edit


def edit_data(name: str, edit: Callable[[np.ndarray], np.ndarray]) -> Callable[[Tensors], None]:
    return lambda table: table.__setitem__(name, (edit(table[name][0].copy()), table[name][1]))


def put_nan(array: np.ndarray) -> np.ndarray:
    array[5, 7] = np.nan
    return array


ARCH, VOCAB = "llama.", "tokenizer.ggml."
BAD_METADATA: dict[str, tuple[Callable[[Metadata], None], str]] = {
    "architecture": (put("general.architecture", "qwen3"), "architecture: found 'qwen3', expected 'llama'"),
    "rope base": (put(ARCH + "rope.freq_base", 500000.0), "rope base: found 500000, expected 10000"),
    "rope scaling added": (lambda t: t.update({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}),
                           "rope scaling: found 'linear, factor 4', expected 'none'"),
    "rope scaling of an old key": (put(ARCH + "rope.scale_linear", 2.0),
                                   "rope scaling: found 'linear, factor 2', expected 'none'"),
    "rotated dimensions": (put(ARCH + "rope.dimension_count", 12), "rotated dimensions: found 12, expected 24"),
    "eps": (put(ARCH + "attention.layer_norm_rms_epsilon", 1e-6), "norm epsilon: found 1e-06, expected 1e-05"),
    "no eps": (drop(ARCH + "attention.layer_norm_rms_epsilon"), "norm epsilon: found nothing, expected 1e-05"),
    "longer context": (put(ARCH + "context_length", 4096), "context length: found 4096, expected 512"),
    "shorter context": (put(ARCH + "context_length", 64), "context length: found 64, expected 512"),
    "layers": (put(ARCH + "block_count", 1), "layers: found 1, expected 2"),
    "heads": (put(ARCH + "attention.head_count", 2), "attention heads: found 2, expected 4"),
    "heads of no shared kind": (put(ARCH + "attention.head_count_kv", [2, 4]),
                                "key/value heads: found [2, 4], expected 2"),
    "head size": (drop(ARCH + "attention.key_length"), "head size: found 16, expected 24"),
    "width": (put(ARCH + "embedding_length", 96), "hidden size: found 96, expected 64"),
    "experts": (put(ARCH + "expert_count", 8), "expert_count: found 8, expected 0"),
    "not causal": (put(ARCH + "attention.causal", False), "attention.causal: found False, expected True"),
    "tokenizer model": (put(VOCAB + "model", "llama"), "tokenizer model: found 'llama', expected 'gpt2'"),
    "pre-tokenizer": (put(VOCAB + "pre", "qwen2"), "pre-tokenizer: found 'qwen2', expected 'llama-bpe'"),
    "no pre-tokenizer": (drop(VOCAB + "pre"), "pre-tokenizer: found nothing, expected 'llama-bpe'"),
    "token": (change(VOCAB + "tokens", 300, "mutant"), "tokens: found 'mutant', expected '"),
    "swapped tokens": (swapped_items(VOCAB + "tokens", 300, 301), "(token 300, and 1 more)"),
    "no tokens": (drop(VOCAB + "tokens"), "number of tokens: found 0, expected 512"),
    "swapped merges": (swapped_items(VOCAB + "merges", 3, 9), "(merge 3; the file has "),
    "lost merges": (lambda t: t[VOCAB + "merges"].pop(), "merges: found nothing, expected '"),
    "no merges": (drop(VOCAB + "merges"), "merges: found nothing, expected '"),
    "special token typed normal": (change(VOCAB + "token_type", 2, 1),
                                   "token types: found 'normal', expected 'control' (token 2, '<|start_header_id|>')"),
    "BOS": (put(VOCAB + "bos_token_id", 3), "BOS token: found '<|end_header_id|>', expected '<|begin_of_text|>'"),
    "EOS": (put(VOCAB + "eos_token_id", 0), "EOS token: found '<|begin_of_text|>', expected '<|eot_id|>'"),
    "no EOS": (drop(VOCAB + "eos_token_id"), "EOS token: found "),
    "EOT": (put(VOCAB + "eot_token_id", 20), "EOT token: found "),
    "add_bos": (put(VOCAB + "add_bos_token", False), "add_bos_token: found False, expected True"),
    "add_eos": (put(VOCAB + "add_eos_token", True), "add_eos_token: found True, expected False"),
    "no template": (drop("tokenizer.chat_template"), 'chat template: found nothing, expected "{{- bos_token }}'),
    "other template": (lambda t: t.update({"tokenizer.chat_template": t["tokenizer.chat_template"].replace(
        " | trim", "")}), "(4 of 4 conversations are rendered otherwise)"),
    "template that does not parse": (put("tokenizer.chat_template", "{% for"), "(4 of 4 conversations are rendered "),
}


@pytest.mark.parametrize("damage", BAD_METADATA)
def test_damaged_metadata_is_named(damage: str, tiny_llama: Path, tmp_path: Path) -> None:
    checkpoint = DenseCheckpoint.open(tiny_llama)
    edit, expected = BAD_METADATA[damage]
    found = texts(faults(audit_gguf(rewrite(exported(checkpoint, tmp_path), tmp_path / "f.gguf", edit), checkpoint)))
    assert any(expected in text for text in found), found
    if damage not in ("architecture", "no tokens", "width", "heads", "tokenizer model"):  # which hide other keys
        assert len(found) == 1


BAD_TENSORS: dict[str, tuple[Callable[[Tensors], None], str]] = {
    "missing": (drop("blk.1.ffn_up.weight"), "missing tensor: ffn_up.weight of layer 1 is missing"),
    "missing norm": (drop("output_norm.weight"), "missing tensor: output_norm.weight is missing"),
    "extra": (lambda t: t.update({"blk.7.ffn_up.weight": t["blk.1.ffn_up.weight"]}),
              "extra tensor: ffn_up.weight of layer 7 is not a tensor of this llama"),
    "extra bias": (lambda t: t.update({"blk.0.attn_q.bias": (np.ones(96, np.float32), QType.F32)}),
                   "extra tensor: attn_q.bias of layer 0 is not a tensor of this llama"),
    "another head": (lambda t: t.update({"output.weight": (t["token_embd.weight"][0] * 2, QType.F32)}),
                     "tensor values: output.weight differs from the model's by 1 of its RMS"),
    "shape": (edit_data("blk.0.ffn_up.weight", lambda a: a[:-8]),
              "tensor shape: ffn_up.weight of layer 0 is [88, 64], expected [96, 64]"),
    "transposed": (edit_data("blk.0.ffn_down.weight", lambda a: a.T),
                   "tensor shape: ffn_down.weight of layer 0 is [96, 64], expected [64, 96]"),
    "swapped layers": (swap("blk.0.attn_v.weight", "blk.1.attn_v.weight"),
                       "tensor swapped: attn_v.weight of layer 0 holds blk.1.attn_v.weight instead"),
    "gate and up swapped": (swap("blk.0.ffn_gate.weight", "blk.0.ffn_up.weight"),
                            "tensor swapped: ffn_gate.weight of layer 0 holds ffn_up.weight of the same layer instead"),
    "changed": (edit_data("blk.1.attn_output.weight", lambda a: a * 1.01),
                "tensor values: attn_output.weight of layer 1 differs from the model's by 0.01 of its RMS"),
    "one row zeroed": (edit_data("blk.1.attn_output.weight", lambda a: a * (np.arange(len(a)) != 5)[:, None]),
                       "tensor values: attn_output.weight of layer 1 differs"),
    "NaN": (edit_data("token_embd.weight", put_nan), "tensor not finite: token_embd.weight holds NaN or infinity"),
    "rope factors": (lambda t: t.update({"rope_freqs.weight": (np.full(12, 8, np.float32), QType.F32)}),
                     "rope scaling: rope_freqs.weight scales RoPE, which this model does not"),
}


@pytest.mark.parametrize("damage", BAD_TENSORS)
def test_damaged_tensors_are_named(damage: str, tiny_llama: Path, tmp_path: Path) -> None:
    checkpoint = DenseCheckpoint.open(tiny_llama)
    edit, expected = BAD_TENSORS[damage]
    damaged = rewrite(exported(checkpoint, tmp_path), tmp_path / "f.gguf", tensors=edit)
    found = texts(faults(audit_gguf(damaged, checkpoint)))
    assert expected in " | ".join(found)
    assert len(found) == (2 if "swapped" in damage else 1)


@pytest.mark.parametrize("encoding", ["f16", "q8_0", "q4_0"])
def test_rows_in_hugging_faces_order_are_named_for_all_layers(encoding: str, tmp_path: Path) -> None:
    """What a writer leaves that does not know of llama.cpp's order; and what one does to qwen3 that always permutes."""
    llama = DenseCheckpoint.open(make_tiny(tmp_path / "llama", layers=3))
    qwen3 = DenseCheckpoint.open(make_tiny(tmp_path / "qwen3", **FAMILIES["qwen3-tied"]))

    def reorder(checkpoint: DenseCheckpoint, back: bool) -> Callable[[Tensors], None]:
        def edit(table: Tensors) -> None:
            for name in table:
                heads = {"attn_q.weight": 4, "attn_k.weight": 2}.get(name.partition(".")[2].partition(".")[2])
                if heads:
                    data, kind = table[name]
                    halves = (heads, 12, 2, -1) if back else (heads, 2, 12, -1)
                    table[name] = data.reshape(halves).swapaxes(1, 2).reshape(data.shape), kind
        return edit

    for checkpoint, back, text in (
            (llama, True, "of layers 0..2 rows are not permuted for the rotary embedding, as this architecture needs"),
            (qwen3, False, "of layers 0..1 rows are permuted for the rotary embedding, as this architecture does not "
                           "want")):
        damaged = rewrite(exported(checkpoint, tmp_path, encoding), tmp_path / "f.gguf",
                          tensors=reorder(checkpoint, back))
        assert texts(audit_gguf(damaged, checkpoint)) == [f"tensor rows: attn_{kind}.weight {text}" for kind in "qk"]


def test_missing_and_other_llama3_scaling(tmp_path: Path) -> None:
    checkpoint = DenseCheckpoint.open(make_tiny(tmp_path / "model", **FAMILIES["llama-llama3-rope"]))
    file = exported(checkpoint, tmp_path)
    for edit, expected in (
            (drop("rope_freqs.weight"), "is missing: llama3's RoPE scaling would not be applied"),
            (edit_data("rope_freqs.weight", lambda a: a * 0 + 1), "is another llama3 RoPE scaling")):
        found = texts(audit_gguf(rewrite(file, tmp_path / "f.gguf", tensors=edit), checkpoint))
        assert found == [f"rope scaling: rope_freqs.weight {expected}"]


@pytest.mark.parametrize("shape, edit, expected", [
    ("llama-yarn", drop("llama.rope.scaling.type"), "found 'linear, factor 4', expected 'yarn, factor 4"),
    ("llama-yarn", put("llama.rope.scaling.original_context_length", 128), "factor 4, original context 128, "),
    ("llama-linear", drop("llama.rope.scaling.factor"), "found 'none', expected 'linear, factor 2'"),
    ("llama-yarn-attention-factor", drop("llama.rope.scaling.attn_factor"), "attention factor 1', expected ")])
def test_other_rope_scaling(shape: str, edit: Callable[[Metadata], None], expected: str, tmp_path: Path) -> None:
    checkpoint = DenseCheckpoint.open(make_tiny(tmp_path / "model", **MORE_SHAPES[shape]))
    found = texts(audit_gguf(rewrite(exported(checkpoint, tmp_path), tmp_path / "f.gguf", edit), checkpoint))
    assert len(found) == 1 and found[0].startswith("rope scaling: ") and expected in found[0]


@pytest.mark.parametrize("edit, expected", [
    (put(VOCAB + "scores", [-1000.0] * 512), "token scores: token "),
    (drop(VOCAB + "scores"), "token scores: found nothing, expected '512 scores'"),
    (swapped_items(VOCAB + "scores", 400, 500), "neighbours are out of order"),
    (put(VOCAB + "add_space_prefix", False), "space before the text: found False, expected True"),
    (change(VOCAB + "token_type", 20, 1), "token types: found 'normal', expected 'byte'")])
def test_other_sentencepiece(edit: Callable[[Metadata], None], expected: str, tmp_path: Path) -> None:
    checkpoint = DenseCheckpoint.open(make_tiny(tmp_path / "model", **FAMILIES["mistral-tied"]))
    found = texts(audit_gguf(rewrite(exported(checkpoint, tmp_path), tmp_path / "f.gguf", edit), checkpoint))
    assert len(found) == 1 and expected in found[0]


def test_only_the_order_of_scores_matters(tmp_path: Path) -> None:
    checkpoint = DenseCheckpoint.open(make_tiny(tmp_path / "model", **FAMILIES["mistral-tied"]))

    def rescale(table: Metadata) -> None:
        table[VOCAB + "scores"] = [score / 2 - 7 for score in table[VOCAB + "scores"]]
        del table[VOCAB + "add_space_prefix"], table[VOCAB + "add_bos_token"]

    assert texts(audit_gguf(rewrite(exported(checkpoint, tmp_path), tmp_path / "f.gguf", rescale), checkpoint)) == []


def test_another_model_of_the_same_shape(tiny_llama: Path, tmp_path: Path) -> None:
    other = DenseCheckpoint.open(make_tiny(tmp_path / "other", seed=1))
    found = audit_gguf(exported(other, tmp_path, "q4_0"), DenseCheckpoint.open(tiny_llama))
    assert {finding.name for finding in faults(found)} == {"tensor values"}
    assert any("ffn_up.weight of layers 0..1 differs" in finding.text for finding in found)


def test_a_tokenizer_that_gguf_cannot_hold_is_compared_in_part(tmp_path: Path) -> None:
    """As of Mistral and Llama 2: a space before the first word only, which lrc-edge does not write to GGUF."""
    checkpoint = DenseCheckpoint.open(make_tiny(tmp_path / "model", **FAMILIES["mistral-tied"]))
    file = exported(checkpoint, tmp_path)
    table = json.loads((checkpoint.path / "tokenizer.json").read_text())
    table["normalizer"] = None
    table["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    (checkpoint.path / "tokenizer.json").write_text(json.dumps(table))
    [note] = audit_gguf(file, checkpoint)
    assert note.severity == "note" and note.text.startswith("tokenizer: only in part comparable")
    damaged = rewrite(file, tmp_path / "f.gguf", put(VOCAB + "scores", [-1000.0] * 512))
    assert [finding.name for finding in faults(audit_gguf(damaged, checkpoint))] == ["token scores"]


def test_every_end_token_of_the_generation_config_counts(llama_copy: Path, tmp_path: Path) -> None:
    """A file that was written before the model had them does not name them; one that is written now does."""
    earlier = exported(DenseCheckpoint.open(llama_copy), tmp_path / "earlier")
    (llama_copy / "generation_config.json").write_text(json.dumps({"eos_token_id": [4, 300]}))
    checkpoint = DenseCheckpoint.open(llama_copy)
    [note] = audit_gguf(earlier, checkpoint)
    assert (note.name, note.severity) == ("end tokens", "note") and "llama.cpp would not stop at " in note.text
    assert not audit_gguf(exported(checkpoint, tmp_path / "now"), checkpoint)


def test_an_array_that_promises_more_than_the_file_holds(tiny_llama: Path, tmp_path: Path) -> None:
    """gguf.GGUFReader can go on reading beyond the end of the file, one empty value after the other."""
    checkpoint = DenseCheckpoint.open(tiny_llama)
    data = bytearray(exported(checkpoint, tmp_path).read_bytes())
    key = b"tokenizer.ggml.token_type"
    count = data.index(key) + len(key) + 8  # behind the types of the value and of its elements
    data[count:count + 8] = (1 << 40).to_bytes(8, "little")
    (tmp_path / "f.gguf").write_bytes(data)
    with pytest.raises(UserError, match=r"its header needs 4,398,046,511,104 bytes at .* the file has "):
        audit_gguf(tmp_path / "f.gguf", checkpoint)


# -- files that are no model, and damage by chance ---------------------------------------------------------------------

def test_truncated_files_name_both_sizes(tiny_llama: Path, tmp_path: Path) -> None:
    checkpoint = DenseCheckpoint.open(tiny_llama)
    file = exported(checkpoint, tmp_path)
    data, end = file.read_bytes(), max(t.data_offset + t.n_bytes for t in GGUFReader(file).tensors)
    cut = tmp_path / "cut.gguf"
    for size, message in ((end - 1, rf"truncated: its header describes {end:,} bytes, the file has {end - 1:,}; "),
                          (5000, r"truncated or corrupt: its header needs .* the file has 5,000; "),
                          (10, "truncated or corrupt"), (3, "not a GGUF file"), (0, "not a GGUF file")):
        cut.write_bytes(data[:size])
        with pytest.raises(UserError, match=message):
            audit_gguf(cut, checkpoint)
    with pytest.raises(UserError, match="not readable"):
        audit_gguf(tmp_path, checkpoint)


def test_one_part_of_several_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    checkpoint = DenseCheckpoint.open(tiny_llama)
    file = rewrite(exported(checkpoint, tmp_path), tmp_path / "f.gguf", put("split.count", 3))
    with pytest.raises(UserError, match=r"one of 3 parts of a model; join them with llama-gguf-split --merge"):
        audit_gguf(file, checkpoint)


@pytest.mark.parametrize("shape, encoding", [("llama-llama3-rope", "q8_0"), ("mistral-untied", "f16")])
def test_random_damage_gives_findings_or_a_user_error(shape: str, encoding: str, tmp_path: Path) -> None:
    checkpoint = DenseCheckpoint.open(make_tiny(tmp_path / "model", **FAMILIES[shape]))
    data = exported(checkpoint, tmp_path, encoding).read_bytes()
    header = data.index(b"token_embd.weight") + 4000
    file, seed, outcomes = tmp_path / "mutant.gguf", 1234, set()
    print(f"seed {seed}")
    chance = random.Random(seed)
    for _ in range(40):
        mutant = bytearray(data)
        for _ in range(chance.choice((1, 1, 3, 30))):
            place = chance.randrange(chance.choice((64, 2000, header, len(data))))
            mutant[place] = chance.choice((0, 1, 0x7f, 0xff, chance.randrange(256)))
        if chance.random() < 0.1:
            del mutant[chance.randrange(len(mutant)):]
        file.write_bytes(mutant)
        try:
            findings = audit_gguf(file, checkpoint)
            assert all("\n" not in finding.text for finding in findings)
            outcomes.add("findings" if findings else "none")
        except UserError as error:
            assert "\n" not in str(error)
            outcomes.add("error")
    assert outcomes >= {"findings", "error"}


# -- llama.cpp's own converter and quantizer ---------------------------------------------------------------------------

def converted(model: Path, converter: Path, target: Path, pre: str) -> Path:
    """An F16 file by llama.cpp's converter, told the pre-tokenizer's name, which it looks up by a hash of ids."""
    code = ("import sys; sys.path.insert(0, sys.argv.pop(1)); pre = sys.argv.pop(1); import convert_hf_to_gguf; "
            "from conversion.base import TextModel; TextModel.get_vocab_base_pre = lambda self, tokenizer: pre; "
            "convert_hf_to_gguf.main()")
    done = subprocess.run([sys.executable, "-c", code, str(converter.parent), pre, str(model), "--outtype", "f16",
                           "--outfile", str(target)], capture_output=True, text=True,
                          env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    return target


@pytest.fixture(scope="module")
def converter() -> Path:
    """convert_hf_to_gguf.py of the llama.cpp source that LLAMA_CPP_SOURCE names."""
    folder = os.environ.get("LLAMA_CPP_SOURCE")
    script = Path(folder or ".") / "convert_hf_to_gguf.py"
    if not folder or not script.exists():
        pytest.skip("LLAMA_CPP_SOURCE names no llama.cpp source with convert_hf_to_gguf.py")
    return script


@pytest.mark.parametrize("shape, pre", [
    ("llama-tied", "llama-bpe"), ("llama-untied", "smollm"), ("llama-llama3-rope", "llama-bpe"),
    ("qwen2-native", "qwen2"), ("qwen3-tied", "qwen2"), ("qwen3-untied", "gpt-2"), ("llama-linear", "llama-bpe"),
    ("llama-padded-vocabulary", "llama-bpe")])
def test_what_llama_cpp_writes_passes(shape: str, pre: str, converter: Path, tmp_path: Path) -> None:
    checkpoint = DenseCheckpoint.open(make_tiny(tmp_path / "model", **(FAMILIES | MORE_SHAPES)[shape]))
    file = converted(checkpoint.path, converter, tmp_path / "f16.gguf", pre)
    assert texts(audit_gguf(file, checkpoint)) == []
    for encoding in ("q8_0", "q4_k_m"):
        quantize_file(file, tmp_path / "quantized.gguf", ENCODINGS[encoding], 1)
        assert texts(audit_gguf(tmp_path / "quantized.gguf", checkpoint)) == []


def test_what_llama_cpps_converter_gets_wrong_is_named(converter: Path, tmp_path: Path) -> None:
    """Without tokenizer.model all scores are -1000; of yarn's attention_factor it writes a key that llama ignores."""
    for shape, expected in (("mistral-tied", {"token scores"}), ("llama-yarn-attention-factor", {"rope scaling"}),
                            ("qwen2-tied", {"architecture"})):
        checkpoint = DenseCheckpoint.open(make_tiny(tmp_path / shape, **(FAMILIES | MORE_SHAPES)[shape]))
        pre = "qwen2" if "qwen2" in shape else "llama-bpe"
        found = audit_gguf(converted(checkpoint.path, converter, tmp_path / "f16.gguf", pre), checkpoint)
        assert {finding.name for finding in faults(found)} == expected


def test_a_changed_checkpoint_is_not_what_the_file_describes(llama_copy: Path, tmp_path: Path) -> None:
    file = exported(DenseCheckpoint.open(llama_copy), tmp_path, "q8_0")
    changed = Path(shutil.copytree(llama_copy, tmp_path / "changed"))
    tensors = load_file(changed / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"] *= 1.1
    save_file(tensors, changed / "model.safetensors", metadata={"format": "pt"})
    [fault] = faults(audit_gguf(file, DenseCheckpoint.open(changed)))
    assert "ffn_down.weight of layer 1 differs" in fault.text
