"""Training on the grid of the 4-bit files: the grid is ggml's, gradients pass it, the files hold what was trained."""
from __future__ import annotations

import json
import subprocess
from pathlib import Path

import command_line
import numpy as np
import pytest
import torch
from families import FAMILIES
from gguf import GGMLQuantizationType, quants
from safetensors.torch import load_file
from test_processes import SETTINGS, kill_after, start
from tiny_models import TEXT, make_tiny, tiny_data
from torch.func import functional_call
from train_runs import run

from lrc_edge.checkpoint import DenseCheckpoint
from lrc_edge.corpus.held_out import HeldOut
from lrc_edge.errors import UserError
from lrc_edge.export.fold import with_weights
from lrc_edge.export.gguf.to_gguf import export_gguf
from lrc_edge.export.quantize.encodings import quantize_matrix
from lrc_edge.lineage import Lineage
from lrc_edge.pipeline import preflight
from lrc_edge.pipeline.plan import Plan
from lrc_edge.recipe import load_recipe
from lrc_edge.train.clone import Clone
from lrc_edge.train.grids import on_grid, on_q4_0, on_q8_0
from lrc_edge.train.loop.trainer import METRICS_FILE, TRAINED_FILE, read_metrics
from lrc_edge.train.losses import Objective
from lrc_edge.train.phases import DENSE, QUANTIZED

Q4_0, Q8_0 = GGMLQuantizationType.Q4_0, GGMLQuantizationType.Q8_0
GRID = ("quantize.tokens=5120", "quantize.batch_tokens=256")


