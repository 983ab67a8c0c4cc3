"""The audit of ONNX files and what is beside them: faithful ones pass, each kind of damage is named."""
from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from families import FAMILIES
from onnx import numpy_helper
from tiny_models import make_tiny

from lrc_edge.checkpoint import DenseCheckpoint
from lrc_edge.errors import UserError
from lrc_edge.export.audit.onnx_folder import audit_onnx
from lrc_edge.export.onnx.to_onnx import FILES, export_onnx
from lrc_edge.finding import Finding, faults

MORE_SHAPES: dict[str, dict[str, Any]] = {
    "yarn-rope": dict(rope_scaling={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}),
    "mistral-window": dict(family="mistral", tokenizer="spm", sliding_window=7),
    "qwen2-window-in-layer-1": dict(family="qwen2", use_sliding_window=True, sliding_window=5, max_window_layers=1),
    "padded-vocabulary": dict(vocab_size=600, tied=False), "bf16": dict(dtype=torch.bfloat16),
}
Edit = Callable[[Any], Any]


@pytest.fixture(scope="module")
def llama_onnx(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "onnx"
    export_onnx(DenseCheckpoint.open(tiny_llama), folder, list(FILES))
    return folder


@pytest.fixture
def folder(llama_onnx: Path, tmp_path: Path) -> Path:
    """A copy to damage: one fp32 graph and its sidecars."""
    copy = Path(shutil.copytree(llama_onnx, tmp_path / "copy", ignore=shutil.ignore_patterns("model_*")))
    edit_json(copy / "genai_config.json", lambda table: table["model"]["decoder"].update(filename="onnx/model.onnx"))
    return copy


def edit_json(file: Path, edit: Edit) -> None:
    table = json.loads(file.read_text())
    edit(table)
    file.write_text(json.dumps(table))


def edit_graph(folder: Path, edit: Edit) -> None:
    """Change the graph, its tensors moved into it."""
    model = onnx.load(folder / FILES["fp32"])
    edit(model.graph)
    (folder / (FILES["fp32"] + "_data")).unlink()
    onnx.save(model, folder / FILES["fp32"])


def edit_tensor(name: str, edit: Callable[[np.ndarray], np.ndarray]) -> Edit:
    def change(graph: Any) -> None:
        [tensor] = [tensor for tensor in graph.initializer if tensor.name == name]
        tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(edit(numpy_helper.to_array(tensor).copy())), name))
    return change


def texts(findings: list[Finding]) -> list[str]:
    return [finding.text for finding in findings]


@pytest.mark.parametrize("name", FAMILIES | MORE_SHAPES)
def test_what_this_project_writes_passes(name: str, tmp_path: Path) -> None:
    checkpoint = DenseCheckpoint.open(make_tiny(tmp_path / "tiny", **(FAMILIES | MORE_SHAPES)[name]))
    for artifact in export_onnx(checkpoint, tmp_path / "onnx", list(FILES)):
        findings = audit_onnx(tmp_path / artifact.path, checkpoint)
        assert texts(faults(findings)) == []
        # Packed matrices have names of their own.
        assert [finding.name for finding in findings] == (["tensors"] if artifact.encoding in ("q8", "q4") else [])


def test_a_folder_means_its_only_graph_or_the_one_of_genai_config(llama_onnx: Path, folder: Path, tiny_llama: Path,
                                                                  tmp_path: Path) -> None:
    checkpoint = DenseCheckpoint.open(tiny_llama)
    assert texts(audit_onnx(folder, checkpoint)) == []
    assert [finding.name for finding in audit_onnx(llama_onnx, checkpoint)] == ["tensors"]  # of the q4 file
    (folder / "genai_config.json").unlink()
    [note] = audit_onnx(folder, checkpoint)
    assert note.severity == "note" and "genai_config.json is not in" in note.text
    with pytest.raises(UserError, match=r"4 \.onnx files"):
        audit_onnx(llama_onnx / "onnx", checkpoint)
    for path, message in ((tmp_path / "nothing", "no such file or directory"), (tiny_llama, "no \\.onnx file")):
        with pytest.raises(UserError, match=message):
            audit_onnx(path, checkpoint)


def set_(*keys: str, value: Any) -> Edit:
    def edit(table: dict[str, Any]) -> None:
        for key in keys[:-1]:
            table = table[key]
        table[keys[-1]] = value
    return edit


