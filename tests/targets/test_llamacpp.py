"""The llama.cpp runtime: generation, text, chat templates, and its errors in a line."""
from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import make_tiny

from lrc_edge.checkpoint import DenseCheckpoint
from lrc_edge.errors import UserError
from lrc_edge.export.gguf.to_gguf import export_gguf
from lrc_edge.targets.runtimes.llamacpp import CHUNK, LlamaCpp
from lrc_edge.targets.runtimes.protocol import Runtime, TextRuntime

CONVERSATION = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi é 😀\n<|eot_id|> {{ x }}"},
                {"role": "assistant", "content": "Hello!"}, {"role": "user", "content": "How are you?"}]


def gguf_of(path: Path, out: Path, encoding: str = "f32") -> Path:
    [artifact] = export_gguf(DenseCheckpoint.open(path), out / "gguf", [encoding])
    return out / artifact.path


@pytest.fixture(scope="module")
def llama_file(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gguf_of(tiny_llama, tmp_path_factory.mktemp("llama"))


@pytest.fixture
def runtime(llama_file: Path) -> Iterator[LlamaCpp]:
    with LlamaCpp(llama_file, n_ctx=256, threads=1) as runtime:
        yield runtime


def test_it_is_a_text_runtime(runtime: LlamaCpp) -> None:
    assert isinstance(runtime, Runtime) and isinstance(runtime, TextRuntime)
    assert runtime.label.startswith("llama.cpp (llama-cpp-python ")


def test_greedy_generation_is_transformers(tiny_llama: Path, runtime: LlamaCpp) -> None:
    model = DenseCheckpoint.open(tiny_llama).model()
    prompt = runtime.tokenize("The list of")
    ids = torch.tensor([prompt])
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False,
                              eos_token_id=None)[0, len(prompt):].tolist()
    assert runtime.generate(prompt, 24, set()) == expected
    stop = expected[5]
    assert runtime.generate(prompt, 24, {stop}) == expected[:expected.index(stop)]
    assert runtime.generate(prompt, 0, set()) == []


def test_rows_do_not_see_each_other(runtime: LlamaCpp) -> None:
    ids = np.random.default_rng(1).integers(0, 500, 40)
    first = runtime.prefill(ids)
    runtime.generate(list(range(20)), 5, set())
    np.testing.assert_array_equal(runtime.prefill(ids), first)
    np.testing.assert_allclose(runtime.decode(ids), first, atol=1e-4)
    assert runtime.prefill(ids[:0]).shape == (0, 512)


def test_a_row_longer_than_a_chunk(tmp_path: Path) -> None:
    checkpoint = DenseCheckpoint.open(make_tiny(tmp_path / "model", max_position_embeddings=1024))
    ids = np.random.default_rng(0).integers(0, 500, CHUNK + 88)
    with torch.inference_mode():
        expected = checkpoint.model()(torch.from_numpy(ids)[None]).logits[0].numpy()
    with LlamaCpp(gguf_of(checkpoint.path, tmp_path), n_ctx=0, threads=1) as runtime:
        assert runtime.n_ctx == 1024
        np.testing.assert_allclose(runtime.prefill(ids), expected, atol=2e-3)
        assert len(runtime.generate(ids.tolist(), 3, set())) == 3


def test_text(tiny_llama: Path, runtime: LlamaCpp) -> None:
    tokenizer = DenseCheckpoint.open(tiny_llama).tokenizer()
    for text in ("Hello, world!", "a\0b", "", " ß 中 😀 ", "<|eot_id|>x"):
        assert runtime.tokenize(text) == tokenizer.encode(text)
    ids = runtime.tokenize("Grüße , 中 😀 's !")
    assert runtime.detokenize(ids) == "Grüße , 中 😀 's !"  # the BOS left out, no space taken away
    assert runtime.piece(4) == b"" and runtime.piece(4, special=True) == b"<|eot_id|>"
    assert runtime.end_tokens == {1, 4}


@pytest.mark.parametrize("tokenizer", ["llama3", "qwen2"])
def test_chat_template(tokenizer: str, tmp_path: Path) -> None:
    path = make_tiny(tmp_path / "model", tokenizer=tokenizer)
    reference = DenseCheckpoint.open(path).tokenizer()
    expected = reference.apply_chat_template(CONVERSATION, tokenize=False, add_generation_prompt=True)
    with LlamaCpp(gguf_of(path, tmp_path), n_ctx=64, threads=1) as runtime:
        text, ids = runtime.render_chat(CONVERSATION)
        assert text == expected
        assert ids == reference.apply_chat_template(CONVERSATION, add_generation_prompt=True)["input_ids"]
        assert ids.count(0) == (tokenizer == "llama3")  # one BOS, which the template writes


def test_a_template_that_libllama_itself_does_not_know(llama_copy: Path, tmp_path: Path) -> None:
    (llama_copy / "chat_template.jinja").write_text("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}")
    with LlamaCpp(gguf_of(llama_copy, tmp_path), n_ctx=64, threads=1) as runtime:
        assert runtime.render_chat(CONVERSATION[:1])[0] == "<system>Be brief."


def test_no_chat_template(tmp_path: Path) -> None:
    path = make_tiny(tmp_path / "model", tokenizer="gpt2")
    with LlamaCpp(gguf_of(path, tmp_path), n_ctx=64, threads=1) as runtime:
        with pytest.raises(UserError, match="holds no chat template"):
            runtime.render_chat(CONVERSATION)


def test_files_that_do_not_load(llama_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "noise.gguf").write_bytes(b"noise" * 100)
    (tmp_path / "half.gguf").write_bytes(llama_file.read_bytes()[:-50_000])
    for name, reason in (("noise.gguf", "invalid magic"), ("half.gguf", "not within the file bounds"),
                         ("missing.gguf", "failed to open")):
        with pytest.raises(UserError, match=rf"{name}: llama.cpp cannot load this file \(.*{reason}") as caught:
            LlamaCpp(tmp_path / name)
        assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""


def test_misuse(llama_file: Path) -> None:
    runtime = LlamaCpp(llama_file, n_ctx=256, threads=1)
    with pytest.raises(ValueError, match="a row of 257 tokens in a context of 256"):
        runtime.prefill(np.zeros(257, dtype=np.int64))
    runtime.close()
    runtime.close()
    with pytest.raises(ValueError, match=r"used after close\(\)"):
        runtime.prefill(np.zeros(2, dtype=np.int64))


def test_llama_cpp_is_silent(llama_file: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with LlamaCpp(llama_file, n_ctx=2048, threads=1) as runtime:  # more than the model's 512: a warning
        runtime.tokenize("<|begin_of_text|>twice")  # another
    assert capfd.readouterr() == ("", "")
