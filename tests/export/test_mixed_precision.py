"""Mixed precision: the knapsack against every choice there is, sensitivities against runs of the model, the file."""
from __future__ import annotations

import itertools
import json
import subprocess
from pathlib import Path
from typing import Any

import command_line
import numpy as np
import pytest
import torch
from recorder import Recorder
from tiny_models import TEXT, make_tiny

pytest.importorskip("llama_cpp")
from gguf import GGMLQuantizationType as QType
from gguf import GGUFReader, quants

from lrc_edge.checkpoint import DenseCheckpoint
from lrc_edge.errors import UserError
from lrc_edge.export.gguf.to_gguf import export_gguf, rope_factor_bytes
from lrc_edge.export.quantize.encodings import quantize_matrix
from lrc_edge.export.quantize.imatrix import collect
from lrc_edge.export.quantize.mixed_precision import allocate, candidates, check_size, choose, tensor_bytes
from lrc_edge.export.quantize.sensitivity import PROBE, measure
from lrc_edge.families import weights_of
from lrc_edge.gguf_names import gguf_name

ROWS = np.random.default_rng(0).integers(5, 500, (2, 48))


def best_by_trying(sizes: list[list[int]], losses: list[list[float]], budget: int) -> float:
    return min(sum(row[i] for row, i in zip(losses, pick, strict=True))
               for pick in itertools.product(*(range(len(row)) for row in sizes))
               if sum(row[i] for row, i in zip(sizes, pick, strict=True)) <= budget)