BAD_JSON: dict[str, tuple[str, Edit, str]] = {
    "rope base": ("config.json", set_("rope_theta", value=500000.0),
                  "rope base: found 500000, expected 10000 (rope_theta in config.json)"),
    "rope base of transformers 5": ("config.json", set_("rope_parameters", "rope_theta", value=5e5),
                                    "rope base: found 500000, expected 10000 (rope_parameters in config.json)"),
    "rope scaling": ("config.json", set_("rope_scaling", value={"rope_type": "linear", "factor": 2.0}),
                     "rope scaling: found {'rope_type': 'linear', 'factor': 2.0}, expected 'none'"),
    "rope of a wrong kind": ("config.json", set_("rope_parameters", value=[3]), "rope_parameters in config.json is "),
    "eps": ("config.json", set_("rms_norm_eps", value=1e-6), "norm epsilon: found 1e-06, expected 1e-05"),
    "heads": ("config.json", set_("num_attention_heads", value=8), "attention heads: found 8, expected 4"),
    "context": ("config.json", set_("max_position_embeddings", value=2048), "context length: found 2048, expected 512"),
    "vocabulary": ("config.json", set_("vocab_size", value="many"), "vocabulary size: found 'many', expected 512"),
    "family": ("config.json", set_("model_type", value="qwen2"), "architecture: found 'qwen2', expected 'llama'"),
    "EOS": ("config.json", set_("eos_token_id", value=7), "EOS token: found [7], expected [4]"),
    "BOS": ("genai_config.json", set_("model", "bos_token_id", value=9), "BOS token: found 9, expected 0"),
    "genai's EOS": ("genai_config.json", set_("model", "eos_token_id", value=[4, 9]), "text would end at 9"),
    "genai without EOS": ("genai_config.json", set_("model", "eos_token_id", value=None), "text would not end at 4"),
    "genai's head size": ("genai_config.json", set_("model", "decoder", "head_size", value=16),
                          "head size: found 16, expected 24 (head_size in genai_config.json)"),
    "genai's context": ("genai_config.json", set_("model", "context_length", value=64), "context length: found 64, "),
    "genai's search": ("genai_config.json", set_("search", "max_length", value=9999), "context length: found 9999, "),
    "genai's file": ("genai_config.json", set_("model", "decoder", "filename", value="other.onnx"),
                     "missing file: genai_config.json names the graph other.onnx"),
    "genai's names": ("genai_config.json", set_("model", "decoder", "inputs", "input_ids", value="tokens"),
                      "graph input: tokens is missing"),
    "genai without decoder": ("genai_config.json", set_("model", value=3), "head size: found nothing, expected 24"),
    "swapped tokens": ("tokenizer.json", lambda t: t["model"]["vocab"].update(
        {"Ġthe": t["model"]["vocab"]["Ġa"], "Ġa": t["model"]["vocab"]["Ġthe"]}), "; 2 of 512 differ)"),
    "extra token": ("tokenizer.json", lambda t: t["model"]["vocab"].update(mutant=512),
                    "tokens: found 'mutant', expected nothing (token 512; 1 are not the model's)"),
    "merges": ("tokenizer.json", lambda t: t["model"]["merges"].reverse(), "merges: found "),
    "ignore_merges": ("tokenizer.json", set_("model", "ignore_merges", value=False),
                      "tokenizer ignore_merges: found False, expected True"),
    "added token": ("tokenizer.json", lambda t: t["added_tokens"][1].update(special=False),
                    "added tokens: found False, expected True (special of token 1)"),
    "normalizer": ("tokenizer.json", set_("normalizer", value={"type": "Lowercase"}), "normalizer: found '{"),
    "pre-tokenizer": ("tokenizer.json", set_("pre_tokenizer", value={"type": "ByteLevel", "add_prefix_space": True,
                                                                     "trim_offsets": True, "use_regex": True}),
                      "pre-tokenizer: found '{"),
    "no BOS added": ("tokenizer.json", set_("post_processor", value=None), "post-processor: found 'null', expected '{"),
    "truncation": ("tokenizer.json", set_("truncation", value={
        "direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}), "truncation: found '{"),
    "tokenizer of no known kind": ("tokenizer.json", set_("model", value={"type": "Mystery"}),
                                   "tokenizer: tokenizer.json does not load ("),
}


@pytest.mark.parametrize("damage", BAD_JSON)
def test_damaged_sidecars_are_named(damage: str, folder: Path, tiny_llama: Path) -> None:
    name, edit, expected = BAD_JSON[damage]
    edit_json(folder / name, edit)
    found = texts(faults(audit_onnx(folder / FILES["fp32"], DenseCheckpoint.open(tiny_llama))))
    assert any(expected in text for text in found), found
    assert len(found) == 1 or damage in ("genai without decoder", "genai's names"), found


@pytest.mark.parametrize("name, expected", [
    ("config.json", "note: missing file: config.json"), ("tokenizer.json", "fault: missing file: tokenizer.json"),
    ("tokenizer_config.json", "fault: missing file: tokenizer_config.json"),
    ("chat_template.jinja", "fault: chat template: found nothing")])
def test_missing_sidecars_are_named(name: str, expected: str, folder: Path, tiny_llama: Path) -> None:
    (folder / name).unlink()
    [finding] = audit_onnx(folder / FILES["fp32"], DenseCheckpoint.open(tiny_llama))
    assert f"{finding.severity}: {finding.text}".startswith(expected)


@pytest.mark.parametrize("name", ["config.json", "genai_config.json", "tokenizer.json", "tokenizer_config.json",
                                  "generation_config.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b"null", b'{"model": []}'])
def test_sidecars_that_are_no_tables_are_named(name: str, content: bytes, folder: Path, tiny_llama: Path) -> None:
    (folder / name).write_bytes(content)
    findings = audit_onnx(folder / FILES["fp32"], DenseCheckpoint.open(tiny_llama))
    harmless = content == b'{"model": []}' and name in ("tokenizer_config.json", "generation_config.json")
    assert faults(findings) or harmless


def test_steps_that_change_no_ids_are_a_note(folder: Path, tiny_llama: Path) -> None:
    edit_json(folder / "tokenizer.json", lambda table: table.update(
        normalizer={"type": "Replace", "pattern": {"String": "\u0001\u0002"}, "content": "x"}))
    [note] = audit_onnx(folder, DenseCheckpoint.open(tiny_llama))
    assert (note.name, note.severity) == ("normalizer", "note")


def test_templates_are_compared_wherever_they_are(folder: Path, tiny_llama: Path) -> None:
    edit_json(folder / "tokenizer_config.json", set_("chat_template", value="{{ messages[0].content }}"))
    [fault] = audit_onnx(folder, DenseCheckpoint.open(tiny_llama))
    assert (fault.name, fault.severity) == ("chat template", "fault")


def of_op(op: str, edit: Callable[[Any], Any]) -> Edit:
    return lambda graph: [edit(node) for node in graph.node if node.op_type == op]


def set_attribute(name: str, value: Any) -> Callable[[Any], None]:
    def edit(node: Any) -> None:
        kept = [attribute for attribute in node.attribute if attribute.name != name]
        del node.attribute[:]
        node.attribute.extend([*kept, onnx.helper.make_attribute(name, value)])
    return edit


def transposed(array: np.ndarray) -> np.ndarray:
    return array.T


def first_nan(array: np.ndarray) -> np.ndarray:
    array[0] = np.nan
    return array


Q_PROJ, O_PROJ = "model.layers.1.self_attn.q_proj.weight", "model.layers.0.self_attn.o_proj.weight"
BAD_GRAPHS: dict[str, tuple[Edit, str]] = {
    "no mask": (lambda g: next(v for v in g.input if v.name == "attention_mask").__setattr__("name", "mask"),
                "graph input: attention_mask is missing"),
    "no cache": (lambda g: g.input.__delitem__(slice(3, None)), "graph input: past_key_values.0.key is missing, and 3"),
    "no logits": (lambda g: g.output[0].__setattr__("name", "scores"), "graph output: logits is missing"),
    "extra input": (lambda g: g.input.append(onnx.helper.make_tensor_value_info("noise", 1, [1])),
                    "graph input: noise is fed by no runtime"),
    "vocabulary": (lambda g: g.output[0].type.tensor_type.shape.dim[2].__setattr__("dim_value", 300),
                   "vocabulary size: found 300, expected 512 (of the logits)"),
    "cache": (lambda g: g.input[3].type.tensor_type.shape.dim[3].__setattr__("dim_value", 16),
              "head size: found 16, expected 24 (of the input past_key_values.0.key)"),
    "heads": (of_op("GroupQueryAttention", set_attribute("num_heads", 2)), "attention heads: found 2, expected 4"),
    "scale": (of_op("GroupQueryAttention", set_attribute("scale", 1.0)), "attention scale: found 1, expected 0.2041"),
    "window": (of_op("GroupQueryAttention", set_attribute("local_window_size", 16)),
               "sliding window: found 16, expected -1"),
    "rope table": (edit_tensor("rope.cos", lambda a: np.cos(np.arccos(np.clip(a, -1, 1)) * 0.5)),
                   "rope tables: rope.cos differs from position "),
    "short rope table": (edit_tensor("rope.sin", lambda a: a[:100]),
                         "context length: found 100, expected 512 (positions in the table rope.sin)"),
    "eps": (edit_tensor(f"const.float32.{float(np.float32(1e-5))}.scalar", lambda a: a * 10),
            "norm epsilon: found 0.0001, expected 1e-05 (in the graph)"),
    "swapped rows": (edit_tensor(O_PROJ, lambda a: a[::-1]), f"tensor values: {O_PROJ} differs"),
    "changed": (edit_tensor(Q_PROJ, lambda a: a * 1.001), f"tensor values: {Q_PROJ} differs from the model's by 0.001"),
    "shape": (edit_tensor(Q_PROJ, lambda a: a[:, :-1]), "tensor shape: found "),
    "NaN": (edit_tensor(Q_PROJ, first_nan), f"tensor not finite: {Q_PROJ} holds NaN or infinity"),
}


@pytest.mark.parametrize("damage", BAD_GRAPHS)
def test_damaged_graphs_are_named(damage: str, folder: Path, tiny_llama: Path) -> None:
    edit, expected = BAD_GRAPHS[damage]
    edit_graph(folder, edit)
    found = texts(faults(audit_onnx(folder, DenseCheckpoint.open(tiny_llama))))
    assert any(expected in text for text in found), found


def test_inline_tensors_and_either_orientation_pass(folder: Path, tiny_llama: Path) -> None:
    edit_graph(folder, edit_tensor(Q_PROJ, transposed))
    assert texts(audit_onnx(folder, DenseCheckpoint.open(tiny_llama))) == []


def test_weights_rounded_to_16_bits_pass(folder: Path, tiny_llama: Path) -> None:
    edit_graph(folder, edit_tensor(Q_PROJ, lambda a: a.astype(np.float16).astype(np.float32)))
    assert texts(audit_onnx(folder, DenseCheckpoint.open(tiny_llama))) == []


def test_another_model_of_the_same_shape(llama_onnx: Path, tmp_path: Path) -> None:
    other = DenseCheckpoint.open(make_tiny(tmp_path / "other", seed=1, rope_theta=20000.0))
    names = {finding.name for finding in faults(audit_onnx(llama_onnx / FILES["fp32"], other))}
    assert names == {"rope base", "rope tables", "tensor values"}


def test_missing_and_truncated_data(folder: Path, tiny_llama: Path) -> None:
    checkpoint, data = DenseCheckpoint.open(tiny_llama), folder / (FILES["fp32"] + "_data")
    size = data.stat().st_size
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(UserError, match=rf"truncated \({size - 1:,} bytes, model.onnx needs {size:,}\)"):
        audit_onnx(folder, checkpoint)
    data.unlink()
    with pytest.raises(UserError, match=r"its data file model\.onnx_data is missing"):
        audit_onnx(folder, checkpoint)


def test_random_damage_gives_findings_or_a_user_error(folder: Path, tiny_llama: Path) -> None:
    checkpoint = DenseCheckpoint.open(tiny_llama)
    files = [folder / name for name in (FILES["fp32"], "config.json", "genai_config.json", "tokenizer.json",
                                        "tokenizer_config.json", "chat_template.jinja")]
    whole = {file: file.read_bytes() for file in files}
    seed, outcomes = 99, set()
    print(f"seed {seed}")
    chance = random.Random(seed)
    for turn in range(60):
        file = files[0] if turn % 2 else chance.choice(files[1:])
        mutant = bytearray(whole[file])
        for _ in range(chance.choice((1, 1, 3, 30))):
            mutant[chance.randrange(len(mutant))] = chance.choice((0, 1, 0x22, 0x7f, 0xff, chance.randrange(256)))
        if chance.random() < 0.1:
            del mutant[chance.randrange(len(mutant)):]
        file.write_bytes(mutant)
        try:
            findings = audit_onnx(folder / FILES["fp32"], checkpoint)
            assert all("\n" not in finding.text for finding in findings)
            outcomes.add("findings" if findings else "none")
        except UserError as error:
            assert "\n" not in str(error)
            outcomes.add("error")
        file.write_bytes(whole[file])
    assert outcomes >= {"findings", "error"}
