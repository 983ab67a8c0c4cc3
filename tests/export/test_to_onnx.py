"""ONNX files in plain onnxruntime against transformers' own logits, and their bytes against the checkpoint's."""
from __future__ import annotations

import json
import shutil
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from families import FAMILIES, LLAMA3_ROPE
from gguf import GGMLQuantizationType
from onnx import numpy_helper
from recorder import Recorder
from rounded import grid_of, rounded, rounded_model
from safetensors.torch import load_file, save_file
from tiny_models import make_tiny

from lrc_edge.artifact import sha256_of
from lrc_edge.checkpoint import DenseCheckpoint
from lrc_edge.errors import UserError
from lrc_edge.export.onnx.to_onnx import FILES, export_onnx
from lrc_edge.export.onnx.weights import pack
from lrc_edge.families import Weight
from lrc_edge.onnx_graph.decoder import ROPE_TABLES
from lrc_edge.onnx_graph.matrices import GRIDS, Q4_0, Q8_0, Grid
from lrc_edge.parity import compare
from lrc_edge.targets.proof.reference import Reference
from lrc_edge.targets.runtimes.onnxrt import OnnxRuntime
from lrc_edge.targets.runtimes.ort_genai import OrtGenai

MORE_SHAPES: dict[str, dict[str, Any]] = {
    # q_proj has as many outputs as the vocabulary: nothing but its role tells it from the head.
    "vocabulary-512-heads-8x64": dict(vocab_size=512, heads=8, kv_heads=8, head_dim=64),
    "vocabulary-512-heads-8x64-untied": dict(vocab_size=512, heads=8, kv_heads=4, head_dim=64, tied=False),
    "linear-rope": dict(rope_scaling={"rope_type": "linear", "factor": 2.0}),
    "yarn-rope": dict(rope_scaling={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}),
    "square-heads": dict(hidden_size=64, heads=4, kv_heads=4, head_dim=16),
    "one-kv-head": dict(heads=4, kv_heads=1, head_dim=32),
    "llama3-rope-qwen3": dict(family="qwen3", rope_scaling=LLAMA3_ROPE, rope_theta=500000.0, tokenizer="qwen2"),
    "mistral-window": dict(family="mistral", sliding_window=7),
    "qwen2-window-in-layer-1": dict(family="qwen2", use_sliding_window=True, sliding_window=5, max_window_layers=1),
    "padded-vocabulary": dict(vocab_size=600, tied=False),
    "rows-of-48": dict(hidden_size=48, intermediate_size=80, heads=3, kv_heads=1),
    "bf16": dict(dtype=torch.bfloat16),
}
SHAPES = FAMILIES | MORE_SHAPES


@pytest.fixture(scope="module")
def llama_onnx(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "onnx"
    export_onnx(DenseCheckpoint.open(tiny_llama), folder, list(FILES))
    return folder


def random_ids(checkpoint: DenseCheckpoint, n: int = 40) -> np.ndarray:
    return np.random.default_rng(1).integers(0, checkpoint.shape.vocab_size, n)


def initializers(path: Path) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}


def unpacked(packed: np.ndarray, scales: np.ndarray, n_inputs: int) -> np.ndarray:
    """MatMulNBits' definition: w = scale * (q - 8), byte j of a block holds weight 2j low and 2j + 1 high; or, with
    one weight a byte, w = scale * (q - 128)."""
    levels = packed.astype(np.float32) - 128
    if packed.shape[2] == 16:
        levels = np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:2], 32).astype(np.float32) - 8
    return (levels * scales[..., None]).reshape(len(packed), -1)[:, :n_inputs]


def initializers_of(found: dict[str, np.ndarray], weight: Weight, encoding: str) -> tuple[np.ndarray, np.ndarray]:
    grid = grid_of(weight, encoding).name.lower()
    return found[f"{weight.name}.{grid}"], found[f"{weight.name}.scales"]


