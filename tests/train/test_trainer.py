"""Training: the schedule, what stops it, what it continues from."""
from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_data
from train_runs import run

from lrc_edge.checkpoint import DenseCheckpoint
from lrc_edge.corpus.held_out import HeldOut
from lrc_edge.errors import UserError
from lrc_edge.train.clone import Clone
from lrc_edge.train.device import choose_device, choose_precision
from lrc_edge.train.loop import checkpoints
from lrc_edge.train.loop.schedule import NEAR_RATE, default_rate
from lrc_edge.train.loop.stage import SUMMARY_FILE, load_trained
from lrc_edge.train.loop.trainer import EVAL_TOKENS, TRAINED_FILE, held_out_loss
from lrc_edge.train.losses import Losses
from lrc_edge.train.start.stage import FIGURES_FILE


@pytest.fixture(scope="module")
def data(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_data(tiny_llama, tmp_path_factory.mktemp("data"))


def test_device_and_precision() -> None:
    assert choose_device("cpu").type == "cpu"
    assert choose_precision("fp32", torch.device("cpu")) == torch.float32
    assert choose_precision("auto", torch.device("cuda")) == torch.bfloat16
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="no usable GPU"):
            choose_device("cuda")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_learns_and_its_losses_add_up(precision: str, tiny_llama: Path, data: Path, tmp_path: Path) -> None:
    rows = run(tiny_llama, data, tmp_path / "train", f"train.precision={precision}", "train.alpha=0.3",
               "train.dense_alpha=0.3", "train.kl_weight=0.7", "train.lm_weight=0.9", "train.dense_share=0.5")
    logged = [row for row in rows if "loss" in row]
    held_out = [row["held_out_loss"] for row in rows if "held_out_loss" in row]
    assert [row["step"] for row in logged] == list(range(1, 21)) and logged[-1]["tokens"] == 5120
    assert logged[-1]["loss"] < logged[0]["loss"] and held_out[-1] < held_out[0]
    for row in logged:
        assert row["loss"] == pytest.approx(0.9 * row["lm"] + 0.7 * row["kl"] + 0.3 * row["clone"], rel=1e-5)
    on_disk = [json.loads(line) for line in (tmp_path / "train" / "metrics.jsonl").read_text().splitlines()]
    assert on_disk == rows


def test_accumulation_is_the_same_as_a_large_batch(tiny_llama: Path, data: Path, tmp_path: Path) -> None:
    whole = run(tiny_llama, data, tmp_path / "whole", "train.precision=fp32", "train.micro_batch=4")
    parts = run(tiny_llama, data, tmp_path / "parts", "train.precision=fp32", "train.micro_batch=1")
    for a, b in zip(whole, parts, strict=True):
        for key in {"lm", "kl", "clone", "held_out_loss"} & a.keys():
            assert a[key] == pytest.approx(b[key], rel=2e-3)


