"""The two onnxruntimes: logits, generation, tokenizer and chat template against PyTorch and Hugging Face."""
from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from tiny_models import make_tiny

from lrc_edge.checkpoint import DenseCheckpoint
from lrc_edge.errors import UserError
from lrc_edge.export.onnx.to_onnx import FILES, export_onnx
from lrc_edge.parity import compare
from lrc_edge.targets.proof.reference import Reference
from lrc_edge.targets.runtimes.onnxrt import OnnxRuntime
from lrc_edge.targets.runtimes.ort_genai import OrtGenai
from lrc_edge.targets.runtimes.protocol import Runtime, TextRuntime

TEXTS = [
    "", " ", "  ", "\n", "\n\n\n", "\t", "Hello", " Hello", "Hello ", "Hello, world!", "  two  spaces  ", "a\n\nb\n",
    "tab\there", "a\r\nb", "1", "12", "1234567 89", "3.14159e-10", "don't I'LL we've HE'S", "naïve café", "e\u0301",
    "\u00e9", "日本語 テスト", "中文字符", "العربية", "हिन्दी", "ελληνικά", "Ünïcödé ẞ", "😀", "👩‍👩‍👧 family",
    "🇫🇷🇩🇪", "ﬁ ① ²", "\u00a0nbsp", "\u200bzero width", "def f(x):\n    return x ** 2  # c\n", "<b>&amp;</b>", "{{ x }}",
    "C:\\path\\file", "a" * 60, "x " * 20, "<|eot_id|> in text", "<s>text</s>", "<|im_end|>", "end.<|endoftext|>",
]
# What onnxruntime-genai 0.18 reads otherwise, whatever the files say: it leaves out Qwen's NFC normalization.
DIFFERENT_IN_GENAI = {("qwen2", "e\u0301")}
FP32 = "onnx/model.onnx"
CHAT = [
    [{"role": "user", "content": "Hi"}],
    [{"role": "system", "content": "Be \"brief\"."}, {"role": "user", "content": "é 😀 {{x}} <b> & '\n"},
     {"role": "assistant", "content": "  ok  "}, {"role": "user", "content": "more\\n"}],
]


@pytest.fixture(scope="module", params=["llama3", "qwen2", "smollm", "gpt2", "spm"])
def any_tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
                  ) -> tuple[DenseCheckpoint, Path]:
    """A checkpoint with each kind of tokenizer, in a folder of the kind's name, and its export."""
    path = tmp_path_factory.mktemp("tokenizers") / request.param
    checkpoint = DenseCheckpoint.open(make_tiny(path / "tiny", tokenizer=request.param, layers=1))
    export_onnx(checkpoint, path / "onnx", ["fp32"])
    return checkpoint, path / "onnx"


@pytest.fixture(scope="module")
def llama(tiny_llama: Path) -> DenseCheckpoint:
    return DenseCheckpoint.open(tiny_llama)


