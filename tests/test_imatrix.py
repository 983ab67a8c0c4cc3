"""The importance matrix: the numbers against a plain computation, and what llama.cpp's quantizer makes of them."""
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import make_tiny

from lrc_edge.checkpoint import DenseCheckpoint
from lrc_edge.export.imatrix import collect

ROWS = np.random.default_rng(0).integers(5, 500, (3, 64))


@pytest.mark.parametrize("tied", [True, False])
def test_it_is_the_mean_square_of_each_linears_inputs(tied: bool, tmp_path: Path) -> None:
    checkpoint = DenseCheckpoint.open(make_tiny(tmp_path / "tiny", tied=tied))
    got = collect(checkpoint, ROWS)
    matrices = {weight.name: weight.shape[1] for weight in checkpoint.weights() if len(weight.shape) == 2}
    if not tied:
        del matrices["model.embed_tokens.weight"]
    assert {name: len(values) for name, values in got.items()} == matrices
    with torch.inference_mode():
        out = checkpoint.model()(torch.from_numpy(ROWS), output_hidden_states=True)
    first_norm = checkpoint.model().model.layers[0].input_layernorm
    first_input = first_norm(out.hidden_states[0]).square().mean((0, 1))
    last = out.hidden_states[-1].square().mean((0, 1))  # after the final norm
    head = "model.embed_tokens.weight" if tied else "lm_head.weight"
    for name, expected in (("model.layers.0.self_attn.q_proj.weight", first_input), (head, last)):
        np.testing.assert_allclose(got[name], expected.detach().numpy(), rtol=1e-4)
        assert got[name].dtype == np.float32


def test_it_counts_every_token_of_every_row_once(tmp_path: Path) -> None:
    checkpoint = DenseCheckpoint.open(make_tiny(tmp_path / "tiny"))
    rows, said = [collect(checkpoint, ROWS[i:i + 1].astype(np.uint16)) for i in range(3)], []
    together = collect(checkpoint, ROWS, said.append)
    assert said == ["row 1 of 3", "row 2 of 3", "row 3 of 3"]
    for name, values in together.items():
        np.testing.assert_allclose(values, np.mean([row[name] for row in rows], 0), rtol=1e-5, err_msg=name)
    with pytest.raises(ValueError, match="hold no token"):
        collect(checkpoint, ROWS[:0])