def test_a_step_holds_one_graph_and_sees_one_size_of_batch(tiny_llama: Path, data: Path, tmp_path: Path,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph holds the activations of its batch; torch.compile compiles again for each size of batch."""
    graphs: list[weakref.ref[torch.Tensor]] = []
    sizes: set[tuple[int, ...]] = set()
    forward = Clone.forward

    def watched(self: Clone, input_ids: torch.Tensor, *args: Any, **options: Any) -> Losses:
        assert not any(graph() is not None for graph in graphs)
        sizes.add(tuple(input_ids.shape))
        losses = forward(self, input_ids, *args, **options)
        if losses.total.requires_grad:
            graphs.append(weakref.ref(losses.total))
        return losses

    monkeypatch.setattr(Clone, "forward", watched)
    run(tiny_llama, data, tmp_path / "train", "train.micro_batch=5", "train.batch_tokens=640", "train.tokens=1280")
    n_rows = len(HeldOut.load(data / "held_out.npz").rows(64, EVAL_TOKENS, bos=0))
    assert n_rows % 5, "every evaluation batch is full by itself: nothing was shown"
    assert sizes == {(5, 64)} and len(graphs) == 2 * 2


def test_saved_projections_make_the_same_student(tiny_llama: Path, data: Path, tmp_path: Path) -> None:
    run(tiny_llama, data, tmp_path / "train", "train.precision=fp32")
    clone = load_trained(DenseCheckpoint.open(tiny_llama), tmp_path / "train" / TRAINED_FILE)
    summary = json.loads((tmp_path / "train" / "training.json").read_text())
    assert summary["steps"] == 20 and summary["init"] == "pca" and summary["precision"] == "fp32"
    rows = HeldOut.load(data / "held_out.npz").rows(64, EVAL_TOKENS, clone.teacher.config.bos_token_id)
    expected = summary["student_held_out_loss"]
    assert held_out_loss(clone.student, rows, torch.float32) == pytest.approx(expected, rel=1e-5)


def test_the_rate_follows_the_start_and_a_resumed_run_keeps_it(tiny_llama: Path, data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "train"
    run(tiny_llama, data, folder, "train.precision=fp32")
    figures, begun = tmp_path / "train-start" / FIGURES_FILE, folder / SUMMARY_FILE
    start, summary = (json.loads(file.read_text()) for file in (figures, begun))
    assert 0 < start["kl"] < 10
    rate = default_rate(32, 20, 256, start["kl"])
    assert summary["phases"] == {"dense": {"steps": 20, "warmup": 4, "learning_rate": rate}}
    assert summary["first_held_out_loss"] > summary["student_held_out_loss"]
    figures.write_text(json.dumps({**start, "kl": 0.01}))  # it is not measured again
    rows = run(tiny_llama, data, folder, "train.precision=fp32")
    steps = [row for row in rows if "lr" in row]
    assert steps and steps[0]["lr"] < NEAR_RATE / 32
    figures.write_text("{")
    with pytest.raises(UserError, match=r"start.json: cannot be read .*remove .* to compute it again"):
        run(tiny_llama, data, folder, "train.precision=fp32")


def test_a_loss_that_is_not_finite_stops_and_is_named(tiny_llama: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"the [\w ]+ is (nan|inf) at step \d+ of 20 \(rows \d+, .*lower the"):
        run(tiny_llama, data, tmp_path / "train", "train.dense_learning_rate=1e30", "train.dense_warmup_share=0",
            "train.max_grad_norm=1e30")


def test_compiled_layers_learn_the_same(tiny_llama: Path, data: Path, tmp_path: Path) -> None:
    settings = ["train.precision=fp32", "train.tokens=1024", "train.gradient_checkpointing=true"]
    plain = run(tiny_llama, data, tmp_path / "plain", *settings)
    compiled = run(tiny_llama, data, tmp_path / "compiled", *settings, "train.compile=on")
    assert [row["step"] for row in plain] == [row["step"] for row in compiled]
    for a, b in zip(plain, compiled, strict=True):
        for key in {"lm", "kl", "clone", "held_out_loss"} & a.keys():
            assert b[key] == pytest.approx(a[key], rel=1e-5), key


def test_a_layer_is_compiled_once_for_evaluation_and_once_for_each_phase(tiny_llama: Path, data: Path, tmp_path: Path,
                                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    """And no size is symbolic, which a second size of batch would lead to. The graphs run without a compiler."""
    graphs: list[list[Any]] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(inputs)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function: compiled(function, backend=backend))
    run(tiny_llama, data, tmp_path / "train", "train.tokens=1024", "train.dense_share=0.5", "train.micro_batch=2",
        "train.compile=on")
    layers, head = 3, 2  # the head's losses do not depend on the phase
    assert len(graphs) == layers + head
    assert not any(isinstance(x, torch.SymInt) for inputs in graphs for x in inputs)


def test_a_checkpoint_of_another_version_is_refused_in_one_line(tiny_llama: Path, data: Path, tmp_path: Path) -> None:
    run(tiny_llama, data, tmp_path / "train", "train.tokens=2048")
    facts = checkpoints.latest(tmp_path / "train" / "checkpoints") / checkpoints.FACTS_FILE  # type: ignore[operator]
    assert json.loads(facts.read_text())["phase"] == "dense"
    facts.write_text('{"step": 4, "dense": true, "seconds": 1.0}')
    with pytest.raises(UserError, match=r"another version of lrc-edge wrote this checkpoint; remove .*train to start"):
        run(tiny_llama, data, tmp_path / "train", "train.tokens=2048")
