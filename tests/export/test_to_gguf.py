"""GGUF files against independent readers: transformers' logits, gguf's dequantization, llama.cpp's loader."""
from __future__ import annotations

import json
import re
import tracemalloc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from families import FAMILIES
from gguf import GGMLQuantizationType as QType
from gguf import GGUFReader, quants
from recorder import Recorder
from tiny_models import make_tiny

from lrc_edge.artifact import sha256_of
from lrc_edge.checkpoint import DenseCheckpoint
from lrc_edge.console import QUIET
from lrc_edge.errors import UserError
from lrc_edge.export.gguf import to_gguf
from lrc_edge.export.gguf.metadata import architecture
from lrc_edge.export.gguf.to_gguf import check_gguf, export_gguf, file_name, interleave_rotary
from lrc_edge.export.gguf.vocabulary import read_vocabulary
from lrc_edge.export.passes import Passes
from lrc_edge.export.quantize.encodings import ENCODINGS
from lrc_edge.families import EMBEDDING, FINAL_NORM, HEAD, Role, Weight
from lrc_edge.families import FAMILIES as RECORDS
from lrc_edge.gguf_names import GGUF_NAMES, gguf_name
from lrc_edge.student import split_name
from lrc_edge.targets.runtimes.llamacpp import LlamaCpp