@pytest.mark.parametrize("name", SHAPES)
def test_fp32_equals_transformers(name: str, tmp_path: Path) -> None:
    checkpoint = DenseCheckpoint.open(make_tiny(tmp_path / "tiny", **SHAPES[name]))
    [artifact] = export_onnx(checkpoint, tmp_path / "onnx", ["fp32"])
    ids = random_ids(checkpoint)
    expected = Reference(checkpoint.model()).prefill(ids)
    runtime = OnnxRuntime(tmp_path / artifact.path)
    for logits_of in (runtime.prefill, runtime.decode):
        metrics = compare(expected, logits_of(ids), ids)
        assert metrics.kl_mean <= 1e-8
        assert metrics.max_abs <= 1e-4


QUANTIZED_SHAPES = ["llama-tied", "llama-untied", "mistral-tied", "qwen2-untied", "qwen3-tied", "rows-of-48",
                    "vocabulary-512-heads-8x64", "vocabulary-512-heads-8x64-untied"]


@pytest.mark.parametrize("name", QUANTIZED_SHAPES)
def test_q8_and_q4_equal_transformers_with_rounded_weights(name: str, tmp_path: Path) -> None:
    checkpoint = DenseCheckpoint.open(make_tiny(tmp_path / "tiny", **SHAPES[name]))
    ids = random_ids(checkpoint)
    for artifact in export_onnx(checkpoint, tmp_path / "onnx", ["q8", "q4"], accuracy_level=0):
        expected = Reference(rounded_model(checkpoint, artifact.encoding)).prefill(ids)
        runtime = OnnxRuntime(tmp_path / artifact.path)
        for logits_of in (runtime.prefill, runtime.decode):
            metrics = compare(expected, logits_of(ids), ids)
            assert metrics.kl_mean <= 1e-8
            assert metrics.max_abs <= 1e-4


@pytest.mark.parametrize("name", SHAPES)
def test_fp16_is_near_transformers(name: str, tmp_path: Path) -> None:
    checkpoint = DenseCheckpoint.open(make_tiny(tmp_path / "tiny", **SHAPES[name]))
    [artifact] = export_onnx(checkpoint, tmp_path / "onnx", ["fp16"])
    ids = random_ids(checkpoint)
    expected = Reference(checkpoint.model()).prefill(ids)
    runtime = OnnxRuntime(tmp_path / artifact.path)
    for logits_of in (runtime.prefill, runtime.decode):
        metrics = compare(expected, logits_of(ids), ids)
        assert 1e-9 < metrics.kl_mean <= 1e-5  # float32 stays below the one, the gate is ten times the other
    assert runtime.generate(ids[:5].tolist(), 8, set())


def test_fp16_norms_of_large_activations(tmp_path: Path) -> None:
    """Squares of activations above 256 are no float16."""
    path = make_tiny(tmp_path / "tiny", tied=False)
    tensors = load_file(path / "model.safetensors")
    tensors["model.embed_tokens.weight"] *= 5000
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    checkpoint = DenseCheckpoint.open(path)
    assert tensors["model.embed_tokens.weight"].abs().max() > 1000
    [artifact] = export_onnx(checkpoint, tmp_path / "onnx", ["fp16"])
    ids = random_ids(checkpoint)
    got = OnnxRuntime(tmp_path / artifact.path).prefill(ids)
    assert compare(Reference(checkpoint.model()).prefill(ids), got, ids).kl_mean <= 1e-4


def test_weights_beyond_float16_are_refused(tmp_path: Path) -> None:
    path = make_tiny(tmp_path / "tiny")
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 3] = 70000
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"up_proj.weight has values beyond float16's largest, 65504; use onnx:fp32"):
        export_onnx(DenseCheckpoint.open(path), tmp_path / "onnx", ["fp16"])
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