@pytest.fixture(scope="module")
def data(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_data(tiny_llama, tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def trained(tiny_llama: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("grid") / "train"
    run(tiny_llama, data, folder, *SETTINGS, *GRID)
    return folder


def some_weights(std: float) -> torch.Tensor:
    weight = torch.randn(64, 1024, generator=torch.Generator().manual_seed(0)) * std
    weight[0, :64] = 0  # blocks of zeros
    weight[1, :32] = std * torch.tensor([1.0, -1.0]).repeat(16)  # the largest twice, with both signs
    weight[2, :32] = std * 1.5  # one value
    weight[3, :32] = torch.arange(-16, 16) * std / 2  # halfway between levels
    return weight


@pytest.mark.parametrize("std", [1e-3, 0.02, 1.0, 3e4])
@pytest.mark.parametrize(("grid", "type"), [(on_q4_0, Q4_0), (on_q8_0, Q8_0)])
def test_the_grid_is_ggmls_bit_for_bit(grid: object, type: GGMLQuantizationType, std: float) -> None:
    weight = some_weights(std)
    blocks = quantize_matrix(weight.numpy(), type)
    assert np.array_equal(grid(weight).numpy(), quants.dequantize(blocks, type))  # type: ignore[operator]


@pytest.mark.parametrize(("grid", "type"), [(on_q4_0, Q4_0), (on_q8_0, Q8_0)])
def test_weights_on_the_grid_quantize_to_themselves(grid: object, type: GGMLQuantizationType) -> None:
    """With an importance matrix, whose scales are searched, nearly so: whoever quantizes the student again loses
    nothing."""
    weight = some_weights(0.02)
    placed = grid(weight).numpy()  # type: ignore[operator]
    first = quantize_matrix(weight.numpy(), type)
    assert np.array_equal(quantize_matrix(placed, type), first)
    importance = np.random.default_rng(0).uniform(0.1, 10, 1024).astype(np.float32)
    searched = quants.dequantize(quantize_matrix(placed, type, importance), type)
    assert (searched == placed).reshape(-1, 32).all(1).mean() > 0.999
    # Unlike weights that were not trained on it.
    plain = quants.dequantize(quantize_matrix(weight.numpy(), type, importance), type)
    if type == Q4_0:
        assert (plain == placed).reshape(-1, 32).all(1).mean() < 0.5


@pytest.mark.parametrize("name", ["llama-tied", "qwen2-untied", "qwen3-tied"])
def test_gradients_go_straight_through_the_rounding(name: str, tmp_path: Path) -> None:
    """The latent weights get the gradients that autograd gives a model of the rounded ones."""
    checkpoint = DenseCheckpoint.open(make_tiny(tmp_path / "t", **FAMILIES[name]))
    clone = Clone(checkpoint.model(), Lineage.of(checkpoint.shape, checkpoint.shape))
    clone.start(DENSE)
    clone.initialize({weight: checkpoint.tensor(weight).float() for weight in clone.trainable()})
    clone.start(QUANTIZED)
    assert clone.phase.kept(clone) == {}
    rounded = checkpoint.model()
    own = dict(rounded.named_parameters())
    with torch.no_grad():
        for weight in checkpoint.weights():
            if weight.role.is_matrix:
                own[weight.name].copy_(on_grid(weight, own[weight.name]))
    ids = torch.randint(0, 500, (2, 33), generator=torch.Generator().manual_seed(0))
    clone(ids, objective=Objective(lm=1.0, kl=0.0, clone=0.0)).total.backward()
    clone.pull_back_()
    logits = rounded(ids).logits
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    for weight_name, latent in clone.trainable().items():
        expected = own[weight_name].grad
        assert expected is not None and latent.grad is not None
        assert (latent.grad - expected).norm() <= 1e-5 * expected.norm(), weight_name
        made = clone.student_weights[weight_name]
        assert made.grad is None or made is latent, "the rounded weights themselves are not trained"
    before = {n: p.detach().clone() for n, p in clone.student_weights.items()}
    with torch.no_grad():
        for latent in clone.trainable().values():
            latent.add_(latent.grad, alpha=-1.0)
    clone.compose_()
    assert any(not torch.equal(before[n], p) for n, p in clone.student_weights.items())


@torch.inference_mode()
def test_training_on_the_grid_wins_back_what_rounding_lost(trained: Path, tiny_llama: Path, data: Path) -> None:
    """KL to the unquantized model on held-out text."""
    source = DenseCheckpoint.open(tiny_llama)
    ids = torch.from_numpy(HeldOut.load(data / "held_out.npz").rows(64, 2048, None))
    expected = source.model()(ids).logits.log_softmax(-1)

    def loss(weights: dict[str, torch.Tensor]) -> float:
        got = functional_call(source.model(), weights, (ids,)).logits.log_softmax(-1)
        return float((expected.exp() * (expected - got)).sum(-1).mean())

    matrices = [weight for weight in source.weights() if len(weight.shape) == 2]
    rounded = loss({w.name: on_grid(w, source.tensor(w.name).float()) for w in matrices})
    assert loss({}) < 1e-6 < loss(load_file(trained / TRAINED_FILE)) < 0.9 * rounded


def test_the_file_holds_the_trained_blocks(trained: Path, tiny_llama: Path, tmp_path: Path) -> None:
    source = DenseCheckpoint.open(tiny_llama)
    student = with_weights(source, trained / TRAINED_FILE, tmp_path / "student-q4_0", {"name": "tiny"})
    for weight in student.weights():
        if len(weight.shape) == 2:  # they lie on the grid, and are not what they were
            tensor = student.tensor(weight.name)
            assert torch.equal(on_grid(weight, tensor), tensor)
            assert not torch.equal(tensor, on_grid(weight, source.tensor(weight.name).float()))
    made = export_gguf(source, tmp_path / "gguf", ["q4_0", "q8_0"], on_grid=student)
    assert [artifact.identical_blocks for artifact in made] == [1.0, None]
    # The negative: a file of other weights is found out.
    other = export_gguf(source, tmp_path / "other", ["q4_0"], on_grid=source)
    assert other[0].identical_blocks is not None and other[0].identical_blocks < 0.5


def test_a_killed_run_ends_with_the_same_bits(trained: Path, tiny_llama: Path, data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "train"
    kill_after(start(1, tiny_llama, data, folder, *GRID), folder, 9)
    assert any((folder / "checkpoints").glob("step-*"))
    assert start(1, tiny_llama, data, folder, *GRID).wait() == 0
    assert (folder / TRAINED_FILE).read_bytes() == (trained / TRAINED_FILE).read_bytes()


def test_two_processes_train_on_the_grid_as_one(trained: Path, tiny_llama: Path, data: Path, tmp_path: Path) -> None:
    """Sums in another order move a weight over a level's edge now and then, and that is all."""
    folder = tmp_path / "train"
    assert start(2, tiny_llama, data, folder, *GRID).wait() == 0
    rows = [[row for row in read_metrics(run / METRICS_FILE) if "kl" in row] for run in (trained, folder)]
    for alone, together in zip(*rows, strict=True):
        assert together["kl"] == pytest.approx(alone["kl"], rel=0.02), alone["step"]
    ours, theirs = load_file(trained / TRAINED_FILE), load_file(folder / TRAINED_FILE)
    for name, tensor in ours.items():
        assert (tensor - theirs[name]).norm() < 0.05 * tensor.norm(), name


def export(student: Path, out: Path, *args: object) -> subprocess.CompletedProcess[str]:
    return command_line.run("export", student, "--out", out, *args)


def test_export_trains_on_the_grid_and_proves_both_files(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT[:200_000])
    out = tmp_path / "out"
    wanted = ["--data", tmp_path / "text.txt", "--formats", "gguf:q8_0,gguf:q4_0,onnx:q4", "--set", GRID[0],
              "--set", "train.seq_len=64", "--set", "parity.positions=256", "--set", "parity.row_len=64",
              "--set", "parity.generate_tokens=4", "--set", "data.held_out_share=0.1"]
    done = export(tiny_llama, out, *wanted)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((out / "report.json").read_text())
    shares = {a["encoding"]: a["identical_blocks"] for a in report["artifacts"]}
    assert shares == {"q8_0": None, "q4_0": 1.0, "q4": 1.0}
    assert [g["artifact"] for g in report["gates"] if g["name"] == "as trained"] == [
        a["path"] for a in report["artifacts"][1:] for _ in range(2)]
    again = export(tiny_llama, out, *wanted)
    assert again.returncode == 0 and "quantize  unchanged, nothing to do" in again.stdout
    assert command_line.run("check", out).returncode == 0
    without = export(tiny_llama, out, *wanted, "--set", "quantize.tokens=0")
    assert without.returncode == 0 and not (out / "student-q4_0").exists()


@pytest.mark.parametrize(("settings", "message"), [
    (["export.formats=gguf:q8_0"], "neither is among the formats"),
    (["quantize.teacher=teacher"], "an export has none"),
    ([], "no text to train on")])
def test_what_cannot_be_trained_is_said_before_anything_is_made(settings: list[str], message: str, tiny_llama: Path,
                                                               tmp_path: Path) -> None:
    recipe = load_recipe(None, [*GRID, 'export.formats=["gguf:q4_0"]', *settings])
    with pytest.raises(UserError, match=message):
        preflight.check(Plan.of_export(str(tiny_llama), recipe), tmp_path / "out")


def test_rows_off_the_grid_are_refused(tmp_path: Path) -> None:
    recipe = load_recipe(None, [*GRID], data={"sources": ["text.txt"]}, export={"formats": "gguf:q4_0"})
    odd = make_tiny(tmp_path / "t", intermediate_size=112)
    with pytest.raises(UserError, match="a row of 112 does not divide into the Q4_0 grid's blocks of 32"):
        preflight.check(Plan.of_export(str(odd), recipe), tmp_path / "out")
