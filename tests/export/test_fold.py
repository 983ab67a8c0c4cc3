"""The folded student equals the clone, is an ordinary Hugging Face directory, and carries what the teacher had."""
from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from families import FAMILIES, LLAMA3_ROPE
from safetensors.torch import load_file, save_file
from starts import gaussian_values
from tiny_models import make_tiny
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from lrc_edge import checkpoint_writer
from lrc_edge.checkpoint import DenseCheckpoint
from lrc_edge.errors import UserError
from lrc_edge.export.card import model_card
from lrc_edge.export.fold import fold
from lrc_edge.lineage import COPIED_AXES, MAPPED_AXES, Lineage
from lrc_edge.train.clone import Clone
from lrc_edge.train.loop.trainer import save_trained
from lrc_edge.train.phases import DENSE

PROVENANCE = {"name": "tiny-LRC-32", "teacher": "someone/tiny", "method": "dense distillation", "init": "pca"}


def folded(tmp_path: Path, **options: object) -> tuple[Clone, DenseCheckpoint, DenseCheckpoint]:
    path = make_tiny(tmp_path / "teacher", **options)  # type: ignore[arg-type]
    (path / "README.md").write_text("---\nlicense: llama3.2\nlanguage: [en]\n---\n")
    (path / "LICENSE").write_text("The licence.")
    (path / "generation_config.json").write_text('{"temperature": 0.6, "do_sample": true}')
    teacher = DenseCheckpoint.open(path)
    clone = Clone(teacher.model(), Lineage.of(teacher.shape, teacher.shape.with_hidden_size(32)))
    clone.initialize(gaussian_values(clone, seed=3))
    with torch.no_grad():  # 0.02 is so small that every model would say the same
        for name, p in clone.trainable().items():
            p.mul_(8.0 if p.ndim > 1 else 1.3).add_(0.01 * len(name) % 0.07)
    clone.compose_()
    save_trained(clone, tmp_path / "projections.safetensors")
    return clone, teacher, fold(teacher, tmp_path / "projections.safetensors", tmp_path / "student", PROVENANCE)