def test_accuracy_level_4_rounds_activations(tiny_llama: Path, tmp_path: Path) -> None:
    checkpoint = DenseCheckpoint.open(tiny_llama)
    ids = random_ids(checkpoint)
    logits = []
    for level in (0, 4):
        [artifact] = export_onnx(checkpoint, tmp_path / f"level-{level}", ["q4"], accuracy_level=level)
        logits.append(OnnxRuntime(tmp_path / artifact.path).prefill(ids))
    assert 1e-7 < compare(logits[0], logits[1], ids).kl_mean < 1e-3


@pytest.mark.parametrize("grid", GRIDS.values())
def test_pack_decodes_as_gguf_does(grid: Grid) -> None:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((7, 96)).astype(np.float32) * rng.lognormal(0, 3, (7, 1)).astype(np.float32)
    weight[2, 32:64] = 0  # a block without a scale
    packed, scales = pack(weight, grid)
    np.testing.assert_array_equal(unpacked(packed, scales, 96), rounded(weight, GGMLQuantizationType[grid.type]))
    np.testing.assert_array_equal(scales.astype(np.float16), scales)


def test_pack_q4_0_by_hand() -> None:
    """The largest magnitude becomes level 0 (-8): d = 8 / -8 = -1, so the weight w is level 8 - w."""
    weight = np.zeros((1, 40), np.float32)
    weight[0, [0, 1, 16, 31, 33]] = 8, 3, -2, 1, -8
    packed, scales = pack(weight, Q4_0)
    assert scales.tolist() == [[-1.0, 1.0]]  # the second block's row ends after 8 weights; -8 = 1 * (0 - 8)
    assert packed[0, 0].tolist() == [0 | 5 << 4, *[0x88] * 7, 10 | 8 << 4, *[0x88] * 6, 8 | 7 << 4]
    assert packed[0, 1].tolist() == [8 | 0 << 4, *[0x88] * 15]


def test_pack_q8_0_by_hand() -> None:
    """The largest magnitude becomes level 128 +- 127: d = 127 / 127 = 1 and 254 / 127 = 2; halves round away from 0."""
    weight = np.zeros((1, 40), np.float32)
    weight[0, [0, 1, 2, 31, 33, 34, 35]] = 127, -127, 3, -1, -254, 5, -5
    packed, scales = pack(weight, Q8_0)
    assert scales.tolist() == [[1.0, 2.0]]  # the second block's row ends after 8 weights
    assert packed[0, 0].tolist() == [255, 1, 131, *[128] * 28, 127]
    assert packed[0, 1].tolist() == [128, 1, 131, 125, *[128] * 28]


@pytest.mark.parametrize("name", ["llama-tied", "vocabulary-512-heads-8x64-untied", "qwen2-tied", "qwen3-untied"])
def test_every_initializer_is_its_weight(name: str, tmp_path: Path) -> None:
    """A total map: each stored tensor is the checkpoint's of that name, none is missing, none is left over."""
    checkpoint = DenseCheckpoint.open(make_tiny(tmp_path / "tiny", **SHAPES[name]))
    for artifact in export_onnx(checkpoint, tmp_path / "onnx", list(FILES)):
        found = {key: value for key, value in initializers(tmp_path / artifact.path).items()
                 if not key.startswith("const.") and key not in ROPE_TABLES}
        n_bytes = sum(value.nbytes for value in found.values())
        for weight in checkpoint.weights():
            expected = checkpoint.tensor(weight.name).numpy()
            if artifact.encoding == "fp16" and not weight.name.endswith("norm.weight"):
                expected = expected.astype(np.float16)
            if expected.ndim == 1:
                np.testing.assert_array_equal(found.pop(weight.name), expected, strict=True)
            elif artifact.encoding in ("fp32", "fp16"):
                is_table = weight.role.name == "token_embd"  # linears stand transposed, as MatMul takes them
                np.testing.assert_array_equal(found.pop(weight.name), expected if is_table else expected.T, strict=True)
            else:
                packed, scales = initializers_of(found, weight, artifact.encoding)
                np.testing.assert_array_equal(unpacked(packed, scales, expected.shape[1]),
                                              rounded(expected, grid_of(weight, artifact.encoding)))
                found = {key: value for key, value in found.items() if value is not packed and value is not scales}
        assert not found
        assert artifact.bits_per_weight == pytest.approx(8 * n_bytes / checkpoint.shape.n_params)


