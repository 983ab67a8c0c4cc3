"""Fifteen traps that users of on-device models have met, each set in a real file or a real runtime, each caught.

The numbers are those of the reports: "#20824" is llama.cpp's, others name their project. docs/verification.md has the
table. Each file or runtime here answers, fluently; only the comparison with PyTorch finds it out.
"""
from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from gguf import GGMLQuantizationType, quants
from gguf_damage import Metadata, Tensors, rewrite
from rich.console import Console
from sabotage import AMX_CRASH, before_decode, sabotage
from tiny_models import make_tiny

from lrc_edge.checkpoint import DenseCheckpoint
from lrc_edge.errors import UserError
from lrc_edge.exit_status import ExitStatus
from lrc_edge.export.gguf.to_gguf import export_gguf
from lrc_edge.export.onnx.to_onnx import export_onnx
from lrc_edge.export.quantize.imatrix import collect
from lrc_edge.export.quantize.imatrix_file import read_imatrix, write_imatrix
from lrc_edge.pipeline.verify import verify
from lrc_edge.recipe import load_recipe
from lrc_edge.stored_reference import DeviceComparison, StoredReference
from lrc_edge.targets.runtimes.llama_probe import extra_buffers

Report = dict[str, Any]
PARITY = {"positions": 96, "row_len": 48, "generate_tokens": 4, "long_rows": [400], "long_positions": 16,
          "kv_cache_positions": 48}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama whose RoPE is scaled as Llama 3's, with a chat template that writes the BOS."""
    return make_tiny(tmp_path_factory.mktemp("model") / "tiny", head_dim=32, hidden_size=64, rope_scaling={
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64})


