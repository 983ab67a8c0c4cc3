"""llama.cpp in node, by node-llama-cpp, says of a GGUF what it says natively."""
from __future__ import annotations

from pathlib import Path

import pytest
from worker_cases import (
    agrees_with_native,
    ends_at_the_end_of_the_context,
    gguf,
    model,
    refuses_a_corrupted_file,
    refuses_wrong_ids,
)

from lrc_edge.checkpoint import DenseCheckpoint
from lrc_edge.errors import UserError
from lrc_edge.targets.devices import node_llama
from lrc_edge.targets.runtimes.worker import Worker, WorkerFailed

runs_node = pytest.mark.targets


# Where activations are rounded to 8 bits, the last digit of another instruction set's sum may turn one over: our
# guess.
@runs_node
@pytest.mark.parametrize(("name", "encoding", "within"), [
    ("storyteller", "f32", 5e-4), ("storyteller", "q8_0", 2e-2), ("storyteller", "q4_0", 2e-2), ("qwen2", "f32", 2e-3),
    ("spm", "q8_0", 2e-2)])
def test_it_says_what_llamacpp_says_natively(name: str, encoding: str, within: float, tmp_path: Path) -> None:
    checkpoint = model(name, tmp_path)
    path = gguf(checkpoint, tmp_path, encoding)
    with Worker(node_llama.command()) as worker:
        agrees_with_native(worker, path, checkpoint, within)
        ends_at_the_end_of_the_context(worker, [5, 6, 7])
        refuses_wrong_ids(worker, checkpoint.shape.vocab_size)
        answer = worker.ask("open", path=str(path), n_ctx=256, threads=1)
        assert answer["label"].startswith("node-llama-cpp 3.22.1 (llama.cpp ")
        with pytest.raises(WorkerFailed, match="requests: this runtime knows no such request"):
            worker.ask("requests")


@runs_node
def test_other_weights_are_noticed(tmp_path: Path) -> None:
    checkpoint = model("storyteller", tmp_path)
    quantized, whole = gguf(checkpoint, tmp_path, "q4_0"), gguf(checkpoint, tmp_path, "f32")
    with Worker(node_llama.command()) as worker, pytest.raises(AssertionError, match=r"Q4_0\.gguf: mean"):
        agrees_with_native(worker, quantized, checkpoint, 2e-2, native_path=whole)


@runs_node
def test_a_corrupted_file(tiny_llama: Path, tmp_path: Path) -> None:
    path = gguf(DenseCheckpoint.open(tiny_llama), tmp_path, "q8_0")
    with Worker(node_llama.command()) as worker:
        refuses_a_corrupted_file(worker, path)


def test_a_kit_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LRC_EDGE_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="node-llama-cpp is not installed; run lrc-edge targets setup node-llama-cpp"):
        node_llama.command()