@pytest.mark.parametrize("name", FAMILIES)
def test_folded_equals_clone(name: str, tmp_path: Path) -> None:
    clone, _, student = folded(tmp_path, **FAMILIES[name])
    ids = torch.randint(0, 500, (4, 128), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = clone.student(ids).logits
        got = AutoModelForCausalLM.from_pretrained(student.path)(ids).logits  # as a stranger loads it
    assert expected.std() > 0.05
    assert (expected - got).abs().max() <= 1e-4
    assert (expected.argmax(-1) == got.argmax(-1)).all()


def test_config_is_right_for_both_transformers(tmp_path: Path) -> None:
    _, teacher, student = folded(tmp_path, rope_scaling=LLAMA3_ROPE, rope_theta=500000.0)
    raw = json.loads((student.path / "config.json").read_text())
    assert raw["hidden_size"] == 32 and raw["head_dim"] == 24 and raw["rms_norm_eps"] == 1e-5
    assert raw["rope_theta"] == 500000.0 and raw["rope_scaling"] == LLAMA3_ROPE  # what 4.57 reads
    assert raw["rope_parameters"] == {**LLAMA3_ROPE, "rope_theta": 500000.0}  # what 5 reads
    config, model = AutoConfig.from_pretrained(student.path), student.model()
    assert config.head_dim == 24 and config.vocab_size == 512
    torch.testing.assert_close(model.model.rotary_emb.inv_freq, teacher.model().model.rotary_emb.inv_freq)


def test_what_the_teacher_had_is_carried_over(tmp_path: Path) -> None:
    _, teacher, student = folded(tmp_path)
    ours, expected = AutoTokenizer.from_pretrained(student.path), teacher.tokenizer()
    text = "Hello <|eot_id|> the  world, 12345 é 😀\n"
    assert ours(text)["input_ids"] == expected(text)["input_ids"]
    assert ours.chat_template == expected.chat_template and ours.chat_template
    assert ours.eos_token == expected.eos_token and ours.bos_token == expected.bos_token
    assert json.loads((student.path / "generation_config.json").read_text())["temperature"] == 0.6
    assert (student.path / "LICENSE").read_text() == "The licence."
    assert json.loads((student.path / "tokenizer_config.json").read_text())["tokenizer_class"] != "TokenizersBackend"


def test_model_card_has_licence_and_lineage(tmp_path: Path) -> None:
    _, _, student = folded(tmp_path)
    front = yaml.safe_load((student.path / "README.md").read_text().split("---\n")[1])
    assert front["license"] == "llama3.2" and front["base_model"] == "someone/tiny" and front["language"] == ["en"]
    assert student.name == "tiny-LRC-32"
    lineage = json.loads(student.provenance["lineage"])
    assert student.provenance == {**PROVENANCE, "lineage": student.provenance["lineage"]}
    assert lineage == {**dict.fromkeys((*COPIED_AXES, *MAPPED_AXES), "identity"), "hidden_size": "projection",
                       "layers": [0, 1]}
    card = (student.path / "README.md").read_text()
    assert "A student of someone/tiny" in card and "initialization: pca). Training: dense distillation." in card
    assert "| hidden size | 64 | 32 |" in card and "| query / key-value heads | 4 / 2 | 4 / 2 |" in card


def test_model_card_shows_each_models_own_shape(tmp_path: Path) -> None:
    teacher = DenseCheckpoint.open(make_tiny(tmp_path / "teacher"))
    card = model_card(teacher, replace(teacher.shape, num_attention_heads=2, num_key_value_heads=1), PROVENANCE)
    assert "| query / key-value heads | 4 / 2 | 2 / 1 |" in card


def test_several_shards_are_the_same_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, teacher, whole = folded(tmp_path)
    monkeypatch.setattr(checkpoint_writer, "SHARD_BYTES", 40_000)
    sharded = fold(teacher, tmp_path / "projections.safetensors", tmp_path / "sharded", PROVENANCE)
    assert len(sharded.weight_files()) > 1
    expected = dict(whole.model().named_parameters())
    for name, p in AutoModelForCausalLM.from_pretrained(sharded.path).named_parameters():
        torch.testing.assert_close(p, expected[name], rtol=0, atol=0)


def test_folded_dense_phase_equals_clone(tmp_path: Path) -> None:
    """After a dense phase the file holds weights, which are what is written."""
    teacher = DenseCheckpoint.open(make_tiny(tmp_path / "teacher", family="qwen2", tied=False, tokenizer="qwen2"))
    clone = Clone(teacher.model(), Lineage.of(teacher.shape, teacher.shape.with_hidden_size(32)))
    clone.initialize(gaussian_values(clone, seed=3))
    clone.start(DENSE)
    with torch.no_grad():
        for p in clone.trainable().values():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) * 0.1)
    save_trained(clone, tmp_path / "trained.safetensors")
    student = fold(teacher, tmp_path / "trained.safetensors", tmp_path / "student", PROVENANCE)
    ids = torch.randint(0, 500, (4, 128), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(student.model()(ids).logits, clone.student(ids).logits)


def test_projections_of_another_teacher_are_refused(tmp_path: Path) -> None:
    _, teacher, _ = folded(tmp_path)
    tensors = load_file(tmp_path / "projections.safetensors")
    metadata = Lineage.of(teacher.shape, teacher.shape.with_hidden_size(32)).metadata("projections")
    name = "model.layers.0.self_attn.q_proj.weight"
    save_file({**tensors, name: torch.zeros(48, 32)}, tmp_path / "bad.safetensors", metadata)
    with pytest.raises(UserError, match=r"q_proj.weight is \[48, 32\], need \[64, 32\]"):
        fold(teacher, tmp_path / "bad.safetensors", tmp_path / "x", PROVENANCE)
    tensors |= {"model.layers.9.mlp.up_proj.weight": torch.zeros(64, 32)}
    save_file(tensors, tmp_path / "bad.safetensors", metadata)
    with pytest.raises(UserError, match=r"layers.9.*belongs to no weight"):
        fold(teacher, tmp_path / "bad.safetensors", tmp_path / "x", PROVENANCE)
    del tensors[name], tensors["model.layers.9.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "bad.safetensors", metadata)
    with pytest.raises(UserError, match=r"q_proj.weight is missing"):
        fold(teacher, tmp_path / "bad.safetensors", tmp_path / "x", PROVENANCE)
    wider = DenseCheckpoint.open(make_tiny(tmp_path / "wider", hidden_size=96))
    with pytest.raises(UserError, match="trained on a teacher of another shape; fold with the teacher that it was"):
        fold(wider, tmp_path / "projections.safetensors", tmp_path / "x", PROVENANCE)
    assert not (tmp_path / "x").exists()


def test_a_file_without_lineage_is_refused(tmp_path: Path) -> None:
    """A file of another version has no metadata that names the student."""
    _, teacher, _ = folded(tmp_path)
    save_file(load_file(tmp_path / "projections.safetensors"), tmp_path / "old.safetensors", {"kind": "projections"})
    with pytest.raises(UserError, match=r"its metadata does not describe a student .* build or train again"):
        fold(teacher, tmp_path / "old.safetensors", tmp_path / "x", PROVENANCE)
    assert not (tmp_path / "x").exists()
