"""Files with random weights, and what the cost model makes of timings."""
from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from families import FAMILIES
from gguf import GGUFReader
from onnx.external_data_helper import ExternalDataInfo
from tiny_models import make_tiny

from lrc_edge.checkpoint import DenseCheckpoint
from lrc_edge.errors import UserError
from lrc_edge.export.gguf.to_gguf import export_gguf
from lrc_edge.export.onnx.to_onnx import FILES, export_onnx
from lrc_edge.machine import architecture
from lrc_edge.shape import ModelShape
from lrc_edge.targets.devices.kits import Pip
from lrc_edge.targets.profile import all_profiles, load_profile
from lrc_edge.targets.runtimes.llamacpp import LlamaCpp
from lrc_edge.targets.runtimes.onnxrt import OnnxRuntime
from lrc_edge.targets.runtimes.ort_genai import OrtGenai
from lrc_edge.targets.runtimes.table import RUNTIMES
from lrc_edge.targets.timing import measured
from lrc_edge.targets.timing.anchors import anchors_of
from lrc_edge.targets.timing.cost import TILE, CostModel, Timing, decode_counts, prompt_counts
from lrc_edge.targets.timing.measured import measured_here, runtime_here
from lrc_edge.targets.timing.random_gguf import write_random_gguf
from lrc_edge.targets.timing.random_onnx import write_random_onnx

SHAPE = ModelShape("llama", 32_000, 1024, 4096, 16, 16, 4, 64, 4096, True)


@pytest.mark.parametrize("variant", [name for name in FAMILIES if "rope" not in name])
def test_a_random_file_has_the_tensors_of_an_exported_one(variant: str, tmp_path: Path) -> None:
    teacher = DenseCheckpoint.open(make_tiny(tmp_path / "tiny", hidden_size=64, intermediate_size=96, head_dim=32,
                                             **FAMILIES[variant]))
    for artifact in export_gguf(teacher, tmp_path / "gguf", ["q4_0", "q8_0", "f16"]):
        file = tmp_path / f"{artifact.encoding}.gguf"
        write_random_gguf(teacher.shape, f"gguf:{artifact.encoding}", file)
        expected, found = ({tensor.name: (tensor.tensor_type, tensor.shape.tolist()) for tensor in GGUFReader(
            path).tensors} for path in (tmp_path / artifact.path, file))
        assert found == expected
        with LlamaCpp(file, 64) as runtime:
            assert runtime.vocab_size == teacher.shape.vocab_size
            assert np.isfinite(runtime.prefill(np.arange(40))).all()
            assert len(list(runtime.tokens([1, 2, 3], 5))) == 5


def test_a_row_that_blocks_do_not_fit_is_f16_as_llama_cpp_makes_it(tmp_path: Path) -> None:
    shape = replace(SHAPE, hidden_size=128, intermediate_size=200, num_hidden_layers=1, vocab_size=300)
    write_random_gguf(shape, "gguf:q4_0", tmp_path / "x.gguf")
    types = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(tmp_path / "x.gguf").tensors}
    assert types["blk.0.ffn_down.weight"] == "F16" and types["blk.0.ffn_up.weight"] == "Q4_0"
    assert types["token_embd.weight"] == "Q8_0"


def contents(path: Path) -> dict[str, Any]:
    """All of a graph but its numbers, the epsilon and the sliding window, which are not part of a shape."""
    graph = onnx.load(path, load_external_data=False).graph

    def name(text: str) -> str:
        return re.sub(r"const\.float32\.\d+e-\d+.*", "epsilon", text)

    def attribute(found: onnx.AttributeProto) -> Any:
        return found.name, None if found.name == "local_window_size" else onnx.helper.get_attribute_value(found)

    return {
        "initializers": [(name(t.name), t.data_type, list(t.dims), ExternalDataInfo(t).length) for t in
                         graph.initializer],
        "nodes": [(node.op_type, node.domain, list(map(name, node.input)), list(node.output),
                   sorted(map(attribute, node.attribute))) for node in graph.node],
        "inputs": list(map(str, graph.input)), "outputs": list(map(str, graph.output)),
        "bytes": path.with_name(path.name + "_data").stat().st_size}


