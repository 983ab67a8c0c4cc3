"""Survival: kills at random moments, checkpoints cut off or damaged, full disks, bad batches."""
from __future__ import annotations

import json
import math
import multiprocessing
import os
import random
import resource
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import tiny_data
from train_runs import run

from lrc_edge.errors import UserError
from lrc_edge.train.loop import checkpoints
from lrc_edge.train.loop.guard import Guard
from lrc_edge.train.loop.trainer import METRICS_FILE, TRAINED_FILE, read_metrics

KILLS, STEPS = 20, 60
LONG = [f"train.tokens={256 * STEPS}", "train.checkpoint_every=2", "train.eval_every=7", "train.dense_share=0.5",
        "train.dense_alpha=0.1",
        "train.precision=fp32"]


@pytest.fixture(scope="module")
def data(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_data(tiny_llama, tmp_path_factory.mktemp("data"))


def last_step(folder: Path) -> int:
    file = folder / METRICS_FILE
    rows = read_metrics(file) if file.exists() else []
    return int(rows[-1]["step"]) if rows else -1


def kill_at_random(child: multiprocessing.process.BaseProcess, folder: Path, target: float,
                   chance: random.Random) -> None:
    """SIGKILL soon after step `target`; where an earlier start came that far, while this one is still starting."""
    assert child.pid is not None
    if last_step(folder) >= target:
        time.sleep(chance.random() * 0.1)
    while last_step(folder) < target and child.is_alive():
        time.sleep(0.001)
    time.sleep(chance.random() * 0.01)
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    assert child.exitcode == -signal.SIGKILL, "the run ended before the last kill: nothing was shown"


def test_twenty_kills_leave_no_trace(tiny_llama: Path, data: Path, tmp_path: Path, chance: random.Random) -> None:
    """60 steps with 20 SIGKILLs at random moments end with the bits of 60 steps without; the metrics, too."""
    context = multiprocessing.get_context("forkserver")  # a clean process with the imports done: quick to start
    context.set_forkserver_preload(["train_runs"])
    whole = context.Process(target=run, args=(tiny_llama, data, tmp_path / "whole", *LONG))
    whole.start()
    whole.join()
    folder = tmp_path / "killed"
    folder.mkdir()
    for kill in range(KILLS):
        child = context.Process(target=run, args=(tiny_llama, data, folder, *LONG))
        child.start()
        kill_at_random(child, folder, chance.uniform(-1, STEPS * (kill + 1) / (KILLS + 10)), chance)
    last = context.Process(target=run, args=(tiny_llama, data, folder, *LONG))
    last.start()
    last.join()
    assert last.exitcode == 0
    assert (folder / TRAINED_FILE).read_bytes() == (tmp_path / "whole" / TRAINED_FILE).read_bytes()
    curves = [[{k: v for k, v in row.items() if k != "tokens_per_second"} for row in read_metrics(f / METRICS_FILE)]
              for f in (folder, tmp_path / "whole")]
    assert curves[0] == curves[1]


def test_other_seeds_give_other_bits(tiny_llama: Path, data: Path, tmp_path: Path) -> None:
    """The negative of the above: equality of files is no matter of course."""
    for seed in (0, 1):
        run(tiny_llama, data, tmp_path / str(seed), f"train.seed={seed}", "train.precision=fp32")
    assert (tmp_path / "0" / TRAINED_FILE).read_bytes() != (tmp_path / "1" / TRAINED_FILE).read_bytes()


def some_state(value: float) -> dict[str, torch.Tensor]:
    return {"trained.x": torch.full((1000,), value)}


def test_checkpoints_are_pruned_and_a_partial_one_is_no_checkpoint(tmp_path: Path) -> None:
    assert checkpoints.latest(tmp_path) is None
    for step in (2, 4, 10, 100):
        checkpoints.save(tmp_path, step, some_state(step), {"phase": "clone"}, keep=2)
    (tmp_path / checkpoints.PARTIAL).mkdir()
    (tmp_path / checkpoints.PARTIAL / checkpoints.STATE_FILE).write_bytes(b"half")
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-00000010", "step-00000100"]
    last = checkpoints.latest(tmp_path)
    assert last is not None
    tensors, facts = checkpoints.load(last)
    assert facts == {"step": 100, "phase": "clone"} and tensors.get_tensor("trained.x")[0] == 100


def test_a_disk_that_is_full_keeps_the_last_checkpoint_and_says_so(tmp_path: Path) -> None:
    """The system itself refuses to write past a limit on the size of files, as it does on a full disk."""
    checkpoints.save(tmp_path, 1, some_state(1), {}, keep=2)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
        with pytest.raises(UserError, match=r"step 2 could not be written .*last good one is .*step-00000001: free"):
            checkpoints.save(tmp_path, 2, some_state(2), {}, keep=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    assert checkpoints.load(tmp_path / "step-00000001")[0].get_tensor("trained.x")[0] == 1


def test_a_damaged_checkpoint_is_told_in_one_line(tmp_path: Path) -> None:
    checkpoints.save(tmp_path, 1, some_state(1), {}, keep=2)
    file = tmp_path / "step-00000001" / checkpoints.STATE_FILE
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"damaged checkpoint .*delete this folder"):
        checkpoints.load(tmp_path / "step-00000001")


# -- bad batches -------------------------------------------------------------------------------------------------------


def spoiled(data: Path, folder: Path) -> Path:
    """One row again and again, which is soon known by heart, and among 150 of them one of random ids."""
    folder.mkdir()
    for file in data.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tokens = np.tile(np.load(data / "tokens-00000.npy")[:64], 150)
    tokens[64 * 40:64 * 41] = np.random.default_rng(4).integers(5, 500, 64)
    np.save(folder / "tokens-00000.npy", tokens)
    np.save(folder / "starts-00000.npy", np.arange(0, len(tokens), 64, dtype=np.uint64))
    return folder


BAD = ["train.batch_tokens=64", "train.tokens=9600", "train.spike_factor=3", "train.precision=fp32",
       "train.dense_learning_rate=0.01", "train.seed=3", "train.checkpoint_every=1000",
       "train.dense_alpha=0", "train.kl_weight=0"]


def test_a_spike_stops_the_run_with_its_name_and_skip_goes_on(tiny_llama: Path, data: Path, tmp_path: Path) -> None:
    bad = spoiled(data, tmp_path / "bad")
    with pytest.raises(UserError, match=r"the lm loss jumped to [\d.]+ at step \d+, from about [\d.]+ of 150 "
                                        r"\(rows 40, .*on_bad_batch=skip"):
        run(tiny_llama, bad, tmp_path / "stop", *BAD)
    rows = run(tiny_llama, bad, tmp_path / "skip", *BAD, "train.on_bad_batch=skip")
    skipped = [row for row in rows if "skipped" in row]
    assert len(skipped) == 1 and rows[-1]["step"] == 150
    summary = json.loads((tmp_path / "skip" / "training.json").read_text())
    assert summary["skipped_batches"] == 1


def test_a_run_that_diverged_stops_even_where_batches_are_skipped(tiny_llama: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is (nan|inf) at step \d+ of 60"):
        run(tiny_llama, data, tmp_path / "t", *LONG, "train.learning_rate=1e30", "train.warmup_share=0",
            "train.max_grad_norm=1e30", "train.on_bad_batch=skip", "train.dense_share=0")


def test_bad_batches_in_a_row_are_counted_from_the_last_good_one() -> None:
    guard = Guard(torch.device("cpu"), spike_factor=0)
    values = [1.0, math.nan, 1.0, math.nan, math.nan, math.nan, 1.0]
    counts = []
    for step, value in enumerate(values):
        guard.judge(step, torch.tensor([value, 1.0, 1.0, 1.0]))
        if step in (4, 6):  # a log row between them ends no row of bad batches
            counts += [batch.in_a_row for batch in guard.report()[1]]
    assert counts == [1, 1, 2, 3]


@pytest.mark.parametrize("bad", [[5.0, 1.0, 1.0, 1.0], [1.0, float("nan"), 1.0, 1.0], [1.0, 1.0, 1.0, float("inf")]])
def test_guard_skips_the_update_and_forgets_the_batch(bad: list[float]) -> None:
    guard = Guard(torch.device("cpu"), spike_factor=3.0)
    weight = torch.nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.AdamW([weight], fused=True)
    for step, terms in enumerate([[1.0, 1.0, 1.0, 1.0]] * 3 + [bad]):
        before, average = weight.detach().clone(), guard.average
        weight.grad = torch.full((3,), terms[1])
        optimizer.found_inf = guard.judge(step, torch.tensor(terms))  # type: ignore[attr-defined]
        optimizer.step()
    assert torch.equal(weight, before) and torch.equal(guard.average, average)
    means, found = guard.report()
    assert means == [1.0, 1.0, 1.0, 1.0]
    names = ("lm loss", "kl loss", "clone loss", "gradient norm")
    assert [b.step for b in found] == [3] and found[0].term == names[next(i for i in range(4) if bad[i] != 1.0)]
    assert guard.report() == (None, [])


@pytest.mark.parametrize(("kl", "is_bad"), [(0.9, 0), (1.1, 1)])
def test_a_small_loss_may_vary_by_factors(kl: float, is_bad: int) -> None:
    """A student near its teacher has a KL that differs much from text to text: 0.05 after 0.01 damages nothing."""
    guard = Guard(torch.device("cpu"), spike_factor=5.0)
    assert [guard.judge(i, torch.tensor([1.0, x, 1.0, 1.0])).item() for i, x in enumerate((0.01, kl))] == [0, is_bad]


def test_a_jumping_gradient_norm_is_no_spike() -> None:
    guard = Guard(torch.device("cpu"), spike_factor=3.0)
    assert [guard.judge(i, torch.tensor([1.0, 1.0, 1.0, norm])).item() for i, norm in enumerate((1.0, 100.0))] == [0, 0]
