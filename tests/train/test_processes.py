"""Several processes: the same losses as one, checkpoints that cross, rows that no two read."""
from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
from paths import ROOT
from safetensors.torch import load_file
from tiny_models import TEXT, make_tiny, tiny_data

from lrc_edge.block_map import BlockMap
from lrc_edge.corpus.held_out import HeldOut
from lrc_edge.errors import UserError
from lrc_edge.train.data.tokenize import HELD_OUT_FILE
from lrc_edge.train.hops import hop_summaries
from lrc_edge.train.loop.processes import STEP_TIMEOUT, TIMEOUT
from lrc_edge.train.loop.schedule import ProcessBatches, RowOrder, Schedule
from lrc_edge.train.loop.trainer import EVAL_TOKENS, METRICS_FILE, TRAINED_FILE, read_metrics

# A student that is smaller along every axis.
SETTINGS = ["train.precision=fp32", "train.dense_share=0.5", "train.micro_batch=1", "student.num_hidden_layers=1",
            "student.intermediate_size=64", "student.num_attention_heads=2", "student.num_key_value_heads=1"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
RUN = str(ROOT / "tests" / "support" / "train_runs.py")


@pytest.fixture(scope="module")
def data(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its held-out text makes an odd number of rows: two processes have one too few."""
    folder = tiny_data(tiny_llama, tmp_path_factory.mktemp("data"))
    held_out = HeldOut.load(folder / HELD_OUT_FILE)
    HeldOut(held_out.ids[:5 * 63], held_out.n_bytes, held_out.openings).save(folder / HELD_OUT_FILE)
    assert len(HeldOut.load(folder / HELD_OUT_FILE).rows(64, EVAL_TOKENS, bos=0)) == 5
    return folder


def start(n_processes: int, teacher: Path, data: Path, folder: Path, *settings: str) -> subprocess.Popen[bytes]:
    launcher = TORCHRUN if n_processes == 2 else [sys.executable]
    return subprocess.Popen([*launcher, RUN, str(teacher), str(data), str(folder), *SETTINGS, *settings],
                            start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def kill_after(process: subprocess.Popen[bytes], folder: Path, step: int) -> None:
    """SIGKILL to the launcher and all its processes once `step` is logged."""
    file = folder / METRICS_FILE
    while process.poll() is None and not (file.exists() and any(r["step"] > step for r in read_metrics(file))):
        time.sleep(0.01)
    assert process.poll() is None, "ended before it could be killed"
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.fixture(scope="module")
def alone(tiny_llama: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone") / "train"
    assert start(1, tiny_llama, data, folder).wait() == 0
    return folder


def same_as(alone: Path, folder: Path) -> None:
    expected, got = read_metrics(alone / METRICS_FILE), read_metrics(folder / METRICS_FILE)
    assert len(got) == len(expected) > 20
    for a, b in zip(expected, got, strict=True):
        for key in {"lm", "kl", "clone", "held_out_loss"} & a.keys():
            assert b[key] == pytest.approx(a[key], abs=1e-5), (a["step"], key)
    theirs = load_file(folder / TRAINED_FILE)
    for name, tensor in load_file(alone / TRAINED_FILE).items():
        assert (tensor - theirs[name]).abs().max() < 1e-4, name


def test_two_processes_learn_what_one_does(alone: Path, tiny_llama: Path, data: Path, tmp_path: Path) -> None:
    assert start(2, tiny_llama, data, tmp_path / "train").wait() == 0
    same_as(alone, tmp_path / "train")


def test_two_processes_train_biases_as_one_does(tmp_path: Path) -> None:
    """They are frozen when the parameters are sharded, and trained after the dense phase has begun."""
    teacher = make_tiny(tmp_path / "teacher", family="qwen2", tied=False, tokenizer="qwen2")
    (tmp_path / "data").mkdir()
    data = tiny_data(teacher, tmp_path / "data")
    for n_processes in (1, 2):
        assert start(n_processes, teacher, data, tmp_path / str(n_processes)).wait() == 0
    same_as(tmp_path / "1", tmp_path / "2")
    trained, original = load_file(tmp_path / "2" / TRAINED_FILE), load_file(teacher / "model.safetensors")
    bias = "model.layers.0.self_attn.v_proj.bias"
    before = BlockMap(*(trained[f"map.v_size.0.{part}"] for part in ("index", "factor")), 48).apply(original[bias])
    assert (trained[bias] - before).abs().max() > 1e-3


@pytest.mark.parametrize(("first", "then", "step"), [(2, 1, 9), (1, 2, 13)])
def test_a_checkpoint_continues_on_another_number(first: int, then: int, step: int, alone: Path, tiny_llama: Path,
                                                  data: Path, tmp_path: Path) -> None:
    """Killed in the clone phase on two, in the dense phase on one."""
    folder = tmp_path / "train"
    kill_after(start(first, tiny_llama, data, folder), folder, step)
    assert any((folder / "checkpoints").glob("step-*"))
    assert start(then, tiny_llama, data, folder).wait() == 0
    same_as(alone, folder)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_every_row_once_an_epoch_whatever_the_processes(world: int) -> None:
    n_rows, per_step, steps = 64, 8, 16  # two epochs
    order = RowOrder(n_rows, per_step, seed=3)
    parts = [list(ProcessBatches(order, range(steps), rank, world)) for rank in range(world)]
    whole = [sorted(row for part in parts for row in part[step]) for step in range(steps)]
    assert whole == [sorted(RowOrder(n_rows, per_step, seed=3).of_step(step)) for step in range(steps)]
    for epoch in (whole[:8], whole[8:]):
        assert sorted(row for step in epoch for row in step) == list(range(n_rows))
    assert whole[:8] != whole[8:]
    for a, b in pairwise(parts):
        assert not any(set(x) & set(y) for x, y in zip(a, b, strict=True))
    continued = list(ProcessBatches(order, range(11, steps), 0, world))
    assert continued == parts[0][11:]


def test_rows_that_do_not_divide_are_refused_with_a_number_that_does() -> None:
    schedule = Schedule(64, 6, 10, 10, 1, 1e-3, 1, 1e-3)
    assert schedule.rows_of_process(2, 8) == (3, 3)
    with pytest.raises(UserError, match=r"6 rows of 64 does not divide among 4 processes; take 512"):
        schedule.rows_of_process(4, 8)


def test_train_under_torchrun_from_the_command_line(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT[:200_000])
    command = [*TORCHRUN, "-m", "lrc_edge", "train", str(tiny_llama), "--data", str(tmp_path / "text.txt"), "--out",
               str(tmp_path / "out"), "--set", "train.seq_len=64", "--set", "train.batch_tokens=256", "--set",
               "train.tokens=2560", "--set", "data.held_out_share=0.2",
               "--set", "student.hidden_size=32", "--set", "student.hops=['hidden_size=48']", "--set",
               "train.device=cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("tokens on cpu") == 1  # the first process speaks, the other is silent
    [hop] = hop_summaries(tmp_path / "out" / "train")
    assert hop["tokens"] == 1280
    again = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert again.returncode == 0 and "train  unchanged" in again.stdout
    assert (tmp_path / "out" / "train" / TRAINED_FILE).exists()
    elsewhere = [str(tmp_path / "new") if part == str(tmp_path / "out") else part for part in command]
    wrong = subprocess.run([*elsewhere, "--set", "train.batch_tokens=64"], capture_output=True, text=True,
                           env=environment)
    assert "does not divide among 2 processes; take 128" in wrong.stderr and wrong.returncode != 0
    assert not (tmp_path / "new").exists(), "said before anything is tokenized"


def test_the_first_process_keeps_the_tensors_and_says_what_is_there(tmp_path: Path) -> None:
    script = tmp_path / "ask.py"
    script.write_text(ASK)
    done = subprocess.run([*TORCHRUN, str(script), str(tmp_path)], capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    # a file each: lines of two processes may run together in one pipe
    assert (tmp_path / "said-0").read_text() == "seen by 0 {'x': [0.0, 1.0, 2.0, 3.0]}"
    assert (tmp_path / "said-1").read_text() == "seen by 0 {}"


ASK = """
import sys
from pathlib import Path
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from lrc_edge.train.hops import hop_summaries
from lrc_edge.train.loop.processes import agreed, gathered, join, leave

peers = join(torch.device("cpu"))
shard = distribute_tensor(torch.arange(4.0), init_device_mesh("cpu", (2,)), [Shard(0)])
assert len(shard.to_local()) == 2
found = gathered([("x", shard)], peers)
rank = peers.process_index
said = f"{agreed(f'seen by {rank}', peers)} { {name: t.tolist() for name, t in found.items()} }"
Path(sys.argv[1], f"said-{rank}").write_text(said)
leave(peers)
"""


def test_a_step_of_two_processes(tiny_llama: Path, data: Path, tmp_path: Path) -> None:
    """What it sends, in which type the head's gradient adds up, how long it waits, and what is sharded."""
    script = tmp_path / "step.py"
    script.write_text(ONE_STEP)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([*TORCHRUN, str(script), *map(str, (tiny_llama, data, tmp_path))], capture_output=True,
                          text=True, env=environment)
    assert done.returncode == 0, done.stderr
    seen = json.loads((tmp_path / "seen.json").read_text())
    assert seen["head"] == ["torch.float32"] * 2, "two forward passes, and their gradients are summed in this type"
    assert seen["reduce-scatters"] == 3, "one per pair of layers, and one for the embedding, per step"
    assert seen["timeouts"] == [STEP_TIMEOUT.total_seconds(), TIMEOUT.total_seconds()] and STEP_TIMEOUT < TIMEOUT
    assert seen["phase when sharded"] == "dense", "FSDP2 would hold the projections that the dense phase frees"


ONE_STEP = """
import json, sys
from pathlib import Path
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from train_runs import run
from lrc_edge.train import losses
from lrc_edge.train.loop import processes
from lrc_edge.train.loop.trainer import Trainer

seen, calls = {"timeouts": []}, []
step, shard, head = Trainer._step, processes.shard, losses._HeadLosses.forward

def timeout():
    return dist.group.WORLD._get_backend(torch.device("cpu")).options._timeout.total_seconds()

class Counting(TorchDispatchMode):
    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        seen["reduce-scatters"] += "reduce_scatter" in str(op)
        return op(*args, **(kwargs or {}))

def watched_step(self, number, batch):
    calls.clear()
    seen["reduce-scatters"] = 0
    with Counting():
        step(self, number, batch)
    seen["head"] = list(calls)
    seen["timeouts"].append(timeout())

def watched_shard(clone, state):
    seen["phase when sharded"] = clone.phase.name
    shard(clone, state)

def watched_head(ctx, hidden, head_weight, *rest):
    calls.append(str(head_weight.dtype))
    return head(ctx, hidden, head_weight, *rest)

Trainer._step, processes.shard = watched_step, watched_shard
losses._HeadLosses.forward = staticmethod(watched_head)
teacher, data, out = map(Path, sys.argv[1:])
run(teacher, data, out / "train", "train.tokens=256", "train.precision=bf16", "train.micro_batch=1")
seen["timeouts"].append(timeout())
peers = processes.join(torch.device("cpu"))
if peers.is_main_process:
    (out / "seen.json").write_text(json.dumps(seen))
processes.leave(peers)
"""