@pytest.mark.parametrize("variant", FAMILIES)
def test_a_random_onnx_folder_has_the_graph_of_an_exported_one(variant: str, tmp_path: Path) -> None:
    """Rows of 48 and 80 are padded in blocks."""
    teacher = DenseCheckpoint.open(make_tiny(tmp_path / "tiny", hidden_size=48, intermediate_size=80, heads=3,
                                             kv_heads=1, head_dim=32, **FAMILIES[variant]))
    for artifact in export_onnx(teacher, tmp_path / "onnx", list(FILES)):
        file = tmp_path / artifact.encoding / FILES[artifact.encoding]
        file.parent.mkdir(parents=True)
        write_random_onnx(teacher.shape, f"onnx:{artifact.encoding}", file)
        expected, found = contents(tmp_path / artifact.path), contents(file)
        assert all(found[part] == expected[part] for part in expected) and found["bytes"] > 0
        runtime = OnnxRuntime(file)
        logits = runtime.prefill(np.arange(40))
        assert np.isfinite(logits).all() and logits.std() > 0
    expected, found = (json.loads((folder / "genai_config.json").read_text())["model"]
                       for folder in (tmp_path / "onnx", tmp_path / "q4"))
    assert {**found, **{key: expected[key] for key in expected if key.endswith("token_id")}} == expected


def test_onnxruntime_genai_does_not_end_in_a_random_folder(tmp_path: Path) -> None:
    """It would end at the last token, whose logit is therefore below the largest."""
    shape = ModelShape("llama", 512, 64, 96, 2, 2, 1, 32, 256, True)
    (file := tmp_path / FILES["q4"]).parent.mkdir()
    write_random_onnx(shape, "onnx:q4", file)
    logits = OnnxRuntime(file).prefill(np.arange(200))
    assert not logits[:, -1].any() and (logits.max(-1) > 0).all()
    runtime = OrtGenai(tmp_path, FILES["q4"], 1)
    assert runtime.end_tokens == {511} and len(list(runtime.tokens(list(range(50)), 200))) == 200


def test_a_head_that_onnxruntime_does_not_take_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"onnx:q4: head_dim 12 has no ONNX form: .* a multiple of 8"):
        write_random_onnx(replace(SHAPE, head_dim=12), "onnx:q4", tmp_path / FILES["q4"])


def test_every_format_of_a_device_is_timed_in_its_own_runtime() -> None:
    for profile in (replace(profile, architecture=architecture()) for profile in all_profiles()):
        for format_ in profile.format_names:
            runtime, row = runtime_here(profile, format_), RUNTIMES[profile.runtime_of(format_)]
            assert (runtime is not None) == (row.python_flags is not None)
            if runtime:
                assert runtime.row is row and any(isinstance(kit, Pip) for kit in runtime.kits)
    assert runtime_here(load_profile("android-low"), "onnx:q4") is None or architecture() == "aarch64"
    assert runtime_here(replace(load_profile("laptop-x86"), architecture="riscv64"), "gguf:q4_0") is None


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = runtime_here(replace(load_profile("laptop-x86"), architecture=architecture()), "onnx:q4")
    assert runtime is not None
    monkeypatch.setattr(measured, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"^timing onnx:q4 in onnxruntime-genai needs onnx; run: pip install onnx$"):
        measured_here(runtime, [SHAPE], "onnx:q4", 256, 1, print)
    monkeypatch.setattr(Pip, "missing", lambda kit: "absent")
    with pytest.raises(UserError, match=r"needs onnxruntime-genai and onnx; run: pip install onnxruntime-genai onnx$"):
        measured_here(runtime, [SHAPE], "onnx:q4", 256, 1, print)


