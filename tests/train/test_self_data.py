"""The teacher's own samples: the file that a cut run continues, and what is sampled."""
from __future__ import annotations

import json
import shutil
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import make_tiny

from lrc_edge.checkpoint import DenseCheckpoint
from lrc_edge.errors import UserError
from lrc_edge.train.data import self_data
from lrc_edge.train.data.self_data import self_documents


def sample(teacher: Path, file: Path, n: int, **changes: Any) -> list[str]:
    settings: dict[str, Any] = {"max_length": 12, "seed": 0, "device": torch.device("cpu"), "dtype": torch.float32,
                                "batch": 4}
    return list(islice(self_documents(DenseCheckpoint.open(teacher), file, **{**settings, **changes}), n))


@pytest.fixture(scope="module")
def whole(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("self") / "self.jsonl"
    texts = sample(tiny_llama, file, 12)
    assert [json.loads(line)["text"] for line in file.read_text().splitlines()] == texts
    return file


def test_samples_differ_and_depend_on_the_seed(tiny_llama: Path, whole: Path, tmp_path: Path) -> None:
    texts = [json.loads(line)["text"] for line in whole.read_text().splitlines()]
    assert len(texts) == 12 and len(set(texts)) == 12
    assert sample(tiny_llama, tmp_path / "again", 12) == texts
    assert sample(tiny_llama, tmp_path / "other", 4, seed=1) != texts[:4]


@pytest.mark.parametrize("kept", [0, 0.2, 0.5, 0.7, 1.0])
def test_a_cut_file_is_continued_to_the_same_corpus(kept: float, tiny_llama: Path, whole: Path, tmp_path: Path) -> None:
    """Cut anywhere, a torn line and a torn batch go; what was whole is told first and not sampled again."""
    content = whole.read_bytes()
    file = tmp_path / "self.jsonl"
    file.write_bytes(content[:int(len(content) * kept)])
    texts = sample(tiny_llama, file, 12)
    assert file.read_bytes() == content
    assert texts == [json.loads(line)["text"] for line in content.splitlines()]


def test_whole_batches_need_no_model(whole: Path, tiny_llama: Path, tmp_path: Path,
                                     monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(whole, tmp_path / "self.jsonl")
    monkeypatch.setattr(DenseCheckpoint, "model", lambda *_: pytest.fail("loaded"))
    assert len(sample(tiny_llama, tmp_path / "self.jsonl", 12)) == 12


def test_temperature_1_whatever_the_teachers_own_settings(tiny_llama: Path, tmp_path: Path) -> None:
    """A penalty, a top-k and a temperature in generation_config.json would make another distribution."""
    copy = Path(shutil.copytree(tiny_llama, tmp_path / "teacher"))
    (copy / "generation_config.json").write_text(json.dumps({
        "do_sample": True, "temperature": 0.1, "top_k": 1, "repetition_penalty": 1.5, "eos_token_id": [1, 4]}))
    teacher = DenseCheckpoint.open(copy)
    sampler = self_data._Sampler(teacher, 2, torch.device("cpu"), torch.float32)
    begin = sampler.begin.expand(4000, 1)
    torch.manual_seed(0)
    found = sampler.model.generate(begin, attention_mask=torch.ones_like(begin))[:, 1]
    with torch.inference_mode():
        expected = teacher.model()(sampler.begin).logits[0, -1].softmax(-1)
    counts = torch.bincount(found, minlength=512) / 4000
    assert (counts - expected).abs().max() < 0.03 and sampler.ends == {1, 4}
    assert sampler._to_end([7, 1, 1]) == [7] and sampler._to_end([7, 8]) == [7, 8]


def test_a_tokenizer_without_bos_begins_with_eos(tmp_path: Path) -> None:
    teacher = DenseCheckpoint.open(make_tiny(tmp_path / "teacher", "qwen2", tokenizer="qwen2"))
    sampler = self_data._Sampler(teacher, 8, torch.device("cpu"), torch.float32)
    assert sampler.begin.item() == teacher.tokenizer().eos_token_id
    assert len(sampler(3, 0)) == 3


def test_a_teacher_that_says_nothing(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_data._Sampler, "__call__", lambda self, batch, seed: [" "] * batch)
    with pytest.raises(UserError, match="ended 4 texts before their first word"):
        sample(tiny_llama, tmp_path / "self.jsonl", 1)


def test_rope_of_a_sampler_in_bfloat16_stays_in_float32(tiny_llama: Path) -> None:
    """RoPE's frequencies in bfloat16 turn a late position by a wrong angle."""
    teacher = DenseCheckpoint.open(tiny_llama)
    sampler = self_data._Sampler(teacher, 8, torch.device("cpu"), torch.bfloat16)
    assert sampler.model.lm_head.weight.dtype == torch.bfloat16
    assert torch.equal(sampler.model.model.rotary_emb.inv_freq, teacher.model().model.rotary_emb.inv_freq)
    assert sampler.model.model.rotary_emb.inv_freq.dtype == torch.float32