@pytest.fixture(scope="module")
def folder(llama: DenseCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("exported") / "onnx"
    export_onnx(llama, path, list(FILES))
    return path


def test_they_are_runtimes(folder: Path) -> None:
    plain, genai = OnnxRuntime(folder / FP32), OrtGenai(folder)
    assert isinstance(plain, Runtime)
    assert isinstance(genai, TextRuntime)
    assert plain.label.startswith("onnxruntime 1.")
    assert genai.label.startswith("onnxruntime-genai 0.")
    for runtime in (plain, genai):
        runtime.close()
        runtime.close()


@pytest.mark.parametrize("threads", [1, 2])
def test_logits_and_generation(threads: int, llama: DenseCheckpoint, folder: Path) -> None:
    ids = np.random.default_rng(2).integers(0, llama.shape.vocab_size, 64)
    reference = Reference(llama.model())
    expected = reference.prefill(ids)
    written = reference.generate(ids[:9].tolist(), 20, set())
    for runtime in (OnnxRuntime(folder / FP32, threads), OrtGenai(folder, FP32, threads)):
        for logits in (runtime.prefill(ids), runtime.decode(ids)):
            assert logits.dtype == np.float32
            assert compare(expected, logits, ids).kl_mean <= 1e-8
            assert compare(expected, logits, ids).max_abs <= 1e-4
        assert runtime.generate(ids[:9].tolist(), 20, set()) == written
        first = written.index(written[5])
        assert runtime.generate(ids[:9].tolist(), 20, {written[5]}) == written[:first]


@pytest.mark.parametrize("file", FILES.values())
def test_rows_of_a_batch_padded_on_the_right(file: str, llama: DenseCheckpoint, folder: Path) -> None:
    ids = np.random.default_rng(4).integers(0, llama.shape.vocab_size, (2, 10))
    mask = np.ones_like(ids)
    mask[1, 6:] = 0
    cache_type = np.float16 if "fp16" in file else np.float32
    past = {f"past_key_values.{layer}.{kind}": np.zeros((2, 2, 0, 24), cache_type)
            for layer in range(2) for kind in ("key", "value")}
    session = onnxruntime.InferenceSession(folder / file)
    positions = np.tile(np.arange(10), (2, 1))
    [logits] = session.run(["logits"], {"input_ids": ids, "attention_mask": mask, "position_ids": positions, **past})
    alone = OnnxRuntime(folder / file)
    assert logits.dtype == np.float32
    tolerance = 2e-2 if "fp16" in file else 1e-5
    np.testing.assert_allclose(logits[0], alone.prefill(ids[0]), atol=tolerance)
    np.testing.assert_allclose(logits[1, :6], alone.prefill(ids[1, :6]), atol=tolerance)


def test_more_tokens_than_the_context_holds_fail(llama: DenseCheckpoint, folder: Path) -> None:
    """An error, not numbers from beyond RoPE's tables."""
    ids = np.zeros(llama.shape.max_position_embeddings + 1, np.int64)
    runtime = OnnxRuntime(folder / FP32)
    for logits_of in (runtime.prefill, runtime.decode, OrtGenai(folder, FP32).prefill):
        with pytest.raises(Exception, match=r"RotaryEmbedding|exceeds max length"):
            logits_of(ids)


THREADS_STARTED = """
import os, sys
from pathlib import Path
from lrc_edge.targets.runtimes.ort_genai import OrtGenai
import onnxruntime
before = len(os.listdir("/proc/self/task"))
kind, folder = sys.argv[1], Path(sys.argv[2])
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = int(kind == "plain-1")
if kind.startswith("plain"):
    kept = onnxruntime.InferenceSession(folder / "onnx/model_q4.onnx", options)
else:
    kept = OrtGenai(folder, threads=1 if kind == "genai-1" else None)
print(len(os.listdir("/proc/self/task")) - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_genai_starts_as_many_threads_as_onnxruntime_would(folder: Path) -> None:
    """Left to itself it takes half as many. Each is counted beyond what a session of one thread starts."""
    started = {kind: int(subprocess.run([sys.executable, "-c", THREADS_STARTED, kind, folder], capture_output=True,
                                        text=True, check=True).stdout)
               for kind in ("plain", "plain-1", "genai", "genai-1")}
    assert started["genai"] - started["genai-1"] == started["plain"] - started["plain-1"]
    session = json.loads((folder / "genai_config.json").read_text())["model"]["decoder"]["session_options"]
    assert session["intra_op_num_threads"] == 0


@pytest.mark.parametrize("level", [0, 4])
def test_genai_runs_the_named_model(level: int, llama: DenseCheckpoint, tmp_path: Path) -> None:
    """Also at both accuracy levels, and token by token: plain onnxruntime's are proved in test_to_onnx."""
    folder = tmp_path / "onnx"
    export_onnx(llama, folder, list(FILES), accuracy_level=level)
    ids = np.random.default_rng(2).integers(0, llama.shape.vocab_size, 32)
    for encoding, file in FILES.items():
        genai, expected = OrtGenai(folder, file), OnnxRuntime(folder / file).prefill(ids)
        np.testing.assert_allclose(genai.prefill(ids), expected, atol=1e-5)
        np.testing.assert_allclose(genai.decode(ids), expected, atol={"fp16": 2e-2}.get(encoding, 1e-3 * level + 1e-5))


def test_genai_takes_the_smallest_file(llama: DenseCheckpoint, folder: Path, tmp_path: Path) -> None:
    ids = np.random.default_rng(2).integers(0, llama.shape.vocab_size, 32)
    np.testing.assert_array_equal(OrtGenai(folder).prefill(ids), OrtGenai(folder, FILES["q4"]).prefill(ids))
    export_onnx(llama, tmp_path / "onnx", ["fp16", "fp32"])
    config = json.loads((tmp_path / "onnx/config.json").read_text())["transformers.js_config"]
    assert config["dtype"] == "fp16"
    np.testing.assert_array_equal(OrtGenai(tmp_path / "onnx").prefill(ids),
                                  OrtGenai(tmp_path / "onnx", FILES["fp16"]).prefill(ids))


def test_genai_whole_context(llama: DenseCheckpoint, folder: Path) -> None:
    """Every position that the model has, so the last rows of RoPE's tables too."""
    ids = np.random.default_rng(3).integers(0, llama.shape.vocab_size, llama.shape.max_position_embeddings)
    expected = Reference(llama.model()).prefill(ids)
    assert compare(expected, OnnxRuntime(folder / FP32).prefill(ids), ids).max_abs <= 1e-4
    assert compare(expected[:-1], OrtGenai(folder, FP32).prefill(ids[:-1]), ids[:-1]).max_abs <= 1e-4


def test_genai_ends_at_end_of_text(llama: DenseCheckpoint, folder: Path, tmp_path: Path) -> None:
    """genai's own loop ends at genai_config.json's ids, without a `stop`."""
    copy = Path(shutil.copytree(folder, tmp_path / "onnx"))
    prompt = [5, 6, 7]
    written = Reference(llama.model()).generate(prompt, 12, set())
    table = json.loads((copy / "genai_config.json").read_text())
    table["model"]["eos_token_id"] = [written[4]]
    (copy / "genai_config.json").write_text(json.dumps(table))
    assert OrtGenai(copy, FP32).generate(prompt, 12, set()) == written[:written.index(written[4])]


def test_token_ids_equal_hugging_face(any_tokenizer: tuple[DenseCheckpoint, Path]) -> None:
    checkpoint, path = any_tokenizer
    tokenizer, genai = checkpoint.tokenizer(), OrtGenai(path)
    for text in TEXTS:
        if (path.parent.name, text) in DIFFERENT_IN_GENAI:
            continue
        ids = tokenizer(text)["input_ids"]
        assert genai.tokenize(text) == ids, repr(text)
        expected = tokenizer.decode(ids, skip_special_tokens=True)
        if expected:  # genai makes U+FFFD of ids that are all special
            assert genai.detokenize(ids) == expected, repr(text)


def test_chat_template_equals_hugging_face(any_tokenizer: tuple[DenseCheckpoint, Path]) -> None:
    checkpoint, path = any_tokenizer
    tokenizer, genai = checkpoint.tokenizer(), OrtGenai(path)
    if not tokenizer.chat_template:
        pytest.skip("a base model: no template")
    for messages in CHAT:
        expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert genai.render_chat(messages) == (expected, tokenizer(expected, add_special_tokens=False)["input_ids"])


def test_template_inside_the_tokenizer_config(llama: DenseCheckpoint, llama_copy: Path, tmp_path: Path) -> None:
    """Where checkpoints of older transformers keep it."""
    template = (llama_copy / "chat_template.jinja").read_text()
    (llama_copy / "chat_template.jinja").unlink()
    table = json.loads((llama_copy / "tokenizer_config.json").read_text())
    (llama_copy / "tokenizer_config.json").write_text(json.dumps(table | {"chat_template": template}))
    export_onnx(DenseCheckpoint.open(llama_copy), tmp_path / "onnx", ["fp32"])
    expected = llama.tokenizer().apply_chat_template(CHAT[1], tokenize=False, add_generation_prompt=True)
    assert OrtGenai(tmp_path / "onnx").render_chat(CHAT[1])[0] == expected


@pytest.mark.parametrize("damage", ["truncated data", "no data", "truncated graph", "no graph"])
def test_damaged_files_are_refused(damage: str, folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "onnx"))
    file = copy / "onnx" / ("model.onnx_data" if "data" in damage else "model.onnx")
    content = file.read_bytes()
    file.unlink()
    if damage.startswith("truncated"):
        file.write_bytes(content[:len(content) // 2])
    for load in (lambda: OnnxRuntime(copy / FP32), lambda: OrtGenai(copy, FP32)):
        with pytest.raises(UserError, match="does not load it") as caught:
            load()
        assert "\n" not in str(caught.value)


def test_a_folder_without_genai_config_is_refused(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "onnx"))
    (copy / "genai_config.json").unlink()
    with pytest.raises(UserError, match="does not load it"):
        OrtGenai(copy, FP32)
