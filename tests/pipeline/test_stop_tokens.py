"""Stop tokens: one list, and every file and runtime ends at each of its ids."""
from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import make_tiny

from lrc_edge.checkpoint import DenseCheckpoint
from lrc_edge.errors import UserError
from lrc_edge.export.gguf import vocabulary as tokenizer_module
from lrc_edge.export.gguf.to_gguf import export_gguf
from lrc_edge.export.gguf.vocabulary import check_tokenizer, read_vocabulary
from lrc_edge.export.onnx.to_onnx import export_onnx
from lrc_edge.targets.runtimes.llamacpp import LlamaCpp
from lrc_edge.targets.runtimes.ort_genai import OrtGenai
from lrc_edge.train.data.self_data import _Sampler

UNKNOWN = ("<stop-0>", "<stop-1>", "<stop-2>", "<stop-3>")  # ids 512 to 515; llama.cpp knows no such text


def edit(file: Path, **fields: Any) -> None:
    table = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**table, **fields}))


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One model for each tokenizer, with four special tokens of its own."""
    folder = tmp_path_factory.mktemp("stops")
    for kind in ("gpt2", "llama3"):
        path = make_tiny(folder / kind, tokenizer=kind, vocab_size=520)
        file = path / "tokenizer.json"
        table = json.loads(file.read_text())
        table["added_tokens"] += [{"id": 512 + i, "content": text, "special": True, "single_word": False,
                                   "lstrip": False, "rstrip": False, "normalized": False}
                                  for i, text in enumerate(UNKNOWN)]
        file.write_text(json.dumps(table))
    return folder


def model(models: Path, tmp_path: Path, kind: str, eos: list[int]) -> DenseCheckpoint:
    """A copy whose generation_config.json names these ids, besides those that config and tokenizer name."""
    path = Path(shutil.copytree(models / kind, tmp_path / "model"))
    edit(path / "generation_config.json", eos_token_id=eos)
    return DenseCheckpoint.open(path)


def test_order_and_sources(models: Path, tmp_path: Path) -> None:
    found = model(models, tmp_path, "llama3", [513, 1, 513])
    edit(found.path / "config.json", eos_token_id=[1, 2])
    assert DenseCheckpoint.open(found.path).stop_ids() == (513, 1, 2, 4)  # 4: the tokenizer's <|eot_id|>
    (found.path / "generation_config.json").unlink()
    edit(found.path / "config.json", eos_token_id=7)
    assert DenseCheckpoint.open(found.path).stop_ids() == (7, 4)
    edit(found.path / "config.json", eos_token_id=None)
    edit(found.path / "tokenizer_config.json", eos_token=None)
    assert DenseCheckpoint.open(found.path).stop_ids() == ()


@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
@pytest.mark.parametrize("eos", ["x", [1, "x"], 520, -1, True, 1.0, [[1]], {"id": 1}, 10**30])
def test_ids_that_are_none(file: str, eos: Any, models: Path, tmp_path: Path) -> None:
    path = model(models, tmp_path, "llama3", [1]).path
    edit(path / file, eos_token_id=eos)
    with pytest.raises(UserError, match=rf"{file}: eos_token_id = .*need token ids from 0 to 519; fix the file"):
        DenseCheckpoint.open(path)


def test_an_eos_of_the_tokenizer_beyond_the_vocabulary(models: Path, tmp_path: Path) -> None:
    checkpoint = model(models, tmp_path, "llama3", [1])
    tokenizer = checkpoint.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<more-{i}>" for i in range(9)]})
    tokenizer.eos_token = "<more-8>"
    with pytest.raises(UserError, match=r"the tokenizer's eos_token_id = 524, need token ids from 0 to 519"):
        checkpoint.stop_ids(tokenizer)


CASES = [
    ("gpt2", [0], {"eos": 0}), ("gpt2", [512], {"eos": 0, "eot": 512}),
    ("gpt2", [513, 512], {"eos": 0, "eot": 513, "eom": 512}),
    ("llama3", [1, 4], {"eos": 4, "eot": 4}), ("llama3", [1, 4, 512], {"eos": 4, "eot": 4, "eom": 512}),
    # <|eot_id|> is the EOS and known by its text, so its place as the EOT is free.
    ("llama3", [512, 513], {"eos": 4, "eom": 512, "eot": 513}),
    ("gpt2", [519], {"eos": 0, "eot": 519}),  # a row of the embedding without a token
]


@pytest.mark.parametrize("kind, eos, places", CASES)
def test_llama_cpp_ends_at_each(kind: str, eos: list[int], places: dict[str, int], models: Path,
                                tmp_path: Path) -> None:
    checkpoint = model(models, tmp_path, kind, eos)
    ids = read_vocabulary(checkpoint).special_ids
    assert {name: ids.get(name) for name in ("eos", "eot", "eom") if name in ids} == places
    [artifact] = export_gguf(checkpoint, tmp_path / "gguf", ["f16"])
    with LlamaCpp(tmp_path / artifact.path, n_ctx=64, threads=1) as runtime:
        assert set(checkpoint.stop_ids()) <= runtime.end_tokens
        assert runtime.end_tokens <= {*checkpoint.stop_ids(), 0, 1}  # <|endoftext|>, <|end_of_text|>


def test_without_their_places_llama_cpp_would_not_end(models: Path, tmp_path: Path,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_module, "_places_of_stops", lambda *_: {})
    checkpoint = model(models, tmp_path, "gpt2", [513, 512])
    [artifact] = export_gguf(checkpoint, tmp_path / "gguf", ["f16"])
    with LlamaCpp(tmp_path / artifact.path, n_ctx=64, threads=1) as runtime:
        assert set(checkpoint.stop_ids()) - runtime.end_tokens == {512, 513}


def test_more_than_gguf_holds(models: Path, tmp_path: Path) -> None:
    checkpoint = model(models, tmp_path, "gpt2", [512, 513, 514])
    with pytest.raises(UserError, match=r"name 4 tokens that end .* does not know \(0, 512, 513, 514\); GGUF holds 3"):
        check_tokenizer(checkpoint)


def test_the_modelfile_and_genai_name_each(models: Path, tmp_path: Path) -> None:
    checkpoint = model(models, tmp_path, "llama3", [513, 1, 300])
    export_gguf(checkpoint, tmp_path / "gguf", ["f16"])
    lines = (tmp_path / "gguf" / "Modelfile").read_text().splitlines()
    assert [line for line in lines if "stop" in line] == [  # 300 is a piece of a word: the GGUF alone names it
        f'PARAMETER stop "{text}"' for text in ("<|eot_id|>", "<stop-1>", "<|end_of_text|>")]
    export_onnx(checkpoint, tmp_path / "onnx", ["fp32"])
    runtime = OrtGenai(tmp_path / "onnx")
    assert list(map(int, runtime._tokenizer.eos_token_ids)) == list(checkpoint.stop_ids()) == [513, 1, 300, 4]
    runtime.close()


def test_the_teacher_s_own_text_ends_at_each(models: Path, tmp_path: Path) -> None:
    checkpoint = model(models, tmp_path, "llama3", [513])
    edit(checkpoint.path / "config.json", eos_token_id=1)
    checkpoint = DenseCheckpoint.open(checkpoint.path)
    sampler = _Sampler(checkpoint, 16, torch.device("cpu"), torch.float32)
    assert sampler.ends == {513, 1, 4} and sampler.model.generation_config.eos_token_id == [1, 4, 513]