def test_the_head_makes_the_logits(tmp_path: Path) -> None:
    checkpoint = DenseCheckpoint.open(make_tiny(tmp_path / "tiny", **SHAPES["vocabulary-512-heads-8x64-untied"]))
    for artifact in export_onnx(checkpoint, tmp_path / "onnx", list(FILES)):
        graph = onnx.load(tmp_path / artifact.path, load_external_data=False).graph
        [node] = [node for node in graph.node if "logits" in node.output or node.output[0] == "lm_head"
                  if node.op_type != "Cast"]
        assert node.input[1] in ("lm_head.weight", "lm_head.weight.q8_0")
        assert node.input[0] == "model.norm"


def test_the_tied_pair_is_one_tensor(llama_onnx: Path) -> None:
    graph = onnx.load(llama_onnx / "onnx/model_q4.onnx", load_external_data=False).graph
    shared = ["model.embed_tokens.weight.q8_0", "model.embed_tokens.weight.scales"]
    assert [node.op_type for node in graph.node if node.input[0] in shared] == ["Gather", "Gather"]
    [head] = [node for node in graph.node if "logits" in node.output]
    assert (head.op_type, head.input[1:]) == ("MatMulNBits", shared)


def test_graph_interface(llama_onnx: Path) -> None:
    """Names, order and numeric dimensions that genai, transformers.js and ORTModelForCausalLM rely on."""
    for encoding, file in FILES.items():
        onnx.checker.check_model(str(llama_onnx / file))
        graph = onnx.load(llama_onnx / file, load_external_data=False).graph
        shapes = {value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
                  for value in [*graph.input, *graph.output]}
        assert list(shapes)[:5] == ["input_ids", "attention_mask", "position_ids", "past_key_values.0.key",
                                    "past_key_values.0.value"]
        assert shapes["past_key_values.1.value"] == ["batch_size", 2, "past_sequence_length", 24]
        assert shapes["present.1.key"] == ["batch_size", 2, "total_sequence_length", 24]
        assert shapes["logits"] == ["batch_size", "sequence_length", 512]
        types = {value.name: value.type.tensor_type.elem_type for value in [*graph.input, *graph.output]}
        cache = onnx.TensorProto.FLOAT16 if encoding == "fp16" else onnx.TensorProto.FLOAT
        assert (types["past_key_values.0.key"], types["present.1.value"], types["logits"]) == (cache, cache, 1)
        standard = {node.op_type for node in graph.node if node.domain == "com.microsoft"}
        assert standard <= {"GroupQueryAttention", "RotaryEmbedding", "MatMulNBits", "FusedMatMul"}


def test_folder(llama_onnx: Path, tiny_llama: Path) -> None:
    names = {path.relative_to(llama_onnx).as_posix() for path in llama_onnx.rglob("*") if path.is_file()}
    assert names - {"special_tokens_map.json"} == {  # transformers 4 writes that file too
        "config.json", "generation_config.json", "genai_config.json", "tokenizer.json", "tokenizer_config.json",
        "chat_template.jinja", *FILES.values(), *(f"{file}_data" for file in FILES.values())}
    config = json.loads((llama_onnx / "config.json").read_text())
    assert config["transformers.js_config"] == {
        "dtype": "q4", "kv_cache_dtype": {"fp16": "float16"}, "use_external_data_format": {
            "model.onnx": 1, "model_fp16.onnx": 1, "model_quantized.onnx": 1, "model_q4.onnx": 1}}
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 10000.0
    genai = json.loads((llama_onnx / "genai_config.json").read_text())
    assert genai["model"]["decoder"]["filename"] == "onnx/model_q4.onnx"
    assert genai["model"]["context_length"] == genai["search"]["max_length"] == 512
    assert not list(llama_onnx.parent.glob(".*"))


