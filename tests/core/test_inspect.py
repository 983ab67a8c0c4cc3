"""`describe` and `print_description` on real files: they must read back what the writers reported."""
from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from report_example import example_report
from rich.console import Console
from tiny_models import make_tiny

from lrc_edge.checkpoint import DenseCheckpoint
from lrc_edge.errors import UserError
from lrc_edge.export.onnx.to_onnx import FILES, export_onnx
from lrc_edge.inspect.command import describe, print_description
from lrc_edge.report.report_file import write_report


def printed(path: Path, **options: Any) -> str:
    """What a pipe would get."""
    file = io.StringIO()
    print_description(path, Console(file=file), **options)
    return file.getvalue()


# -- GGUF --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def gguf_file(tmp_path: Path) -> Path:
    """One Q8_0 matrix of 4 x 64, one F32 vector of 6, RoPE factors; 40 tokens; a name with a terminal escape."""
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("evil\x1b[31m name")
    writer.add_context_length(512)
    writer.add_token_list([f"token{i}" for i in range(40)])
    writer.add_array("lrc_edge.short", [1, 2, 3])
    matrix = gguf.quants.quantize(np.ones((4, 64), np.float32), gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("blk.0.w.weight", matrix, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("norm.weight", np.ones(6, np.float32))
    writer.add_tensor("rope_freqs.weight", np.ones(8, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_gguf(gguf_file: Path) -> None:
    found = describe(gguf_file)
    assert found["kind"] == "gguf" and found["bytes"] == gguf_file.stat().st_size
    assert found["n_params"] == 4 * 64 + 6  # RoPE's factors are no parameters
    assert found["bits_per_weight"] == 8 * (8 * 34 + 6 * 4 + 8 * 4) / (4 * 64 + 6)  # a Q8_0 block of 32 is 34 bytes
    assert {t["name"]: (t["dtype"], t["shape"], t["bytes"]) for t in found["tensors"]} == {
        "blk.0.w.weight": ("Q8_0", [4, 64], 272), "norm.weight": ("F32", [6], 24),
        "rope_freqs.weight": ("F32", [8], 32)}
    assert found["metadata"]["llama.context_length"] == 512
    assert found["metadata"]["tokenizer.ggml.tokens"] == "[40 × string]"
    assert found["metadata"]["lrc_edge.short"] == [1, 2, 3]


def test_gguf_is_known_by_its_first_bytes(gguf_file: Path) -> None:
    blob = gguf_file.rename(gguf_file.with_name("sha256-0123"))
    assert describe(blob)["kind"] == "gguf"


def test_gguf_printed(gguf_file: Path) -> None:
    text = printed(gguf_file, tensors=True)
    assert "\x1b" not in text and r"evil\x1b[31m name" in text
    assert "blk.0.w.weight     Q8_0  4 × 64" in text
    assert "blk.0.w.weight" not in printed(gguf_file)


@pytest.mark.parametrize("keep", [3, 20, 0.3, 0.9, -1])
def test_truncated_gguf(gguf_file: Path, keep: float) -> None:
    """Truncated anywhere: inside the magic, the header, the tokens, the tensor table or the last tensor."""
    data = gguf_file.read_bytes()
    gguf_file.write_bytes(data[:keep if isinstance(keep, int) else int(keep * len(data))])
    with pytest.raises(UserError, match=r"m\.gguf: (not a GGUF file|truncated)") as raised:
        describe(gguf_file)
    assert "\n" not in str(raised.value)


# -- ONNX --------------------------------------------------------------------------------------------------------------


def save_onnx(path: Path, nodes: list[Any], initializers: list[Any], **options: Any) -> Path:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 64])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", None])
    graph = helper.make_graph(nodes, "graph", [x], [y], initializers)
    model = helper.make_model(graph, producer_name="test", opset_imports=[
        helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)])
    helper.set_model_props(model, {"license": "mit"})
    onnx.save(model, path, **options)
    return path


def test_onnx_plain(tmp_path: Path) -> None:
    weight = numpy_helper.from_array(np.ones((64, 10), np.float32), "w")
    one = numpy_helper.from_array(np.array([1.0], np.float32), "one")
    path = save_onnx(tmp_path / "m.onnx", [helper.make_node("MatMul", ["x", "w"], ["h"]),
                                           helper.make_node("Add", ["h", "one"], ["y"])], [weight, one])
    found = describe(path)
    assert found["inputs"] == [{"name": "x", "dtype": "FLOAT", "shape": ["batch", 64]}]
    assert found["outputs"] == [{"name": "y", "dtype": "FLOAT", "shape": ["batch", "?"]}]
    assert found["ops"] == {"MatMul": 1, "Add": 1} and found["metadata"] == {"license": "mit"}
    assert found["n_params"] == 640 and found["bits_per_weight"] == 32  # the constant is no weight
    assert found["opsets"] == {"ai.onnx": 21, "com.microsoft": 1} and found["data_files"] == []


@pytest.mark.parametrize(("bits", "expected"), [(4, (10 * 2 * 16 + 80) * 8 / 640), (8, (10 * 2 * 32 + 80) * 8 / 640)])
def test_onnx_matmul_nbits(tmp_path: Path, bits: int, expected: float) -> None:
    """10 x 64 in two blocks of 32 per row, of 4 or 8 bits, with one float32 scale per block."""
    packed = numpy_helper.from_array(np.zeros((10, 2, 32 * bits // 8), np.uint8), "w")
    scales = numpy_helper.from_array(np.ones((10, 2), np.float32), "s")
    node = helper.make_node("MatMulNBits", ["x", "w", "s"], ["y"], domain="com.microsoft", N=10, K=64, bits=bits,
                            block_size=32)
    found = describe(save_onnx(tmp_path / "m.onnx", [node], [packed, scales]))
    assert found["n_params"] == 640 and found["bits_per_weight"] == pytest.approx(expected)
    assert found["ops"] == {"com.microsoft.MatMulNBits": 1}


def external(tmp_path: Path) -> Path:
    weight = numpy_helper.from_array(np.ones((64, 100), np.float32), "w")
    return save_onnx(tmp_path / "m.onnx", [helper.make_node("MatMul", ["x", "w"], ["y"])], [weight],
                     save_as_external_data=True, location="m.onnx_data", size_threshold=0)


def test_onnx_external_data(tmp_path: Path) -> None:
    path = external(tmp_path)
    found = describe(path)
    assert found["data_files"] == ["m.onnx_data"]
    assert found["bytes"] == path.stat().st_size + 25_600 and found["bits_per_weight"] == 32


def test_onnx_external_data_short_or_missing(tmp_path: Path) -> None:
    path, data = external(tmp_path), tmp_path / "m.onnx_data"
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"m\.onnx_data: truncated \(25,599 bytes, m\.onnx needs 25,600\)"):
        describe(path)
    data.unlink()
    with pytest.raises(UserError, match=r"data file m\.onnx_data is missing"):
        describe(path)


def test_onnx_data_outside_its_folder(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    path = external(tmp_path / "model")
    model = onnx.load(path, load_external_data=False)
    model.graph.initializer[0].external_data[0].value = "../secret"
    (tmp_path / "secret").write_bytes(b"0" * 30_000)
    path.write_bytes(model.SerializeToString())
    with pytest.raises(UserError, match="outside its folder"):
        describe(path)


@pytest.mark.parametrize("content", [b"", b"\xff\xff\xff\xff garbage", b"this is a text\n"])
def test_onnx_corrupt(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"m\.onnx: (truncated or corrupt|contains no ONNX graph)") as raised:
        describe(path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("family", "tied"), [("llama", True), ("qwen2", False)])
def test_exported_files_are_read_back_as_their_writers_count(tmp_path: Path, family: str, tied: bool) -> None:
    """Bits per weight and parameters are right for packed matrices, shared or gathered embeddings, and RoPE tables."""
    from lrc_edge.export.gguf.to_gguf import export_gguf

    checkpoint = DenseCheckpoint.open(make_tiny(tmp_path / "m", family, tied=tied))
    made = [*export_onnx(checkpoint, tmp_path / "onnx", list(FILES), shard_bytes=60_000),
            *export_gguf(checkpoint, tmp_path / "gguf", ["f16", "q8_0"])]
    for artifact in made:
        found = describe(tmp_path / artifact.path)
        assert found["n_params"] == checkpoint.shape.n_params, artifact.path
        assert found["bits_per_weight"] == pytest.approx(artifact.bits_per_weight), artifact.path
        assert found["bytes"] == artifact.bytes


def test_a_missing_shard_is_named(tiny_llama: Path, tmp_path: Path) -> None:
    [artifact] = export_onnx(DenseCheckpoint.open(tiny_llama), tmp_path / "onnx", ["q4"], shard_bytes=50_000)
    names = describe(tmp_path / artifact.path)["data_files"]
    assert names == ["model_q4.onnx_data", "model_q4.onnx_data_1", "model_q4.onnx_data_2"]
    assert all(name in printed(tmp_path / artifact.path) for name in names)
    (tmp_path / artifact.path).with_name(names[1]).unlink()
    with pytest.raises(UserError, match=r"its data file model_q4\.onnx_data_1 is missing"):
        describe(tmp_path / artifact.path)


def test_hostile_names_are_printed_harmless(tmp_path: Path) -> None:
    weight = numpy_helper.from_array(np.ones((64, 10), np.float32), "w\x1b]0;x\x07[bold]")
    text = printed(save_onnx(tmp_path / "m.onnx", [helper.make_node("MatMul", ["x", weight.name], ["y"])], [weight]),
                   tensors=True)
    assert r"w\x1b]0;x\x07[bold]" in text and "\x1b" not in text and "\x07" not in text


def test_onnx_printed(tmp_path: Path) -> None:
    text = printed(external(tmp_path), tensors=True)
    assert "batch × 64" in text and "m.onnx_data" in text and "32.000" in text and "64 × 100" in text


# -- Hugging Face ------------------------------------------------------------------------------------------------------


def test_checkpoint(tiny_llama: Path) -> None:
    found = describe(tiny_llama)
    assert found["kind"] == "huggingface" and found["family"] == "llama" and found["problem"] is None
    assert found["shape"]["hidden_size"] == 64 and found["shape"]["head_dim"] == 24
    assert found["n_params"] == sum(int(np.prod(t["shape"])) for t in found["tensors"])
    assert found["bits_per_weight"] == 32
    assert {"name": "model.norm.weight", "dtype": "F32", "shape": [64], "bytes": 256} in found["tensors"]
    assert found["tokenizer"] == {"file": "tokenizer.json", "type": "BPE", "size": 512}
    assert found["chat_template"] is True and found["license"] is None


def test_checkpoint_without_template_and_with_a_card(llama_copy: Path) -> None:
    (llama_copy / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((llama_copy / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (llama_copy / "tokenizer_config.json").write_text(json.dumps(config))
    (llama_copy / "README.md").write_text("---\nlicense: llama3.2\n---\n# x\n")
    found = describe(llama_copy)
    assert found["chat_template"] is False and found["license"] == "llama3.2"
    assert "llama3.2" in printed(llama_copy)


def test_unknown_family_is_described_and_named(llama_copy: Path) -> None:
    config = json.loads((llama_copy / "config.json").read_text())
    (llama_copy / "config.json").write_text(json.dumps({**config, "model_type": "gemma3"}))
    found = describe(llama_copy)
    assert found["shape"] is None and found["n_params"] == 106_816
    assert "'gemma3' is not supported" in found["problem"]
    assert "cannot use it" in printed(llama_copy)


def test_truncated_safetensors(llama_copy: Path) -> None:
    file = llama_copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(UserError, match=r"model\.safetensors: truncated or corrupt"):
        describe(llama_copy)


def test_corrupt_config_and_missing_weights(llama_copy: Path) -> None:
    (llama_copy / "model.safetensors").unlink()
    with pytest.raises(UserError, match="no weights"):
        describe(llama_copy)
    (llama_copy / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json: not readable as JSON"):
        describe(llama_copy)


# -- builds, and what is none ------------------------------------------------------------------------------------------


def test_build(tmp_path: Path) -> None:
    (tmp_path / "build.json").write_text(json.dumps({"stages": {"data": {}, "train": {}}, "job": {"teacher": "org/x"}}))
    assert "not finished" in printed(tmp_path)
    write_report(example_report(), tmp_path)
    found = describe(tmp_path)
    assert found["kind"] == "build" and found["stages"] == ["data", "train"] and found["source"] == "org/x"
    text = printed(tmp_path)
    assert "All 18 gates passed" in text and "onnx/onnx/model_q4.onnx" in text


def test_broken_report_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text('{"gates": []}')
    with pytest.raises(UserError, match=r"damaged .*lrc-edge check"):
        printed(tmp_path)
    (tmp_path / "report.json").write_text("{")
    with pytest.raises(UserError, match="not readable as JSON"):
        describe(tmp_path)


def test_no_such_kind(tmp_path: Path, gguf_file: Path) -> None:
    with pytest.raises(UserError, match="no such file or directory"):
        describe(tmp_path / "nothing")
    with pytest.raises(UserError, match=r"it contains m\.gguf: pass one of them"):
        describe(tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(UserError, match=r"notes\.txt: unknown kind of file"):
        describe(tmp_path / "notes.txt")


def test_piped_output_is_not_cut(tiny_llama: Path, tmp_path: Path) -> None:
    """Rows longer than 80 characters stay on one line, without colour or padding."""
    deep = tmp_path / ("d" * 60) / ("e" * 60)
    shutil.copytree(tiny_llama, deep)
    lines = printed(deep, tensors=True).splitlines()
    assert any(str(deep) in line for line in lines)
    assert all(line == line.rstrip() and "\x1b" not in line for line in lines)
