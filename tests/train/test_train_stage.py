"""The training stage of a build: what ends it early, what the same command then makes of it, what is refused."""
from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tiny_models import TEXT

from lrc_edge.errors import UserError
from lrc_edge.exit_status import ExitStatus
from lrc_edge.pipeline.commands import build
from lrc_edge.recipe import load_recipe
from lrc_edge.train.loop import stage
from lrc_edge.train.loop.checkpoints import claim, latest
from lrc_edge.train.loop.trainer import METRICS_FILE, TRAINED_FILE, read_metrics
from lrc_edge.train.start import stage as start_stage
from lrc_edge.workspace import Workspace

STEPS = 100
SETTINGS = ["train.seq_len=64", "train.batch_tokens=128", f"train.tokens={128 * STEPS}", "train.log_every=1",
            "train.eval_every=40", "train.checkpoint_every=30", "train.device=cpu", "train.precision=fp32",
            "data.held_out_share=0.2", "student.hidden_size=32", "parity.positions=256"]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(TEXT[:100_000])
    return file


def train(teacher: Path, text: Path, out: Path, *settings: str) -> None:
    recipe = load_recipe(None, [*SETTINGS, *settings], data={"sources": [str(text)]})
    assert build(str(teacher), out, recipe, Console(quiet=True), only_train=True) == ExitStatus.PASSED


