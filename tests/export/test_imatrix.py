"""The importance matrix: the numbers against a plain computation, and what llama.cpp's quantizer makes of them."""
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from recorder import Recorder
from tiny_models import make_tiny

from lrc_edge.checkpoint import DenseCheckpoint
from lrc_edge.export.quantize.imatrix import collect

ROWS = np.random.default_rng(0).integers(5, 500, (3, 64))


FAMILIES = [("llama", True), ("llama", False), ("mistral", False), ("qwen2", True), ("qwen3", False)]


def mean_squares(checkpoint: DenseCheckpoint, rows: np.ndarray) -> dict[str, np.ndarray]:
    """Of the inputs of every linear, by a forward pass of the complete float32 model with all of them in float64."""
    model, found = checkpoint.model(), {}

    def keeper(name: str) -> Callable[..., None]:
        def keep(_: Any, inputs: tuple[torch.Tensor], __: Any) -> None:
            found[f"{name}.weight"] = inputs[0].double().square().mean((0, 1)).numpy()
        return keep

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(keeper(name))
    with torch.inference_mode():
        model(torch.from_numpy(rows))
    if checkpoint.shape.tied:
        found["model.embed_tokens.weight"] = found.pop("lm_head.weight")
    return found


@pytest.mark.parametrize("family, tied", FAMILIES)
def test_it_is_the_mean_square_of_each_linears_inputs(family: str, tied: bool, tmp_path: Path) -> None:
    checkpoint = DenseCheckpoint.open(make_tiny(tmp_path / "tiny", family, tied=tied))
    got, expected = collect(checkpoint, ROWS, dtype=torch.float32), mean_squares(checkpoint, ROWS)
    matrices = [weight.name for weight in checkpoint.weights() if len(weight.shape) == 2]
    assert list(got) == [name for name in matrices if tied or "embed_tokens" not in name]
    assert got.keys() == expected.keys()
    for name, values in got.items():
        np.testing.assert_allclose(values, expected[name], rtol=1e-4, err_msg=name)
        assert values.dtype == np.float32


@pytest.mark.parametrize("family, tied", FAMILIES)
def test_bfloat16_moves_it_by_little(family: str, tied: bool, tmp_path: Path) -> None:
    """On processors without it as well: they compute the same, only slower."""
    checkpoint = DenseCheckpoint.open(make_tiny(tmp_path / "tiny", family, tied=tied))
    got, expected = collect(checkpoint, ROWS, dtype=torch.bfloat16), mean_squares(checkpoint, ROWS)
    assert got.keys() == expected.keys()
    for name, values in got.items():
        assert values.dtype == np.float32
        np.testing.assert_allclose(values, expected[name], rtol=0.05, err_msg=name)  # a single channel
        assert values.sum() == pytest.approx(expected[name].sum(), rel=0.01)


def test_the_model_computes_in_what_the_processor_multiplies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = DenseCheckpoint.open(make_tiny(tmp_path / "tiny"))
    for native, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr("lrc_edge.export.quantize.imatrix.multiplies_bfloat16", lambda native=native: native)
        first, again, same = (collect(checkpoint, ROWS, dtype=given) for given in (None, None, dtype))
        for name, values in first.items():
            assert (values == again[name]).all() and (values == same[name]).all()


@pytest.mark.parametrize("batch_tokens, batches", [(1, (1, 2, 3)), (128, (2, 3)), (1024, (3,))])
def test_it_counts_every_token_of_every_row_once(batch_tokens: int, batches: tuple[int, ...], tmp_path: Path,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lrc_edge.export.quantize.imatrix.BATCH_TOKENS", batch_tokens)
    monkeypatch.setattr("lrc_edge.export.quantize.imatrix.PIECE", 1000)  # no divisor of anything
    checkpoint, said = DenseCheckpoint.open(make_tiny(tmp_path / "tiny")), Recorder()
    rows = [collect(checkpoint, ROWS[i:i + 1].astype(np.uint16), dtype=torch.float32) for i in range(3)]
    together = collect(checkpoint, ROWS, said, torch.float32)
    assert [detail for detail, _ in said.updates] == ["", *(f"row {n} of 3" for n in batches)]
    assert said.completed[-1] == said.total == ROWS.size and said.unit == "tokens"
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

    from lrc_edge.export.gguf.to_gguf import export_gguf
    from lrc_edge.gguf_names import gguf_name

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
    from lrc_edge.export.gguf.to_gguf import export_gguf

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

    from lrc_edge.export.gguf.to_gguf import export_gguf
    from lrc_edge.gguf_names import gguf_name

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
    from lrc_edge.export.gguf.to_gguf import export_gguf
    from lrc_edge.targets.runtimes.llamacpp import LlamaCpp

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