@pytest.mark.parametrize(("modules", "absent"), [
    # What docs/targets.md has installed on a device, and what the files of each kind need besides.
    ("pipeline.target_commands, pipeline.device_checks, targets.timing.measured", "torch transformers yaml gguf onnx"),
    ("targets.timing.random_gguf", "torch transformers onnx"),
    ("targets.timing.random_onnx", "torch transformers yaml gguf")])
def test_devices_need_no_more_packages(modules: str, absent: str) -> None:
    names = [f"lrc_edge.{name}" for name in modules.split(", ")]
    code = (f"import importlib, sys\nsys.modules.update(dict.fromkeys({absent.split()}))\n"  # so their import fails
            f"[importlib.import_module(name) for name in {names}]")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


DECODE, PROMPT = (6e-8, 7e-8, 2e-7, 4e-8, 0.01, 0.1), (7e-9, 7e-8, 0.0, 0.004, 0.05)


def timings_of(shapes: list[ModelShape]) -> list[Timing]:
    """Timings of a machine whose factors are known."""
    return [Timing(shape, "gguf:q4_0", depth, 1000 / np.dot(PROMPT, prompt_counts(shape, "gguf:q4_0", depth)),
                   1000 / np.dot(DECODE, decode_counts(shape, "gguf:q4_0", depth)))
            for shape in shapes for depth in (128, 1152)]


def test_the_anchors_determine_every_factor() -> None:
    model = CostModel.fit(timings_of(anchors_of(SHAPE)), "gguf:q4_0")
    assert model.worst < 1e-6 and model.n_timings == 14
    for shape in (SHAPE, replace(SHAPE, num_hidden_layers=9, hidden_size=320, num_attention_heads=10,
                                 num_key_value_heads=2)):
        expected = np.dot(DECODE, decode_counts(shape, "gguf:q4_0", 2000))
        assert model.decode_ms(shape, 2000) == pytest.approx(expected, rel=1e-5)
        expected = 2000 * np.dot(PROMPT, prompt_counts(shape, "gguf:q4_0", 2000))
        assert model.first_token_ms(shape, 2000) == pytest.approx(expected, rel=1e-5)


def test_only_onnx_has_the_logits_of_a_whole_prompt() -> None:
    head = SHAPE.vocab_size * SHAPE.hidden_size
    of_gguf, of_onnx = (prompt_counts(SHAPE, format_, 100) for format_ in ("gguf:q4_0", "onnx:q4"))
    assert of_onnx[0] - of_gguf[0] == pytest.approx(0.99 * head) and of_onnx[1:] == of_gguf[1:]


def test_no_part_has_a_negative_cost() -> None:
    """A disturbed timing must not make a larger model faster."""
    timings = timings_of(anchors_of(SHAPE))
    timings[0] = replace(timings[0], decode=timings[0].decode / 3, prompt=timings[0].prompt / 3)  # type: ignore[operator]
    model = CostModel.fit(timings, "gguf:q4_0")
    assert min(*model.decode, *model.prompt) >= 0 and model.worst > 0.2


def test_too_few_timings_are_an_error() -> None:
    with pytest.raises(ValueError, match="4 timings for 6 factors"):
        CostModel.fit(timings_of(anchors_of(SHAPE)[:2]), "gguf:q4_0")


def test_anchors_are_shapes_that_formats_can_hold() -> None:
    for shape in anchors_of(SHAPE):
        assert shape.hidden_size % 64 == shape.intermediate_size % 64 == 0
        assert shape.num_attention_heads % shape.num_key_value_heads == 0
    small = replace(SHAPE, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=1,
                    num_key_value_heads=1)
    assert all(shape.num_hidden_layers == 1 for shape in anchors_of(small))


def test_attention_over_a_prompt_counts_whole_tiles() -> None:
    """Each token meets the keys of all tiles up to its own, whether they come before or after it."""
    for n_prompt in (TILE, 2 * TILE, 18 * TILE):
        keys = np.mean([TILE * (i // TILE + 1) for i in range(n_prompt)])
        attention = prompt_counts(SHAPE, "gguf:q4_0", n_prompt)[1]
        assert attention == pytest.approx(keys * SHAPE.num_hidden_layers * SHAPE.q_size)