def test_artifacts(tiny_llama: Path, tmp_path: Path) -> None:
    checkpoint = DenseCheckpoint.open(tiny_llama)
    artifacts = export_onnx(checkpoint, tmp_path / "onnx", list(FILES))
    assert [artifact.path for artifact in artifacts] == [f"onnx/{file}" for file in FILES.values()]
    # A float32 scale in 32 weights: one more bit.
    n_bits = {"fp32": lambda weight: 32, "fp16": lambda weight: 16, "q8": lambda weight: 9,
              "q4": lambda weight: 9 if weight.role.name == "token_embd" else 5}
    types = {"fp32": {"F32": 20}, "fp16": {"F16": 15, "F32": 5}, "q8": {"Q8_0": 15, "F32": 5},
             "q4": {"Q8_0": 1, "Q4_0": 14, "F32": 5}}
    for artifact in artifacts:
        n = sum(w.numel * (32 if len(w.shape) == 1 else n_bits[artifact.encoding](w)) for w in checkpoint.weights())
        assert artifact.bits_per_weight == n / checkpoint.shape.n_params
        assert artifact.tensor_types == types[artifact.encoding]
        files = [tmp_path / artifact.path, tmp_path / f"{artifact.path}_data"]
        assert artifact.bytes == sum(file.stat().st_size for file in files)
        assert artifact.sha256 == sha256_of(*files)
    assert export_onnx(checkpoint, tmp_path / "again", ["fp32"])[0].sha256 == artifacts[0].sha256


def test_shards(tiny_llama: Path, tmp_path: Path) -> None:
    """Three data files, each below the limit, hold what one would; hash and size cover them all."""
    checkpoint = DenseCheckpoint.open(tiny_llama)
    whole = {artifact.encoding: artifact for artifact in export_onnx(checkpoint, tmp_path / "whole", list(FILES))}
    ids = random_ids(checkpoint)
    for encoding, file in FILES.items():
        limit = (tmp_path / f"whole/{file}_data").stat().st_size * 2 // 5
        [artifact] = export_onnx(checkpoint, tmp_path / "onnx", [encoding], shard_bytes=limit)
        parts = [tmp_path / f"onnx/{file}_data{suffix}" for suffix in ("", "_1", "_2")]
        assert sorted((tmp_path / "onnx/onnx").iterdir()) == sorted([tmp_path / f"onnx/{file}", *parts])
        assert all(0 < part.stat().st_size <= limit for part in parts)
        assert artifact.sha256 == sha256_of(tmp_path / f"onnx/{file}", *parts) != whole[encoding].sha256
        assert artifact.bytes == sum(path.stat().st_size for path in (tmp_path / f"onnx/{file}", *parts))
        config = json.loads((tmp_path / "onnx/config.json").read_text())
        assert config["transformers.js_config"]["use_external_data_format"] == {Path(file).name: 3}
        expected = initializers(tmp_path / "whole" / file)
        for name, array in initializers(tmp_path / "onnx" / file).items():
            np.testing.assert_array_equal(array, expected.pop(name), strict=True)
        assert not expected
        logits = OnnxRuntime(tmp_path / f"whole/{file}").prefill(ids)
        np.testing.assert_array_equal(OnnxRuntime(tmp_path / f"onnx/{file}").prefill(ids), logits)
        np.testing.assert_allclose(OrtGenai(tmp_path / "onnx").prefill(ids), logits, atol=1e-5)


def test_a_weight_larger_than_a_shard_stays_whole(tiny_llama: Path, tmp_path: Path) -> None:
    checkpoint = DenseCheckpoint.open(tiny_llama)
    [artifact] = export_onnx(checkpoint, tmp_path / "onnx", ["fp32"], shard_bytes=40_000)
    sizes = [path.stat().st_size for path in (tmp_path / "onnx/onnx").glob("*_data*")]
    assert max(sizes) == 4 * checkpoint.shape.vocab_size * checkpoint.shape.hidden_size > 40_000
    ids = random_ids(checkpoint)
    got = OnnxRuntime(tmp_path / artifact.path).prefill(ids)
    assert compare(Reference(checkpoint.model()).prefill(ids), got, ids).max_abs <= 1e-4