LINEAR = {"rope_type": "linear", "factor": 2.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
MORE_SHAPES: dict[str, dict[str, Any]] = {
    "llama-linear": dict(rope_scaling=LINEAR), "llama-yarn": dict(rope_scaling=YARN),
    "llama-yarn-attention-factor": dict(rope_scaling={**YARN, "attention_factor": 0.7}),
    "llama-square-heads": dict(head_dim=16, kv_heads=4), "llama-padded-vocabulary": dict(vocab_size=600),
    "llama-bf16": dict(dtype=torch.bfloat16),
    "qwen2-native": dict(family="qwen2", head_dim=16, tokenizer="qwen2"),
    "qwen2-yarn": dict(family="qwen2", head_dim=16, rope_scaling=YARN),
    "qwen3-linear": dict(family="qwen3", rope_scaling=LINEAR), "qwen3-yarn": dict(family="qwen3", rope_scaling=YARN),
}


def exported(checkpoint: DenseCheckpoint, tmp_path: Path, encoding: str = "f32") -> Path:
    [artifact] = export_gguf(checkpoint, tmp_path / "out" / "gguf", [encoding])
    return tmp_path / "out" / artifact.path


def kl_and_top1(reference: np.ndarray, logits: np.ndarray) -> tuple[float, float]:
    """Mean KL in nats, and the share of equal argmax where the reference's best two are not a near-tie."""
    p, q = (torch.log_softmax(torch.from_numpy(x).double(), -1) for x in (reference, logits))
    best = np.sort(reference, -1)[:, -2:]
    clear = best[:, 1] - best[:, 0] > 0.01
    return float((p.exp() * (p - q)).sum(-1).mean()), float((reference.argmax(-1) == logits.argmax(-1))[clear].mean())


def torch_logits(checkpoint: DenseCheckpoint, ids: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        return checkpoint.model()(torch.from_numpy(ids)[None]).logits[0].numpy()


@pytest.mark.parametrize("shape", FAMILIES | MORE_SHAPES)
def test_f32_has_the_logits_of_transformers(shape: str, tmp_path: Path) -> None:
    checkpoint = DenseCheckpoint.open(make_tiny(tmp_path / "model", **(FAMILIES | MORE_SHAPES)[shape]))
    ids = np.random.default_rng(0).integers(0, 500, 160)
    reference = torch_logits(checkpoint, ids)
    with LlamaCpp(exported(checkpoint, tmp_path), n_ctx=256, threads=1) as runtime:
        for logits in (runtime.prefill(ids), runtime.decode(ids)):
            kl, top1 = kl_and_top1(reference, logits)
            assert logits.shape == reference.shape and kl <= 1e-9 and top1 == 1


@pytest.mark.parametrize("encoding, limit", [("f16", 1e-4), ("bf16", 1e-3), ("q8_0", 5e-3)])
def test_smaller_types_stay_near(encoding: str, limit: float, tiny_llama: Path, tmp_path: Path) -> None:
    checkpoint = DenseCheckpoint.open(tiny_llama)
    ids = np.random.default_rng(0).integers(0, 500, 160)
    with LlamaCpp(exported(checkpoint, tmp_path, encoding), n_ctx=256, threads=1) as runtime:
        kl, _ = kl_and_top1(torch_logits(checkpoint, ids), runtime.prefill(ids))
    assert 0 < kl <= limit


@pytest.mark.parametrize("encoding", ["f32", "f16", "bf16", "q8_0", "q4_0"])
@pytest.mark.parametrize("shape", ["qwen3-untied", "qwen2-native"])  # of architectures that permute nothing
def test_file_holds_the_checkpoints_tensors(shape: str, encoding: str, tmp_path: Path) -> None:
    checkpoint = DenseCheckpoint.open(make_tiny(tmp_path / "model", **(FAMILIES | MORE_SHAPES)[shape]))
    stored = {t.name: quants.dequantize(t.data, t.tensor_type)
              for t in GGUFReader(exported(checkpoint, tmp_path, encoding)).tensors}
    weights = {gguf_name(weight): weight for weight in checkpoint.weights()}
    assert stored.keys() == weights.keys()
    for name, weight in weights.items():
        tensor = checkpoint.tensor(weight.name).numpy()
        # Half a step: of a float's mantissa, or of a block's grid (Q4_0 has 8 steps to its largest value).
        tolerance = {"f32": 0, "f16": 2**-11, "bf16": 2**-8, "q8_0": 1 / 254 + 2e-3, "q4_0": 0.13}[encoding]
        tolerance = tolerance if tensor.ndim > 1 else 0
        np.testing.assert_allclose(stored[name], tensor, rtol=0, atol=tolerance * np.abs(tensor).max())


def test_quantized_blocks_are_llama_cpps_own_rounding(tiny_llama: Path, tmp_path: Path) -> None:
    checkpoint = DenseCheckpoint.open(tiny_llama)
    tensors = {t.name: t for t in GGUFReader(exported(checkpoint, tmp_path, "q8_0")).tensors}
    original = checkpoint.tensor("model.layers.1.mlp.up_proj.weight").numpy()
    np.testing.assert_array_equal(tensors["blk.1.ffn_up.weight"].data, quants.quantize(original, QType.Q8_0))


def test_interleave_rotary_pairs_what_hugging_face_rotates_together() -> None:
    rows = torch.arange(2 * 6)  # 2 heads of 6: row i turns with row i + 3
    assert interleave_rotary(rows, 2).tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]


def test_every_role_has_a_name_and_an_unknown_one_is_an_error() -> None:
    of_layers = {role.name for family in RECORDS.values() for role in family.roles}
    assert GGUF_NAMES.keys() == of_layers | {EMBEDDING.name, HEAD.name, FINAL_NORM.name}
    with pytest.raises(ValueError, match="no name for role router"):
        gguf_name(Weight("x", Role("router", "x", ("head_dim",)), 0, (1,)))


@pytest.mark.parametrize("shape, expected", [
    ("llama-tied", "llama"), ("mistral-tied", "llama"), ("qwen3-tied", "qwen3"), ("qwen2-native", "qwen2"),
    ("qwen2-tied", "llama")])  # llama.cpp's qwen2 cannot have head_dim != hidden_size / heads
def test_architecture(shape: str, expected: str, tmp_path: Path) -> None:
    checkpoint = DenseCheckpoint.open(make_tiny(tmp_path / "model", **(FAMILIES | MORE_SHAPES)[shape]))
    assert architecture(checkpoint).name == expected


def student(tmp_path: Path, **settings: Any) -> Path:
    """A tiny llama that says of itself what a folded student says."""
    path = make_tiny(tmp_path / "Tiny Llama", **settings)
    card = {"license": "apache-2.0", "tags": ["lrc-edge"], "language": "en", "base_model": "someone/else"}
    (path / "README.md").write_text(f"---\n{yaml.safe_dump(card)}---\n# Tiny\n")
    (path / "lrc_edge.json").write_text(json.dumps({
        "name": "Tiny-LRC-64", "teacher": "acme/Big-1B", "teacher_revision": "abc123", "recipe_sha256": "ff00"}))
    (path / "generation_config.json").write_text(json.dumps({"do_sample": True, "temperature": 0.7, "top_k": 20}))
    return path


def test_metadata(tmp_path: Path) -> None:
    checkpoint = DenseCheckpoint.open(student(tmp_path, vocab_size=520))
    file = exported(checkpoint, tmp_path, "q8_0")
    fields = {name: field.contents() for name, field in GGUFReader(file).fields.items()}
    expected = {
        "general.architecture": "llama", "general.name": "Tiny-LRC-64", "general.basename": "Tiny",
        "general.finetune": "LRC-64", "general.size_label": "107K", "general.license": "apache-2.0",
        "general.tags": ["lrc-edge"], "general.languages": ["en"], "general.file_type": 7,
        "general.base_model.count": 1, "general.base_model.0.name": "Big-1B",
        "general.base_model.0.organization": "acme", "general.base_model.0.version": "abc123",
        "general.base_model.0.repo_url": "https://huggingface.co/acme/Big-1B",
        "general.sampling.temp": pytest.approx(0.7), "general.sampling.top_k": 20,
        "lrc_edge.teacher": "acme/Big-1B", "lrc_edge.recipe_sha256": "ff00",
        "llama.attention.key_length": 24, "llama.attention.value_length": 24, "llama.rope.dimension_count": 24,
        "llama.attention.head_count": 4, "llama.attention.head_count_kv": 2, "llama.context_length": 512,
        "llama.vocab_size": 520, "llama.rope.freq_base": 10000.0, "general.quantization_version": 2,
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 4, "tokenizer.ggml.eot_token_id": 4, "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False, "tokenizer.chat_template": checkpoint.tokenizer().chat_template}
    assert {key: fields.get(key) for key in expected} == expected
    assert fields["tokenizer.ggml.tokens"][512:] == [f"[PAD{i}]" for i in range(512, 520)]
    assert fields["general.quantized_by"].startswith("lrc-edge ")
    assert file.name == "Tiny-LRC-64-107K-Q8_0.gguf"


@pytest.mark.parametrize(("name", "parts"), [
    ("Foo-1B-LRC-256", ("Foo-1B", "LRC-256")), ("Foo-Edge-Base-Edge-64", ("Foo-Edge-Base", "Edge-64")),
    ("Foo-Edge-Base", ("Foo-Edge-Base", "")), ("LRC-1.5B", ("LRC-1.5B", "")), ("Foo", ("Foo", ""))])
def test_a_students_name_is_split_into_its_teachers_and_its_own(name: str, parts: tuple[str, str]) -> None:
    assert split_name(name) == parts


@pytest.mark.parametrize("name, expected", [
    ("Foo-LRC-256", "Foo-LRC-256-107K-Q4_K_M.gguf"), ("a b/../c", "a-b-..-c-107K-Q4_K_M.gguf"),
    ("Llama-3.2-1B", "Llama-3.2-1B-107K-Q4_K_M.gguf"), ("Tiny-100K", "Tiny-100K-Q4_K_M.gguf")])
def test_file_name(name: str, expected: str, tiny_llama: Path) -> None:
    assert file_name(DenseCheckpoint.open(tiny_llama, name), ENCODINGS["q4_k_m"]) == expected


def test_artifacts_say_what_was_written(tiny_llama: Path, tmp_path: Path) -> None:
    checkpoint = DenseCheckpoint.open(tiny_llama)
    artifacts = export_gguf(checkpoint, tmp_path / "gguf", ["q8_0", "f32", "F32"])
    assert [a.encoding for a in artifacts] == ["q8_0", "f32"]
    for artifact in artifacts:
        file = tmp_path / artifact.path
        assert (artifact.bytes, artifact.sha256) == (file.stat().st_size, sha256_of(file))
        assert sum(artifact.tensor_types.values()) == len(GGUFReader(file).tensors)
    assert artifacts[1].bits_per_weight == 32 and 8.5 < artifacts[0].bits_per_weight < 9
    assert {path.name for path in (tmp_path / "gguf").iterdir()} == {
        "Modelfile", *(Path(a.path).name for a in artifacts)}


@pytest.mark.parametrize("dtype, encoding", [(torch.bfloat16, "bf16"), (torch.float16, "f16"), (torch.float32, "f32")])
def test_a_quantized_type_alone_comes_from_a_lossless_file_that_goes_away(
        dtype: torch.dtype, encoding: str, tmp_path: Path) -> None:
    checkpoint = DenseCheckpoint.open(make_tiny(tmp_path / "model", dtype=dtype))
    assert to_gguf._lossless(checkpoint)[0].name == encoding
    file = exported(checkpoint, tmp_path, "q4_0")
    assert {path.name for path in file.parent.iterdir()} == {file.name, "Modelfile"}
    direct = exported(checkpoint, tmp_path / "again", "q4_0")
    assert export_gguf(checkpoint, tmp_path / "with-f32", ["f32", "q4_0"])[1].sha256 == sha256_of(direct)


def test_progress_counts_every_tensor_of_every_file(tmp_path: Path) -> None:
    checkpoint = DenseCheckpoint.open(make_tiny(tmp_path / "model", dtype=torch.bfloat16))
    stored_mb = sum(tensor.numel() for tensor in checkpoint.model().parameters()) * 2 / 1e6
    tensors = {gguf_name(weight) for weight in checkpoint.weights()}
    for encodings, on_grid, files in (
            (["q8_0", "bf16"], None, ["writing BF16", "quantizing Q8_0"]),
            (["q8_0", "f32"], None, ["writing F32", "quantizing Q8_0"]),
            (["f16", "q8_0"], None, ["writing F16", "writing bf16 to quantize", "quantizing Q8_0"]),
            (["q4_0", "q8_0"], checkpoint, ["writing bf16 to quantize", "quantizing Q4_0",
                                            "writing bf16 to quantize", "quantizing Q8_0"])):
        said = Recorder()
        export_gguf(checkpoint, tmp_path / "gguf", encodings, said, on_grid=on_grid)
        assert said.total == pytest.approx(len(files) * stored_mb) and said.unit == "MB"
        assert len(said.completed) == len(files) * (len(tensors) + 1)
        for number, file in enumerate(files):  # its own line, then one for each tensor, each with what is done before
            (name, done), *rows = said.updates[number * (len(tensors) + 1):(number + 1) * (len(tensors) + 1)]
            assert re.sub(r" [\w-]+-(\w+)\.gguf", r" \1", name) == file and done == pytest.approx(number * stored_mb)
            assert {row.removeprefix(f"{name}: ") for row, _ in rows} == tensors


def test_one_tensor_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = DenseCheckpoint.open(make_tiny(tmp_path / "model", layers=24, hidden_size=128, intermediate_size=256))
    read, alive = DenseCheckpoint.tensor, []

    def counting(self: DenseCheckpoint, name: str) -> torch.Tensor:
        assert not [r for r in alive if r() is not None], f"{name} is read while another tensor is held"
        tensor = read(self, name)
        alive.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(DenseCheckpoint, "tensor", counting)
    tracemalloc.start()
    passes = Passes({}, 1, QUIET)
    to_gguf._write(checkpoint, read_vocabulary(checkpoint), ENCODINGS["f16"], tmp_path / "file.gguf", passes)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(alive) == len(list(checkpoint.weights()))
    assert peak < (tmp_path / "file.gguf").stat().st_size / 3  # what Python and numpy hold: vocabulary and headers


def test_nothing_is_left_when_writing_fails(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(self: DenseCheckpoint, name: str) -> torch.Tensor:
        raise UserError("unreadable")

    monkeypatch.setattr(DenseCheckpoint, "tensor", failing)
    with pytest.raises(UserError, match="unreadable"):
        export_gguf(DenseCheckpoint.open(tiny_llama), tmp_path / "gguf", ["q8_0"])
    assert list((tmp_path / "gguf").iterdir()) == []


def test_f16_overflow_is_named(llama_copy: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(llama_copy / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = 1e5
    save_file(tensors, llama_copy / "model.safetensors", metadata={"format": "pt"})
    checkpoint = DenseCheckpoint.open(llama_copy)
    with pytest.raises(UserError, match=r"up_proj.weight has values beyond F16's largest, 65504; use bf16"):
        export_gguf(checkpoint, tmp_path / "gguf", ["f16"])
    export_gguf(checkpoint, tmp_path / "gguf", ["bf16"])


def edit_rope(**values: Any) -> Callable[[dict[str, Any]], None]:
    def edit(config: dict[str, Any]) -> None:
        config["rope_parameters"] = {"rope_theta": 10000.0, **values}
    return edit


@pytest.mark.parametrize("edit, message", [
    (edit_rope(rope_type="dynamic", factor=2.0), "RoPE scaling 'dynamic' is not supported in GGUF; supported: linear"),
    (edit_rope(**YARN, beta_slow=2), "beta_slow = 2 of RoPE scaling 'yarn' is not supported"),
    (edit_rope(rope_type="llama3", factor=2.0), "'llama3' lacks high_freq_factor"),
    (edit_rope(rope_type="default", partial_rotary_factor=0.5), "partial_rotary_factor"),
])
def test_rope_that_llama_cpp_cannot_do(edit: Callable[[dict[str, Any]], None], message: str, llama_copy: Path) -> None:
    config = json.loads((llama_copy / "config.json").read_text())
    edit(config)
    (llama_copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        check_gguf(DenseCheckpoint.open(llama_copy))


def test_llama3_rope_of_qwen3_is_refused(tmp_path: Path) -> None:
    rope = FAMILIES["llama-llama3-rope"]["rope_scaling"]
    path = make_tiny(tmp_path / "model", "qwen3", rope_scaling=rope, tokenizer="qwen2")
    with pytest.raises(UserError, match="no llama3 RoPE scaling for qwen3"):
        check_gguf(DenseCheckpoint.open(path))


def test_a_sliding_window_bounds_the_context(tmp_path: Path) -> None:
    checkpoint = DenseCheckpoint.open(make_tiny(tmp_path / "model", "mistral", tokenizer="spm", sliding_window=96))
    file = exported(checkpoint, tmp_path)
    assert GGUFReader(file).fields["llama.context_length"].contents() == 96
    ids = np.random.default_rng(0).integers(0, 500, 96)
    with LlamaCpp(file, n_ctx=96, threads=1) as runtime:
        assert kl_and_top1(torch_logits(checkpoint, ids), runtime.prefill(ids))[0] <= 1e-9


@pytest.mark.parametrize("tokenizer, template", [("llama3", "<|start_header_id|>{{ .Role }}<|end_header_id|>"),
                                                 ("qwen2", "<|im_start|>{{ .Role }}"), ("spm", None)])
def test_modelfile(tokenizer: str, template: str | None, tmp_path: Path) -> None:
    path = student(tmp_path, tokenizer=tokenizer)
    export_gguf(DenseCheckpoint.open(path), tmp_path / "gguf", ["f32", "q8_0"])
    text = (tmp_path / "gguf" / "Modelfile").read_text()
    stop = {"llama3": "<|eot_id|>", "qwen2": "<|im_end|>", "spm": "</s>"}[tokenizer]
    assert text.startswith("FROM ./Tiny-LRC-64-107K-Q8_0.gguf\n")
    assert f'PARAMETER stop "{stop}"\n' in text and 'LICENSE """apache-2.0"""' in text
    assert ("TEMPLATE" in text) == (template is not None) and (template or "") in text


def test_modelfile_without_a_known_template_says_so(tmp_path: Path) -> None:
    path = student(tmp_path)
    (path / "chat_template.jinja").write_text("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}")
    export_gguf(DenseCheckpoint.open(path), tmp_path / "gguf", ["f32"])
    text = (tmp_path / "gguf" / "Modelfile").read_text()
    assert "\nTEMPLATE" not in text and "# No TEMPLATE" in text