@pytest.fixture(scope="module")
def ggufs(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    out = tmp_path_factory.mktemp("gguf")
    artifacts = export_gguf(DenseCheckpoint.open(model), out / "gguf", ["f32", "q8_0"])
    return {artifact.encoding: out / artifact.path for artifact in artifacts}


@pytest.fixture(autouse=True)
def fresh_probe() -> Any:
    extra_buffers.cache_clear()
    yield
    extra_buffers.cache_clear()


def verified(model: Path, file: Path, out: Path) -> Report:
    recipe = load_recipe(None, (), parity=PARITY)
    status = verify(str(model), [file], out, recipe, Console(quiet=True))
    report: Report = json.loads((out / "report.json").read_text())
    assert status == ExitStatus.of_gates(report["gates"])
    return report


def failed(report: Report) -> dict[str, str]:
    """Name of each failed gate -> why; all reasons where several have one name."""
    found: dict[str, str] = {}
    for gate in report["gates"]:
        if not gate["passed"]:
            found[gate["name"]] = f"{found.get(gate['name'], '')} {gate['why']}"
    return found


def test_without_a_trap_everything_passes(model: Path, ggufs: dict[str, Path], tmp_path: Path) -> None:
    report = verified(model, ggufs["f32"], tmp_path)
    assert not failed(report)
    assert all(kl < 0.05 for kl in report["artifacts"][0]["kv_cache"].values())
    assert report["chat_template"][0]["engines"]["Jinja (llama-cpp-python)"] == "yes"
    assert report["chat_template"][0]["engines"]["llama.cpp's C API"] == "yes"


def test_1_amx_kernels_crash(model: Path, ggufs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
                             ) -> None:
    """#20824, #26954: the library dies on any product of two tokens; the files are verified all the same."""
    sabotage(tmp_path / "fault", AMX_CRASH, monkeypatch)
    report = verified(model, ggufs["q8_0"], tmp_path / "out")
    assert not failed(report)
    assert "crash on this machine (SIGSEGV; llama.cpp #20824): verified without them" in report["notes"][0]


def test_2_a_quantized_kv_cache_is_garbage(model: Path, ggufs: dict[str, Path], tmp_path: Path,
                                           monkeypatch: pytest.MonkeyPatch) -> None:
    """#23044, ollama #17614: text at f16 is fine, at q8_0 it is not; the weights are innocent."""
    sabotage(tmp_path / "fault", """
        state = {"type": 0}
        def init(call, model, params):
            state["type"] = params.type_k
            return call(model, params)
        def decode(call, context, batch):
            for i in range(batch.n_tokens if state["type"] in (2, 8) else 0):
                batch.token[i] = 7
            return call(context, batch)
        _wrapped["llama_init_from_model"], _wrapped["llama_decode"] = init, decode
        """, monkeypatch)
    report = verified(model, ggufs["q8_0"], tmp_path / "out")
    kl = report["artifacts"][0]["kv_cache"]
    assert kl["f16"] < 0.01 < 0.1 < min(kl["q8_0"], kl["q4_0"])
    advice = report["kv_cache_advice"]
    assert advice and all(row["cache"] == "f16" for row in advice)
    assert "f16 fits" in advice[0]["why"]


@pytest.mark.parametrize(("template", "answer"), [
    ("{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}", "knows no such chat template"),
    ("{% for m in messages %}<|im_start|>{{ m['role'] }}\nNOTE {{ m['content'] }}<|im_end|>\n{% endfor %}",
     "no: '<|im_start|>user\\nHello!")])
def test_3_another_engine_renders_the_template_otherwise(template: str, answer: str, model: Path, tmp_path: Path
                                                         ) -> None:
    """utilityai/llama-cpp-rs #1096, #19476: Jinja is right, the C API takes it for a template that it knows."""
    other = Path(shutil.copytree(model, tmp_path / "model"))
    (other / "chat_template.jinja").write_text(template)
    [artifact] = export_gguf(DenseCheckpoint.open(other), tmp_path / "gguf", ["f32"])
    report = verified(other, tmp_path / artifact.path, tmp_path / "out")
    engines = report["chat_template"][0]["engines"]
    assert not failed(report) and engines["Jinja (llama-cpp-python)"] == "yes"
    assert answer in engines["llama.cpp's C API"] and engines["llama.cpp's C API"].startswith("no: ")
    assert answer.split(":")[0] in (tmp_path / "out" / "report.html").read_text()


def test_4_right_at_first_wrong_at_length(model: Path, ggufs: dict[str, Path], tmp_path: Path,
                                          monkeypatch: pytest.MonkeyPatch) -> None:
    """#12957: right at 3k tokens, wrong at 13.9k."""
    sabotage(tmp_path / "fault", before_decode("""
        for i in range(batch.n_tokens):
            if batch.pos[i] >= 300:
                batch.token[i] = 7
        """), monkeypatch)
    found = failed(verified(model, ggufs["f32"], tmp_path / "out"))
    assert set(found) == {"prefill at 400 tokens", "decode at 400 tokens"}


def test_5_scores_that_are_chance(model: Path, ggufs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
                                  ) -> None:
    """#27174: no log-probabilities of the prompt come back, every token counts alike; a mean over them is chance."""
    sabotage(tmp_path / "fault", """
        def logits(call, context, i):
            found = call(context, i)
            for token in range(512):
                found[token] = 0.0
            return found
        _wrapped["llama_get_logits_ith"] = logits
        """, monkeypatch)
    found = failed(verified(model, ggufs["f32"], tmp_path / "out"))
    assert "the runtime returned no scores" in found["prefill vs student"]
    ids, rng = np.zeros((1, 4), int), np.random.default_rng(0)
    stored = StoredReference.of(ids, [rng.normal(size=(4, 512)).astype(np.float32)], [], [],
                                DenseCheckpoint.open(model).shape)
    with pytest.raises(UserError, match="it returned no scores"):
        DeviceComparison(stored, 0.01).update(0, np.full((4, 65), -np.log(512)).tolist(), [0] * 4)


def edited(model: Path, ggufs: dict[str, Path], out: Path, edit: Callable[[Metadata], Any]) -> dict[str, str]:
    """What fails of the F32 file with other metadata."""
    out.mkdir(exist_ok=True)
    return failed(verified(model, rewrite(ggufs["f32"], out / "edited.gguf", edit), out / "out"))


def test_6_endless_text(model: Path, ggufs: dict[str, Path], tmp_path: Path) -> None:
    """ollama #11019: the file ends a text at another token than the model does, and the answer never ends."""
    def edit(table: Metadata) -> None:
        table["tokenizer.ggml.eos_token_id"] = 60
        table.pop("tokenizer.ggml.eot_token_id", None)
        tokens = table["tokenizer.ggml.tokens"]  # llama.cpp knows <|eot_id|> by name
        tokens[tokens.index("<|eot_id|>")] = "<|turn_id|>"
    found = edited(model, ggufs, tmp_path, edit)
    assert "llama.cpp does not end a text at '<|eot_id|>'" in found["stop tokens"]


def test_7_doubled_bos(model: Path, ggufs: dict[str, Path], tmp_path: Path) -> None:
    """abetlen/llama-cpp-python #1501: the template writes a BOS, and something before it another."""
    def edit(table: Metadata) -> None:
        table["tokenizer.chat_template"] = "{{ bos_token }}" + table["tokenizer.chat_template"]
    found = edited(model, ggufs, tmp_path, edit)
    assert "2 BOS before a chat, Hugging Face writes 1" in found["chat template, BOS"]


def test_8_a_repacked_kernel_computes_nonsense(model: Path, ggufs: dict[str, Path], tmp_path: Path,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    """#19561: one processor's kernels are wrong. The probe compares them with the plain ones."""
    sabotage(tmp_path / "fault", AMX_CRASH.replace('die("SIGSEGV")', "batch.token[1] = 5"), monkeypatch)
    report = verified(model, ggufs["q8_0"], tmp_path / "out")
    assert not failed(report) and "compute wrong numbers on this machine" in report["notes"][0]


def test_9_unknown_pre_tokenizer(model: Path, ggufs: dict[str, Path], tmp_path: Path) -> None:
    """#27277: llama.cpp cannot open it, or splits text another way."""
    def unknown(table: Metadata) -> None:
        table["tokenizer.ggml.pre"] = "nobody-knows"
    found = edited(model, ggufs, tmp_path / "unknown", unknown)
    assert "nobody-knows" in found["pre-tokenizer"] and "unknown pre-tokenizer" in found["prefill vs student"]

    def other(table: Metadata) -> None:
        table["tokenizer.ggml.pre"] = "gpt-2"
    found = edited(model, ggufs, tmp_path / "other", other)
    assert {"pre-tokenizer", "token ids"} <= found.keys()


def test_10_wrong_add_bos(model: Path, ggufs: dict[str, Path], tmp_path: Path) -> None:
    """#21500: prompts go without the BOS that the model was trained with."""
    def edit(table: Metadata) -> None:
        table["tokenizer.ggml.add_bos_token"] = False
    found = edited(model, ggufs, tmp_path, edit)
    assert "token ids" in found and "expected True" in found["add_bos_token"]


def test_11_rope_scaling_is_lost(model: Path, ggufs: dict[str, Path], tmp_path: Path) -> None:
    """#18013: transformers 5 renamed the table, and a converter that reads the old name leaves the scaling out."""
    def edit(table: Tensors) -> None:
        del table["rope_freqs.weight"]
    file = rewrite(ggufs["f32"], tmp_path / "edited.gguf", tensors=edit)
    found = failed(verified(model, file, tmp_path / "out"))
    assert any("rope" in name for name in found) and "prefill at 400 tokens" in found


def test_12_nan(model: Path, ggufs: dict[str, Path], tmp_path: Path) -> None:
    """#12439: an importance matrix with NaN makes weights of NaN. Neither gets through."""
    checkpoint = DenseCheckpoint.open(model)
    importance = collect(checkpoint, np.arange(64).reshape(1, 64))
    name = next(iter(importance))
    importance[name] = np.full_like(importance[name], np.nan)
    write_imatrix(tmp_path / "nan.gguf", checkpoint, importance, 1, 64, "test")
    with pytest.raises(UserError, match=r"nan\.gguf"):
        read_imatrix(tmp_path / "nan.gguf", checkpoint)

    def edit(table: Tensors) -> None:
        blocks, kind = table["blk.1.ffn_down.weight"]
        blocks[3, :2] = np.frombuffer(np.float16(np.nan).tobytes(), np.uint8)  # a block's scale
        table["blk.1.ffn_down.weight"] = blocks, kind
    file = rewrite(ggufs["q8_0"], tmp_path / "edited.gguf", tensors=edit)
    found = failed(verified(model, file, tmp_path / "out"))
    assert any("NaN" in why for why in found.values()) and "prefill vs student" in found


def test_13_a_tied_embedding_that_is_too_coarse(model: Path, ggufs: dict[str, Path], tmp_path: Path) -> None:
    """#5650: the embedding, which is the head too, lost more than its type says."""
    def edit(table: Tensors) -> None:
        blocks, kind = table["token_embd.weight"]
        values = quants.dequantize(blocks, kind)
        coarse = quants.dequantize(quants.quantize(values, GGMLQuantizationType.Q4_0), GGMLQuantizationType.Q4_0)
        table["token_embd.weight"] = quants.quantize(coarse, kind), kind
    file = rewrite(ggufs["q8_0"], tmp_path / "edited.gguf", tensors=edit)
    found = failed(verified(model, file, tmp_path / "out"))
    assert any("token_embd" in why for why in found.values())


def test_14_arithmetic_that_flips_tokens(model: Path, tmp_path: Path) -> None:
    """microsoft/onnxruntime #29849: the weights are right, the arithmetic of accuracy_level 4 is not.

    Here: scales that int8 activations would need, read as if they were others.
    """
    [artifact] = export_onnx(DenseCheckpoint.open(model), tmp_path / "onnx", ["q8"])
    file = tmp_path / artifact.path
    assert not failed(verified(model, file, tmp_path / "sound"))
    graph = onnx.load(file)
    for node in (n for n in graph.graph.node if n.op_type == "MatMulNBits"):
        scales = next(i for i in graph.graph.initializer if i.name == node.input[2])
        values = onnx.numpy_helper.to_array(scales, str(file.parent)) * 1.2
        scales.CopyFrom(onnx.numpy_helper.from_array(values.astype(np.float32), scales.name))
    onnx.save(graph, file)
    report = verified(model, file, tmp_path / "out")
    assert {"prefill vs student", "decode vs student"} <= failed(report).keys()
    assert report["artifacts"][0]["parity"]["prefill"]["top1"] < 1


def test_15_a_file_that_an_update_replaced(model: Path, ggufs: dict[str, Path], tmp_path: Path) -> None:
    """#23544: a draft model that was accepted .64 of the time, and .24 after an update, still answers.

    A draft's tokens are accepted where it agrees with its target: top-1. Here the update brought other weights.
    """
    other = make_tiny(tmp_path / "other", head_dim=32, hidden_size=64, seed=1, rope_scaling=json.loads(
        (model / "config.json").read_text())["rope_parameters"] | {"rope_theta": 10000.0})
    [artifact] = export_gguf(DenseCheckpoint.open(other), tmp_path / "gguf", ["f32"])
    report = verified(model, tmp_path / artifact.path, tmp_path / "out")
    tops = {gate["name"]: gate["value"] for gate in report["gates"] if gate["metric"] == "top1"}
    assert tops["decode vs student"] < 0.24
    assert "token_embd.weight differs from the model's by 1.41" in failed(report)["tensor values"]