def test_lineage_in_metadata(llama_copy: Path, tmp_path: Path) -> None:
    (llama_copy / "README.md").write_text("---\nlicense: mit\nbase_model: [some/teacher]\n---\n")
    (llama_copy / "lrc_edge.json").write_text(json.dumps({"name": "Tiny-LRC-64", "teacher": "some/teacher"}))
    export_onnx(DenseCheckpoint.open(llama_copy), tmp_path / "onnx", ["fp32"])
    model = onnx.load(tmp_path / "onnx/onnx/model.onnx", load_external_data=False)
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert metadata.items() >= {"license": "mit", "base_model": "some/teacher", "lrc_edge.teacher": "some/teacher",
                                "lrc_edge.name": "Tiny-LRC-64", "lrc_edge.encoding": "fp32"}.items()
    assert (tmp_path / "onnx/README.md").exists()


def test_only_sentencepiece_tokenizer(tmp_path: Path) -> None:
    """genai reads tokenizer.json only, so it is made when the checkpoint has none."""
    path = make_tiny(tmp_path / "tiny", tokenizer="spm")
    _write_sentencepiece_model(path)
    checkpoint = DenseCheckpoint.open(path)
    export_onnx(checkpoint, tmp_path / "onnx", ["fp32"])
    tokenizer, genai = checkpoint.tokenizer(), OrtGenai(tmp_path / "onnx")
    for text in ("Hello", "two  spaces", "naïve 日本 😀", "a\nb"):
        assert genai.tokenize(text) == tokenizer(text)["input_ids"]


def _write_sentencepiece_model(path: Path) -> None:
    """Replace tokenizer.json by a tokenizer.model with the same pieces."""
    from sentencepiece import sentencepiece_model_pb2

    table = json.loads((path / "tokenizer.json").read_text())
    (path / "tokenizer.json").unlink()
    merged = {"".join(pair): rank for rank, pair in enumerate(table["model"]["merges"])}
    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    proto.trainer_spec.model_type = 2  # BPE
    proto.trainer_spec.byte_fallback = True
    for piece, number in sorted(table["model"]["vocab"].items(), key=lambda item: item[1]):
        kind = 2 if number == 0 else 3 if number < 3 else 6 if piece.startswith("<0x") else 1
        proto.pieces.add(piece=piece, score=-float(merged.get(piece, 0)), type=kind)
    (path / "tokenizer.model").write_bytes(proto.SerializeToString())
    (path / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "bos_token": "<s>", "eos_token": "</s>",
        "unk_token": "<unk>"}))


@pytest.mark.parametrize("encoding", FILES)
def test_memory_stays_below_the_largest_tensor(encoding: str, tmp_path: Path) -> None:
    """In float32: the checkpoint stores it in bfloat16, and torch maps that from the file."""
    path = make_tiny(tmp_path / "tiny", vocab_size=16_384, hidden_size=512, layers=1, dtype=torch.bfloat16)
    checkpoint = DenseCheckpoint.open(path)
    largest = 4 * max(weight.numel for weight in checkpoint.weights())
    tracemalloc.start()  # sees numpy's arrays
    export_onnx(checkpoint, tmp_path / "onnx", [encoding], threads=2)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < largest, f"{peak:,} of {largest:,}"


