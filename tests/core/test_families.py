"""The records of the families: total, asked through one door, and the only place that knows Hugging Face's names."""
from __future__ import annotations

import ast
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from paths import ROOT
from transformers import AutoConfig, AutoModelForCausalLM

from lrc_edge.errors import UserError
from lrc_edge.families import FAMILIES, family_of, norm_before, parts_of, weights_of
from lrc_edge.shape import ModelShape

# These files write Hugging Face's names into ONNX graphs, where they are names of nodes.
NAME_NODES = {ROOT / "lrc_edge/onnx_graph/decoder.py"}
HUGGING_FACE_NAME = re.compile(r"self_attn|\w_proj\b|embed_tokens|lm_head|rotary_emb|layernorm|model\.norm")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_and_module_is_transformers_own(family: str) -> None:
    config = AutoConfig.for_model(family, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, head_dim=16,
                                  num_key_value_heads=1, intermediate_size=48, vocab_size=64, tie_word_embeddings=False)
    model = AutoModelForCausalLM.from_config(config)
    shape = ModelShape.from_config(config.to_dict(), "config")
    found = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert {weight.name: weight.shape for weight in weights_of(shape)} == found
    for weight in weights_of(shape):
        assert model.get_submodule(weight.module) is not None
        norm = norm_before(weight, shape)
        assert (norm is None) == (not weight.role.is_matrix or weight.role.writes_stream or (weight.layer is None
                                  and "head" not in weight.name)), weight.name
        assert norm is None or norm in found
    assert len(parts_of(model).layers) == 2 and parts_of(model).head is model.lm_head


def test_an_unknown_family_is_refused_by_name() -> None:
    for unknown in ("gemma3", None, ["llama"]):
        with pytest.raises(UserError, match=r"x: model_type .* is not supported; supported: llama, mistral, qwen2, qw"):
            family_of(unknown, "x")
    assert all(family_of(name).model_type == name for name in FAMILIES)


@pytest.mark.parametrize(("family", "config", "expected"), [
    ("llama", {"sliding_window": 7, "use_sliding_window": True}, None), ("mistral", {}, 4096),
    ("mistral", {"sliding_window": None}, None), ("mistral", {"sliding_window": 7}, 7),
    ("qwen2", {"sliding_window": 7}, None), ("qwen2", {"sliding_window": 7, "use_sliding_window": True}, 7)])
def test_the_sliding_window(family: str, config: dict[str, object], expected: int | None) -> None:
    assert family_of(family).window_of(config) == expected


def test_the_sliding_window_of_a_layer() -> None:
    some = SimpleNamespace(sliding_window=7, layer_types=["full_attention", "sliding_attention"])
    assert [family_of("qwen3").window_of_layer(some, layer) for layer in (0, 1)] == [None, 7]
    assert family_of("llama").window_of_layer(some, 1) is None
    assert family_of("mistral").window_of_layer(SimpleNamespace(sliding_window=7), 0) == 7


def names_in(file: Path) -> set[str]:
    """Strings, docstrings apart, and attributes that are Hugging Face's names of tensors and modules."""
    tree = ast.parse(file.read_text())
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    docstrings = {ast.get_docstring(node, clean=False) for node in ast.walk(tree) if isinstance(node, documented)}
    found = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    found |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    return {name for name in found - docstrings if HUGGING_FACE_NAME.search(name)}


def branches_on_a_family(file: Path) -> list[int]:
    """Lines that compare anything with the name of a family."""
    return [node.lineno for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Compare)
            for part in ast.walk(node) if isinstance(part, ast.Constant) and part.value in {*FAMILIES} - {"llama"}]


def test_no_other_file_knows_these_names() -> None:
    records = ROOT / "lrc_edge/families.py"
    files = [file for folder in ("lrc_edge", "train", "export", "targets") for file in (ROOT / folder).rglob("*.py")
             if file != records and not any(part.is_symlink() for part in file.parents)]
    assert names_in(records) and len(files) > 100
    assert {file.name: names for file in files if file not in NAME_NODES and (names := names_in(file))} == {}
    assert {file.name: lines for file in files if (lines := branches_on_a_family(file))} == {}