@pytest.mark.parametrize("seed", range(20))
def test_the_knapsack_is_solved(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sizes = [sorted(int(n) for n in rng.integers(1, 60, rng.integers(1, 5))) for _ in range(6)]
    losses = [[float(x) for x in rng.random(len(row))] for row in sizes]  # more bytes may also lose more
    low, high = (sum(row[end] for row in sizes) for end in (0, -1))
    for budget in {low, low + 1, (low + high) // 2, high, high + 9}:
        chosen = choose(sizes, losses, budget)
        assert sum(row[i] for row, i in zip(sizes, chosen, strict=True)) <= budget
        loss = sum(row[i] for row, i in zip(losses, chosen, strict=True))
        assert loss == pytest.approx(best_by_trying(sizes, losses, budget), abs=1e-12)
    with pytest.raises(ValueError, match="exceed the budget"):
        choose(sizes, losses, low - 1)


def test_sizes_without_a_divisor_stay_within_the_budget() -> None:
    rng = np.random.default_rng(0)
    sizes = [[int(n) for n in np.cumsum(rng.integers(10**5, 10**6, 5))] for _ in range(60)]
    losses = [sorted((float(x) for x in rng.random(5)), reverse=True) for _ in sizes]
    budget = sum(row[2] for row in sizes)
    chosen = choose(sizes, losses, budget)
    total = sum(row[i] for row, i in zip(sizes, chosen, strict=True))
    assert 0.998 * budget < total <= budget
    assert sum(row[i] for row, i in zip(losses, chosen, strict=True)) < sum(row[2] for row in losses)


def kl_by_hand(checkpoint: DenseCheckpoint, name: str, kind: QType, importance: np.ndarray | None) -> float:
    """The whole model, run anew with one matrix changed."""
    model, ids = checkpoint.model(), torch.from_numpy(ROWS)
    with torch.inference_mode():
        log_p = model(ids).logits.double().log_softmax(-1)
        parameter = model.get_parameter(name)
        parameter.data.copy_(torch.from_numpy(quants.dequantize(
            quantize_matrix(parameter.data.numpy(), kind, importance), kind)))
        log_q = model(ids).logits.double().log_softmax(-1)
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


@pytest.mark.parametrize("family, tied", [("llama", True), ("qwen3", False), ("qwen2", True), ("mistral", False)])
def test_sensitivity_is_the_divergence_of_the_changed_model(family: str, tied: bool, tmp_path: Path) -> None:
    checkpoint = DenseCheckpoint.open(make_tiny(tmp_path / "tiny", family, tied=tied, hidden_size=256,
                                                intermediate_size=512, head_dim=64, layers=2))
    importance, said = collect(checkpoint, ROWS), Recorder()
    costs = measure(checkpoint, ROWS, importance, said)
    names = [weight.name for weight in checkpoint.weights() if len(weight.shape) > 1]
    assert [name for name, _ in said.updates] == names and list(costs) == names
    assert (np.diff([*said.completed, said.total]) > 0).all() and said.unit == "layers"
    for name in names:
        assert list(costs[name]) == [kind.name for kind in candidates(256)]
        # The probe's own divergence is the exact one; the quadratic law gave these others to 18 %.
        for kind in (QType.IQ4_XS, QType.Q5_K):
            expected = kl_by_hand(checkpoint, name, kind, importance.get(name))
            assert costs[name][kind.name] == pytest.approx(expected, rel=0.3), (name, kind.name)
    head = costs["model.embed_tokens.weight" if tied else "lm_head.weight"]
    assert head["Q2_K"] > head["IQ4_XS"] > head["Q6_K"] > head["Q8_0"] > 0


def test_the_probe_is_measured_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lrc_edge.export.quantize import sensitivity

    checkpoint = DenseCheckpoint.open(make_tiny(tmp_path / "tiny", layers=3, intermediate_size=128))
    importance = collect(checkpoint, ROWS, dtype=torch.float32)
    monkeypatch.setattr(sensitivity, "candidates", lambda row: (PROBE,))
    costs = measure(checkpoint, ROWS, importance)
    for name, table in costs.items():
        assert table["Q4_0"] == pytest.approx(kl_by_hand(checkpoint, name, PROBE, importance[name]), rel=1e-3), name


def silent_first_layer(path: Path) -> DenseCheckpoint:
    from safetensors.torch import load_file, save_file

    tensors = load_file(make_tiny(path, hidden_size=256, intermediate_size=512, head_dim=64) / "model.safetensors")
    tensors["model.layers.0.post_attention_layernorm.weight"].zero_()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return DenseCheckpoint.open(path)


def test_what_never_fires_gets_the_fewest_bits(tmp_path: Path) -> None:
    checkpoint = silent_first_layer(tmp_path / "tiny")
    costs = measure(checkpoint, ROWS, collect(checkpoint, ROWS))
    types = allocate(checkpoint.weights(), costs, 5.5).types
    for part in ("gate", "up", "down"):
        assert types[f"model.layers.0.mlp.{part}_proj.weight"] == QType.Q2_K
        assert types[f"model.layers.1.mlp.{part}_proj.weight"] > QType.Q2_K


@pytest.mark.parametrize("settings, bits", [
    (dict(hidden_size=256, intermediate_size=512, head_dim=64), 4.25),
    (dict(hidden_size=256, intermediate_size=512, head_dim=64, tied=False, layers=3), 3.7),
    (dict(hidden_size=256, intermediate_size=160, head_dim=32, family="qwen2"), 5.5),  # rows of 256, 160 and 128
    (dict(hidden_size=64, intermediate_size=172, rope_scaling={"rope_type": "llama3", "factor": 8.0,
          "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}), 8.0)])
def test_the_file_is_what_was_allocated(settings: dict[str, Any], bits: float, tmp_path: Path) -> None:
    from lrc_edge.targets.runtimes.llamacpp import LlamaCpp

    checkpoint = DenseCheckpoint.open(make_tiny(tmp_path / "tiny", **settings))
    importance = collect(checkpoint, ROWS)
    allocation = allocate(checkpoint.weights(), measure(checkpoint, ROWS, importance), bits,
                          rope_factor_bytes(checkpoint))
    [artifact] = export_gguf(checkpoint, tmp_path / "gguf", [], importance=importance, allocation=allocation)
    assert artifact.path.startswith("gguf/tiny-") and artifact.path.endswith(f"-{bits:g}bpw.gguf")
    assert artifact.encoding == f"{bits:g}bpw" and not artifact.fallbacks
    assert 0.97 * bits < artifact.bits_per_weight <= bits
    stored = {t.name: t.tensor_type for t in GGUFReader(tmp_path / artifact.path).tensors}
    for weight in checkpoint.weights():
        wanted = allocation.types[weight.name] if len(weight.shape) > 1 else QType.F32
        assert stored[gguf_name(weight)] == wanted, weight.name
    assert len(set(allocation.types.values())) > 1
    assert artifact.path.split("/")[1] in (tmp_path / "gguf" / "Modelfile").read_text()
    with LlamaCpp(tmp_path / artifact.path, n_ctx=64, threads=1) as runtime:
        assert len(runtime.generate([0, 5, 6], 4, set())) == 4


def test_it_beats_the_same_size_in_one_type(tmp_path: Path) -> None:
    """By its own measure, where one layer matters a hundred times more than the others."""
    from safetensors.torch import load_file, save_file

    make_tiny(tmp_path / "tiny", hidden_size=256, intermediate_size=512, head_dim=64, layers=3, tied=False)
    tensors = load_file(tmp_path / "tiny" / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"] *= 20
    save_file(tensors, tmp_path / "tiny" / "model.safetensors", metadata={"format": "pt"})
    checkpoint = DenseCheckpoint.open(tmp_path / "tiny")
    costs = measure(checkpoint, ROWS, collect(checkpoint, ROWS))
    weights = list(checkpoint.weights())
    n_bytes = sum(tensor_bytes(w, QType.IQ4_XS) if len(w.shape) > 1 else 4 * w.numel for w in weights)
    bits = 8 * n_bytes / checkpoint.shape.n_params
    allocation = allocate(weights, costs, bits)
    assert allocation.predicted_kl < 0.8 * sum(table["IQ4_XS"] for table in costs.values())
    assert allocation.types["model.layers.1.mlp.down_proj.weight"] > QType.Q4_K


def test_impossible_sizes_are_refused_with_the_range(tmp_path: Path) -> None:
    shape = DenseCheckpoint.open(make_tiny(tmp_path / "tiny", hidden_size=256, intermediate_size=512)).shape
    for bits, hint in ((2.0, "take more"), (9.0, "take fewer")):
        with pytest.raises(UserError, match=rf"bits_per_weight = {bits:g}: .* can have \d\.\d+ to 8\.\d+; {hint}"):
            check_size(weights_of(shape), bits)
    check_size(weights_of(shape), 4.25)
    narrow = DenseCheckpoint.open(make_tiny(tmp_path / "narrow", hidden_size=64, intermediate_size=96)).shape
    with pytest.raises(UserError, match=r"can have 4\.\d+ to 8\.\d+; take more"):
        check_size(weights_of(narrow), 4.25)


def test_the_command_line_makes_it_and_measures_once(tmp_path: Path) -> None:
    make_tiny(tmp_path / "model", hidden_size=256, intermediate_size=512, head_dim=64, layers=1)
    (tmp_path / "text.txt").write_text(TEXT[:60_000])

    def run(bits: float, *settings: str) -> subprocess.CompletedProcess[str]:
        common = ["--set", "parity.positions=128", "--set", "parity.row_len=64", "--set", "parity.generate_tokens=4",
                  "--set", "export.calibration_tokens=512"]
        return command_line.run(
            "export", tmp_path / "model", "--out", tmp_path / "out", "--data", tmp_path / "text.txt", "--formats",
            "gguf:q8_0", "--bits-per-weight", bits, *common,
            *(part for setting in settings for part in ("--set", setting)))

    refused = run(2.0)
    assert refused.returncode == 2 and "can have " in refused.stderr and refused.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()
    refused = run(4.25, "export.calibration_tokens=0")
    assert refused.returncode == 2 and "export.calibration_tokens above 0" in refused.stderr
    made = run(4.25)
    assert made.returncode == 0, made.stdout + made.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [a["encoding"] for a in report["artifacts"]] == ["q8_0", "4.25bpw"]
    mixed, allocation = report["artifacts"][1], report["allocation"]
    assert any(gate["artifact"] == mixed["path"] and gate["metric"] == "kl_mean" for gate in report["gates"])
    stored = {t.name: t.tensor_type.name for t in GGUFReader(tmp_path / "out" / mixed["path"]).tensors
              if len(t.shape) > 1}
    assert allocation["types"] == stored
    assert allocation["measured_bits_per_weight"] == mixed["bits_per_weight"] <= 4.25
    assert 0 < allocation["predicted_kl"] < 10 and allocation["measured_kl"] > 0
    calibration = report["calibration"]
    assert (calibration["rows"], calibration["tokens"], len(calibration["sha256"])) == (8, 512, 64)
    [imatrix] = (tmp_path / "out" / "imatrix").iterdir()
    datasets = GGUFReader(imatrix).fields["imatrix.datasets"].contents()
    assert datasets == [f"sha256:{calibration['sha256']}"]
    page = (tmp_path / "out" / "report.html").read_text()
    assert calibration["sha256"] in page and " predicted, " in page
    again = run(4.5)
    assert again.returncode == 0 and "sensitivity  unchanged" in again.stdout and "imatrix  unchanged" in again.stdout
    names = {file.name for file in (tmp_path / "out" / "gguf").iterdir()}
    assert any(name.endswith("-4.5bpw.gguf") for name in names) and not any("4.25bpw" in name for name in names)
