"""Training on a GPU: every path runs, learns what a CPU learns, and never makes the host wait within a step.

`make test-gpu` needs no installation: only Python 3.11, torch, transformers, accelerate, safetensors, numpy and pytest.
Without a GPU, what is compiled or needs CUDA is skipped, and the rest runs on the CPU.
"""
from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from paths import ROOT
from tiny_models import tiny_data
from torch.distributed.device_mesh import init_device_mesh
from train_runs import run

from lrc_edge.train.loop import processes
from lrc_edge.train.loop.guard import Guard
from lrc_edge.train.loop.trainer import Trainer
from lrc_edge.train.losses import TERMS

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
needs_gpu = pytest.mark.skipif(not HAS_GPU, reason="this machine has no GPU")
needs_fp8 = pytest.mark.skipif(HAS_GPU and torch.cuda.get_device_capability() < (9, 0), reason="this GPU has no fp8")
pytestmark = pytest.mark.gpu

SHORT = ("train.tokens=1024", "train.dense_share=0.5", "train.micro_batch=2", "train.eval_every=100")
FP32, BF16, COMPILED = "train.precision=fp32", "train.precision=bf16", "train.compile=on"
DOCUMENTS, CHECKPOINTING = "data.isolate_documents=true", "train.gradient_checkpointing=true"
FP8 = "train.teacher_precision=fp8"
GRID = ("quantize.tokens=1024", "quantize.batch_tokens=256")
IN_FP32, IN_BF16 = 2e-3, 5e-2  # largest relative difference from float32 on a CPU

Run = Callable[..., dict[tuple[int, str], float]]


@pytest.fixture(scope="module")
def data(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_data(tiny_llama, tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def losses_of(tiny_llama: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A function that trains with these settings and returns the logged losses by step and name."""
    def train(*settings: str) -> dict[tuple[int, str], float]:
        rows = run(tiny_llama, data, tmp_path_factory.mktemp("train"), *SHORT, "train.compile=off", *settings)
        names = (*TERMS, "held_out_loss")
        return {(int(row["step"]), name): row[name] for row in rows for name in names if name in row}

    return train


@pytest.fixture(scope="module")
def on_cpu(losses_of: Run) -> Run:
    """The same in float32 on the CPU, once for each set of settings."""
    found: dict[tuple[str, ...], dict[tuple[int, str], float]] = {}

    def train(*settings: str) -> dict[tuple[int, str], float]:
        if settings not in found:
            found[settings] = losses_of("train.device=cpu", FP32, *settings)
        return found[settings]

    return train


def same(expected: dict[tuple[int, str], float], got: dict[tuple[int, str], float], within: float) -> None:
    assert expected.keys() == got.keys() and len(got) > 8
    for key, value in expected.items():
        assert abs(got[key] - value) <= within * (abs(value) + 1e-2), (key, value, got[key])


@pytest.mark.parametrize(("method", "how", "within"), [
    pytest.param([], [FP32], IN_FP32, id="fp32"),
    pytest.param([], [BF16], IN_BF16, id="bf16"),
    pytest.param([DOCUMENTS], [BF16], IN_BF16, id="documents"),
    pytest.param([], [BF16, CHECKPOINTING], IN_BF16, id="checkpointing"),
    pytest.param([*GRID], [BF16], IN_BF16, id="grid"),
    pytest.param([FP8], [BF16], IN_BF16, id="fp8-teacher", marks=needs_fp8),
    pytest.param([], [BF16, COMPILED], IN_BF16, id="compiled", marks=needs_gpu),
    pytest.param([], [BF16, COMPILED, CHECKPOINTING], IN_BF16, id="compiled-checkpointing", marks=needs_gpu),
    pytest.param([DOCUMENTS], [BF16, COMPILED], IN_BF16, id="compiled-documents", marks=needs_gpu),
    pytest.param([*GRID], [BF16, COMPILED], IN_BF16, id="compiled-grid", marks=needs_gpu),
    pytest.param([FP8], [BF16, COMPILED], IN_BF16, id="compiled-fp8-teacher", marks=[needs_gpu, needs_fp8]),
])
def test_losses_are_those_of_float32_on_a_cpu(method: list[str], how: list[str], within: float, losses_of: Run,
                                              on_cpu: Run) -> None:
    same(on_cpu(*method), losses_of(f"train.device={DEVICE}", *method, *how), within)


def test_another_method_has_other_losses(on_cpu: Run) -> None:
    """The negative of the above: the limits tell methods apart."""
    with pytest.raises(AssertionError):
        same(on_cpu(), on_cpu("train.init=gaussian"), IN_BF16)


@pytest.fixture
def mesh_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """FSDP2 over one process: NCCL (gloo on a CPU), all-gathers, reduce-scatters, mixed precision and its hooks."""
    dist.init_process_group("nccl" if HAS_GPU else "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0,
                            world_size=1)
    monkeypatch.setattr(processes, "shard",
                        lambda clone, state: processes.shard_over(clone, init_device_mesh(DEVICE, (1,))))
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("how", [
    pytest.param([BF16], id="eager"),
    pytest.param([BF16, CHECKPOINTING], id="checkpointing"),
    pytest.param([BF16, COMPILED], id="compiled", marks=needs_gpu),
    pytest.param([BF16, FP8], id="fp8-teacher", marks=needs_fp8),
])
def test_fsdp2_over_a_mesh_of_one(how: list[str], mesh_of_one: None, losses_of: Run, on_cpu: Run) -> None:
    same(on_cpu(), losses_of(f"train.device={DEVICE}", *how), IN_BF16)


@pytest.fixture
def no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Raise if the host waits for the GPU within a step, once each phase has made a first one."""
    step, seen = Trainer._step, set[str]()

    def watched(self: Trainer, number: int, batch: dict[str, torch.Tensor]) -> None:
        torch.cuda.set_sync_debug_mode("error" if self.clone.phase.name in seen else "default")
        seen.add(self.clone.phase.name)
        try:
            step(self, number, batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(Trainer, "_step", watched)


@needs_gpu
@pytest.mark.parametrize("settings", [(), (DOCUMENTS,), (CHECKPOINTING,), (COMPILED,), GRID], ids=",".join)
def test_the_host_never_waits_within_a_step(settings: tuple[str, ...], no_waits: None, losses_of: Run) -> None:
    losses_of("train.device=cuda", BF16, *settings)


@needs_gpu
def test_a_wait_within_a_step_is_noticed(no_waits: None, losses_of: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    judge = Guard.judge
    monkeypatch.setattr(Guard, "judge", lambda self, step, terms: (terms.sum().item(), judge(self, step, terms))[1])
    with pytest.raises(RuntimeError, match="synchroniz"):
        losses_of("train.device=cuda", BF16)


WITHOUT_THE_OTHER_PACKAGES = """
import sys
for name in ("datasets", "gguf", "llama_cpp", "onnx", "onnxruntime", "onnxruntime_genai", "sentencepiece", "typer"):
    sys.modules[name] = None  # importing it raises
import test_smoke, tiny_models
"""


def test_a_machine_with_only_torch_and_transformers_can_import_this_file() -> None:
    paths = os.pathsep.join([*sys.path, str(ROOT / "tests" / "gpu")])
    done = subprocess.run([sys.executable, "-c", WITHOUT_THE_OTHER_PACKAGES], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": paths})
    assert done.returncode == 0, done.stderr
