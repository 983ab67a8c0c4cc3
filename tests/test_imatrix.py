"""The importance matrix: the numbers against a plain computation, and what llama.cpp's quantizer makes of them."""
from __future__ import annotations

from pathlib import Path

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


def test_a_channel_that_never_fires_keeps_a_little_weight(tmp_path: Path) -> None:
    checkpoint = DenseCheckpoint.open(make_tiny(tmp_path / "tiny"))
    model = checkpoint.model()
    with torch.no_grad():
        model.model.norm.weight[7] = 0.0
    checkpoint.model = lambda: model  # type: ignore[method-assign]
    values = collect(checkpoint, ROWS)["model.embed_tokens.weight"]
    assert 0 < values[7] < 1e-4 * values.mean() and values.argmin() == 7


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
    from lrc_edge.errors import UserError
    from lrc_edge.export.to_gguf import export_gguf
    from lrc_edge.targets.llamacpp import LlamaCpp

    checkpoint = DenseCheckpoint.open(make_tiny(tmp_path / "tiny", hidden_size=256, intermediate_size=256, layers=1))
    with pytest.raises(UserError, match="importance matrix"):
        export_gguf(checkpoint, tmp_path / "gguf", ["iq2_xs"])
    assert not list((tmp_path / "gguf").glob("*IQ2*")) and not list((tmp_path / "gguf").glob(".*"))
    [artifact] = export_gguf(checkpoint, tmp_path / "gguf", ["iq2_xs"], importance=collect(checkpoint, ROWS))
    assert artifact.tensor_types["IQ2_XS"] > 1
    runtime = LlamaCpp(tmp_path / artifact.path, n_ctx=64, threads=1)
    assert np.isfinite(runtime.prefill(ROWS[0])).all()
    runtime.close()