def silenced(path: Path, edit: Callable[[dict[str, torch.Tensor]], None], **settings: Any) -> DenseCheckpoint:
    """A tiny checkpoint with edited weights."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(make_tiny(path, **settings) / "model.safetensors")
    edit(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return DenseCheckpoint.open(path)


def test_a_channel_that_never_fires_keeps_a_little_weight(tmp_path: Path) -> None:
    checkpoint = silenced(tmp_path / "tiny", lambda tensors: tensors["model.norm.weight"][7].zero_())
    values = collect(checkpoint, ROWS)["model.embed_tokens.weight"]
    assert 0 < values[7] < 1e-4 * values.mean() and values.argmin() == 7


def test_a_linear_that_never_fires_counts_every_channel_alike(tmp_path: Path) -> None:
    checkpoint = silenced(tmp_path / "tiny",
                          lambda tensors: tensors["model.layers.0.input_layernorm.weight"].zero_())
    values = collect(checkpoint, ROWS)
    assert (values["model.layers.0.self_attn.q_proj.weight"] == 1).all()
    assert (values["model.layers.0.self_attn.o_proj.weight"] == 1).all()


@pytest.mark.parametrize("encoding", ["q4_0", "q4_k_m", "iq3_xxs", "iq2_xs"])
def test_weights_on_silent_channels_survive_quantization(encoding: str, tmp_path: Path) -> None:
    """llama.cpp would write zeros for a block whose importance is zero, without a word."""
    pytest.importorskip("llama_cpp")
    from gguf import GGUFReader, quants

    from lrc_edge.export.to_gguf import export_gguf, gguf_name

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.post_attention_layernorm.weight"][64:160] = 0  # three whole blocks of the FFN's input
        tensors["model.layers.1.post_attention_layernorm.weight"].zero_()  # all of it, and of ffn_down's

    checkpoint = silenced(tmp_path / "tiny", edit, family="qwen3", tokenizer="qwen2", hidden_size=256,
                          intermediate_size=256)
    [artifact] = export_gguf(checkpoint, tmp_path / "gguf", [encoding], importance=collect(checkpoint, ROWS))
    stored = {t.name: t for t in GGUFReader(tmp_path / artifact.path).tensors}
    limit = {"q4_0": 0.15, "q4_k_m": 0.15, "iq3_xxs": 0.3, "iq2_xs": 0.45}[encoding]
    for weight in checkpoint.weights():
        if ".mlp." not in weight.name:
            continue
        tensor = stored[gguf_name(weight)]
        original = checkpoint.tensor(weight.name).numpy()
        error = quants.dequantize(tensor.data, tensor.tensor_type) - original
        if weight.layer == 0 and "down" not in weight.name:
            error, original = error[:, 64:160], original[:, 64:160]
        assert np.sqrt((error**2).mean()) < limit * original.std(), (weight.name, tensor.tensor_type.name)


def test_an_importance_of_another_model_is_an_error(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    from lrc_edge.export.to_gguf import export_gguf

    checkpoint = DenseCheckpoint.open(make_tiny(tmp_path / "tiny"))
    importance = collect(checkpoint, ROWS)
    name = "model.layers.0.mlp.up_proj.weight"
    for wrong in ({**importance, name: importance[name][:-1]}, {**importance, "x.weight": importance[name]},
                  {n: values for n, values in importance.items() if n != name}):
        with pytest.raises(ValueError, match=r"imatrix: (model\.layers\.0\.mlp\.up_proj|x)\.weight is "):
            export_gguf(checkpoint, tmp_path / "gguf", ["q4_0"], importance=wrong)
    assert not (tmp_path / "gguf").exists()


def test_llama_cpp_spends_its_error_where_it_matters_less(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    from gguf import GGUFReader, quants

    from lrc_edge.export.to_gguf import export_gguf, gguf_name

    checkpoint = DenseCheckpoint.open(make_tiny(tmp_path / "tiny", family="qwen3", tokenizer="qwen2"))
    rng = np.random.default_rng(0)
    importance = {name: (values * rng.lognormal(0, 3, len(values))).astype(np.float32)
                  for name, values in collect(checkpoint, ROWS).items()}
    errors = []
    for folder, given in (("without", None), ("with", importance)):
        [artifact] = export_gguf(checkpoint, tmp_path / folder, ["q4_0"], importance=given)
        stored = {t.name: t for t in GGUFReader(tmp_path / artifact.path).tensors}
        total = 0.0
        for weight in checkpoint.weights():
            tensor = stored[gguf_name(weight)]
            if tensor.tensor_type.name == "Q4_0":
                error = quants.dequantize(tensor.data, tensor.tensor_type) - checkpoint.tensor(weight.name).numpy()
                total += float((importance[weight.name] * error**2).sum())
        errors.append(total)
    assert errors[1] < 0.8 * errors[0]


def test_types_that_need_it_work_with_it_and_are_refused_without(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    from gguf import GGUFReader

    from lrc_edge.errors import UserError
    from lrc_edge.export.to_gguf import export_gguf
    from lrc_edge.targets.llamacpp import LlamaCpp

    checkpoint = DenseCheckpoint.open(make_tiny(tmp_path / "tiny", hidden_size=256, intermediate_size=256, layers=1))
    with pytest.raises(UserError, match="importance matrix"):
        export_gguf(checkpoint, tmp_path / "gguf", ["f32", "iq2_xs"])
    assert not (tmp_path / "gguf").exists()  # refused before the work starts
    importance = collect(checkpoint, ROWS)
    [artifact] = export_gguf(checkpoint, tmp_path / "gguf", ["iq2_xs"], importance=importance, n_chunks=len(ROWS))
    assert artifact.tensor_types["IQ2_XS"] > 1
    notes = {name: field.contents() for name, field in GGUFReader(tmp_path / artifact.path).fields.items()
             if name.startswith("quantize.")}
    assert notes == {"quantize.imatrix.entries_count": len(importance), "quantize.imatrix.chunks_count": len(ROWS)}
    runtime = LlamaCpp(tmp_path / artifact.path, n_ctx=64, threads=1)
    assert np.isfinite(runtime.prefill(ROWS[0])).all()
    runtime.close()
