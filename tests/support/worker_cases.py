"""What every worker must say of the same model: what llama.cpp and onnxruntime say natively."""
from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from paths import STORYTELLER
from tiny_models import make_tiny

from lrc_edge.checkpoint import DenseCheckpoint
from lrc_edge.export.gguf.to_gguf import export_gguf
from lrc_edge.targets.runtimes.worker import Command, Worker, WorkerFailed

N_CTX = 256
TEXTS = ("Once upon a time", "", " ", "naïve 日本 😀\n\nthere were 3 cats.", "a a a a b a", "\x00\x01\u0301")


@contextmanager
def native(runtime: str) -> Iterator[Worker]:
    with Worker(Command((sys.executable, "-m", "lrc_edge.targets.runtimes.python_worker", runtime))) as worker:
        yield worker


def model(name: str, folder: Path) -> DenseCheckpoint:
    """The embedded teacher, or a tiny random model with the tokenizer `name`."""
    if name == "storyteller":
        return DenseCheckpoint.open(STORYTELLER)
    return DenseCheckpoint.open(make_tiny(folder / "tiny", tokenizer=name, tied=name != "spm"))


def gguf(checkpoint: DenseCheckpoint, out: Path, encoding: str) -> Path:
    [artifact] = export_gguf(checkpoint, out / "gguf", [encoding])
    return out / artifact.path


def agrees_with_native(worker: Worker, path: Path, checkpoint: DenseCheckpoint, within: float,
                       native_path: Path | None = None) -> None:
    """Log-probabilities of 16 ids at each of 48 positions, argmax, greedy text; ids are Hugging Face's.

    within: of the mean difference between log-probabilities; the largest may be ten times that.
    """
    native_path = native_path or path
    tokenizer = checkpoint.tokenizer()
    special = tokenizer.all_special_tokens[0]
    rng, size = np.random.default_rng(0), checkpoint.shape.vocab_size
    ids, wanted = rng.integers(0, size, 48).tolist(), rng.integers(0, size, (48, 16)).tolist()
    ids[24] = tokenizer.eos_token_id  # in the middle of a row it ends nothing
    opened: dict[str, Any] = {"n_ctx": N_CTX, "threads": 1}
    with native("llama.cpp" if path.suffix == ".gguf" else "onnxruntime") as reference:
        reference.ask("open", path=str(native_path), **opened)
        expected = reference.ask("score", ids=ids, wanted=wanted)
        expected_text = reference.ask("generate", ids=ids[:20], n_tokens=12, stop=[])["ids"]
    answer = worker.ask("open", path=str(path), **opened)
    assert (answer["n_ctx"], answer["vocab_size"]) == (N_CTX, size)
    got = worker.ask("score", ids=ids, wanted=wanted)
    difference = np.abs(np.array(got["logprobs"]) - np.array(expected["logprobs"]))
    same = np.mean(np.array(got["argmax"]) == np.array(expected["argmax"]))
    print(found := f"{path.name}: mean {difference.mean():.1e}, largest {difference.max():.1e}, argmax {same:.2f}")
    assert difference.mean() < within and difference.max() < 10 * within, found
    assert same >= (1.0 if within < 1e-2 else 0.9)
    assert worker.ask("score", ids=ids, wanted=wanted) == got
    made = worker.ask("generate", ids=ids[:20], n_tokens=12, stop=[])["ids"]
    assert len(made) == 12
    if within < 1e-2:
        assert made == expected_text
    assert worker.ask("generate", ids=ids[:20], n_tokens=12, stop=[made[4]])["ids"] == made[:made.index(made[4])]
    texts = [*TEXTS, f"{special} and {special}"]
    assert worker.ask("tokenize", texts=texts)["ids"] == tokenizer(texts)["input_ids"]
    assert worker.ask("memory")["peak_bytes"] > path.stat().st_size


def ends_at_the_end_of_the_context(worker: Worker, ids: list[int]) -> None:
    """After `open`."""
    prompt = (ids * N_CTX)[:N_CTX - 8]
    assert 7 <= len(worker.ask("generate", ids=prompt, n_tokens=100, stop=[])["ids"]) <= 9
    with pytest.raises(WorkerFailed, match=r"context"):
        worker.ask("score", ids=(ids * N_CTX)[:N_CTX + 44], wanted=[[1]] * (N_CTX + 44))
    assert len(worker.ask("generate", ids=prompt[:3], n_tokens=2, stop=[])["ids"]) == 2  # and goes on


def refuses_wrong_ids(worker: Worker, vocab_size: int) -> None:
    """After `open`."""
    for op, fields in (("score", {"ids": [1, vocab_size], "wanted": [[1], [1]]}),
                       ("score", {"ids": [1, 2], "wanted": [[1], [vocab_size]]}),
                       ("score", {"ids": [1, -1], "wanted": [[1], [1]]}),
                       ("generate", {"ids": [vocab_size], "n_tokens": 1, "stop": []})):
        with pytest.raises(WorkerFailed, match=rf"id \S+ is outside the vocabulary of {vocab_size}"):
            worker.ask(op, **fields)
    assert len(worker.ask("score", ids=[1, 2], wanted=[[1], [2]])["argmax"]) == 2


def refuses_a_corrupted_file(worker: Worker, path: Path) -> None:
    """A file of which half is missing."""
    whole = path.read_bytes()
    path.write_bytes(whole[:len(whole) // 2])
    with pytest.raises(WorkerFailed) as failed:
        worker.ask("open", path=str(path), n_ctx=N_CTX, threads=1)
    assert "cannot load" in str(failed.value) and "\n" not in str(failed.value)