@pytest.fixture(scope="module")
def whole(tiny_llama: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole") / "out"
    train(tiny_llama, text, out)
    return out


def same_as(whole: Path, out: Path) -> None:
    assert (out / "train" / TRAINED_FILE).read_bytes() == (whole / "train" / TRAINED_FILE).read_bytes()
    curves = [[{k: v for k, v in row.items() if k != "tokens_per_second"} for row in read_metrics(file)]
              for file in (out / "train" / METRICS_FILE, whole / "train" / METRICS_FILE)]
    assert curves[0] == curves[1]
    assert not (out / "train" / "checkpoints").exists()


def interrupt(*args: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(("where", "what"), [(stage, "save_trained"), (Workspace, "record")])
def test_a_kill_between_the_last_step_and_the_record(where: object, what: str, whole: Path, tiny_llama: Path,
                                                     text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
                                                     ) -> None:
    def interrupt_training(self: Workspace, stage: str, *args: object) -> None:
        if stage == "train":
            raise KeyboardInterrupt
        record(self, stage, *args)  # type: ignore[arg-type]

    record = Workspace.record
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(where, what, interrupt_training if what == "record" else interrupt)
        train(tiny_llama, text, tmp_path / "out")
    assert read_metrics(tmp_path / "out" / "train" / METRICS_FILE)[-1]["step"] == STEPS
    assert (tmp_path / "out" / "train" / TRAINED_FILE).exists() == (what == "record")
    train(tiny_llama, text, tmp_path / "out")
    same_as(whole, tmp_path / "out")


# From itself: a busy machine might not let us look before all is over. What a shell starts in the background ignores
# SIGINT, and so would its children.
SIGNALLED_AT_STEP_5 = """
import multiprocessing, os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from lrc_edge.cli import main
from lrc_edge.train.loop import trainer
from lrc_edge.train.loop.trainer import Trainer

sent, workers, row, Loader = int(sys.argv.pop(1)), int(sys.argv.pop(1)), Trainer.row, trainer.DataLoader

def signalling(self, values):
    row(self, values)
    if values["step"] == 5:
        assert len(multiprocessing.active_children()) == workers
        os.killpg(0, sent)  # as a scheduler does: to this process and its workers

def loader(*args, **options):
    return Loader(*args, **{**options, "num_workers": workers})  # as for a GPU

Trainer.row, trainer.DataLoader = signalling, loader
main()
"""


@pytest.mark.parametrize(("sent", "workers"), [(signal.SIGTERM, 0), (signal.SIGTERM, 2), (signal.SIGINT, 0)])
def test_a_signal_ends_the_run_and_the_same_command_continues(sent: signal.Signals, workers: int, whole: Path,
                                                              tiny_llama: Path, text: Path, tmp_path: Path) -> None:
    """SIGTERM after the step that it came in, with a checkpoint of that; SIGINT at once."""
    settings = [part for setting in SETTINGS for part in ("--set", setting)]
    command = [sys.executable, "-c", SIGNALLED_AT_STEP_5, str(int(sent)), str(workers), "train", str(tiny_llama),
               "--out", str(tmp_path / "out"), "--data", str(text), *settings]
    process = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
                             start_new_session=True)
    said, metrics = process.stderr, tmp_path / "out" / "train" / METRICS_FILE
    assert process.returncode == 130 and said == "\nlrc-edge: interrupted; run the same command to resume\n", said
    last = int(read_metrics(metrics)[-1]["step"])
    assert last < STEPS
    if sent == signal.SIGTERM:
        checkpoint = latest(tmp_path / "out" / "train" / "checkpoints")
        assert checkpoint is not None and checkpoint.name == f"step-{last:08d}"
    train(tiny_llama, text, tmp_path / "out")
    same_as(whole, tmp_path / "out")


def test_a_changed_setting_is_named_and_refused_while_there_are_checkpoints(whole: Path, tiny_llama: Path, text: Path,
                                                                           tmp_path: Path,
                                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(stage, "save_trained", interrupt)
        train(tiny_llama, text, out)
    kept = sorted((out / "train" / "checkpoints").iterdir())
    with pytest.raises(UserError, match=r"train: holds checkpoints of a run with other settings or data "
                                        r"\(train.alpha was 0.2, is 0.3; train.seed was 0, is 1; "
                                        r"start was \w+, is \w+\); restore"):
        train(tiny_llama, text, out, "train.alpha=0.3", "train.seed=1")
    assert sorted((out / "train" / "checkpoints").iterdir()) == kept
    train(tiny_llama, text, out, "train.micro_batch=1")  # how it runs may change
    same_as_lengths = [len(read_metrics(path / "train" / METRICS_FILE)) for path in (whole, out)]
    assert same_as_lengths[0] == same_as_lengths[1]


def test_checkpoints_of_an_unknown_run_are_refused_and_a_folder_without_any_is_emptied(tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints" / "step-00000001").mkdir(parents=True)
    (tmp_path / "run" / "fingerprint").write_text("of an older version")
    with pytest.raises(UserError, match="other settings or data; restore"):
        claim(tmp_path / "run", {"train.seed": 1})
    (tmp_path / "run" / "checkpoints" / "step-00000001").rmdir()
    (tmp_path / "run" / METRICS_FILE).write_text("")
    claim(tmp_path / "run", {"train.seed": 1})
    assert sorted(file.name for file in (tmp_path / "run").iterdir()) == ["inputs.json"]
    (tmp_path / "run" / METRICS_FILE).write_text("")
    claim(tmp_path / "run", {"train.seed": 1})
    assert (tmp_path / "run" / METRICS_FILE).exists()


@pytest.mark.parametrize("what", ["load_clone", "run", "Trainer"])
def test_too_little_memory_is_told_wherever_it_ends(what: str, tiny_llama: Path, text: Path, tmp_path: Path,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(stage, what, refuse)
    with pytest.raises(UserError, match=r"out of memory on cpu \(CUDA out of memory\); lower train.micro_batch \(now"):
        train(tiny_llama, text, tmp_path / "out")


def test_too_little_memory_for_the_start_is_told(tiny_llama: Path, text: Path, tmp_path: Path,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(start_stage, "build_start", refuse)
    with pytest.raises(UserError, match=r"start: out of memory on cpu \(CUDA out of memory\); the embedding, the LM"):
        train(tiny_llama, text, tmp_path / "out")
    assert not (tmp_path / "out" / "start").exists()