def test_a_failure_leaves_the_old_folder(llama_copy: Path, tmp_path: Path) -> None:
    export_onnx(DenseCheckpoint.open(llama_copy), tmp_path / "onnx", ["fp32"])
    before = sha256_of(*sorted((tmp_path / "onnx").rglob("*.*")))
    tensors = load_file(llama_copy / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][3, 3] = float("nan")
    save_file(tensors, llama_copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"down_proj\.weight holds 1 NaN"):
        export_onnx(DenseCheckpoint.open(llama_copy), tmp_path / "onnx", ["fp32", "q4"])
    assert sha256_of(*sorted((tmp_path / "onnx").rglob("*.*"))) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["onnx", "tiny-llama"]


@pytest.mark.parametrize("encoding", ["q8", "q4"])
def test_weights_beyond_the_grid_are_refused(encoding: str, llama_copy: Path, tmp_path: Path) -> None:
    """Blocks have float16 scales; NaN and infinity are refused before, where the checkpoint is read."""
    tensors = load_file(llama_copy / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][3, 3] = 1e30
    save_file(tensors, llama_copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.down_proj\.weight: weights that Q\d_0 cannot hold"):
        export_onnx(DenseCheckpoint.open(llama_copy), tmp_path / "onnx", [encoding])
    assert [path.name for path in tmp_path.iterdir()] == ["tiny-llama"]


@pytest.mark.parametrize(("encodings", "level"), [([], 4), (["int4"], 4), (["fp32", "fp32"], 4), (["q4"], 5)])
def test_unknown_wishes_are_refused(encodings: list[str], level: int, tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="need"):
        export_onnx(DenseCheckpoint.open(tiny_llama), tmp_path / "onnx", encodings, accuracy_level=level)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("fields", "message"), [
    (dict(head_dim=12), "head_dim 12 has no ONNX form"),
    (dict(rope_scaling={"rope_type": "dynamic", "factor": 2.0}), "rope_type 'dynamic' has no ONNX form"),
])
def test_shapes_without_onnx_form_are_refused(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    checkpoint = DenseCheckpoint.open(make_tiny(tmp_path / "tiny", **fields))
    with pytest.raises(UserError, match=message):
        export_onnx(checkpoint, tmp_path / "onnx", ["fp32"])
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


def test_no_end_of_text_is_refused(llama_copy: Path, tmp_path: Path) -> None:
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        table = json.loads((llama_copy / name).read_text())
        (llama_copy / name).write_text(json.dumps({k: v for k, v in table.items() if not k.startswith("eos_token")}))
    with pytest.raises(UserError, match="no eos_token_id"):
        export_onnx(DenseCheckpoint.open(llama_copy), tmp_path / "onnx", ["fp32"])


def test_an_unwritable_folder_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the ONNX files"):
        export_onnx(DenseCheckpoint.open(tiny_llama), tmp_path / "file" / "onnx", ["fp32"])


def test_an_existing_folder_is_replaced(tiny_llama: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_llama, tmp_path / "onnx")
    export_onnx(DenseCheckpoint.open(tiny_llama), tmp_path / "onnx", ["q4"])
    assert not (tmp_path / "onnx/model.safetensors").exists()
    genai = json.loads((tmp_path / "onnx/genai_config.json").read_text())
    assert genai["model"]["decoder"]["filename"] == "onnx/model_q4.onnx"


def test_progress_counts_every_tensor_of_every_file(tmp_path: Path) -> None:
    checkpoint = DenseCheckpoint.open(make_tiny(tmp_path / "model", tied=False))
    stored_mb = sum(tensor.numel() for tensor in checkpoint.model().parameters()) * 4 / 1e6
    said = Recorder()
    export_onnx(checkpoint, tmp_path / "onnx", ["q4", "fp16"], said)
    names = {weight.name for weight in checkpoint.weights()}
    assert said.total == pytest.approx(2 * stored_mb) and said.unit == "MB"
    assert len(said.completed) == 2 * (len(names) + 1)
    assert {detail for detail, _ in said.updates} - {"q4", "fp16"} == {
        f"{encoding}: {name}" for encoding in ("q4", "fp16") for name in names}
    assert said.updates[len(names) + 1] == ("fp16", pytest.approx(stored_mb))
