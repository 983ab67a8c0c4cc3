"""Runtimes in processes of their own: what they answer, and how each of their ways to die is told."""
from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import make_tiny

from lrc_edge.checkpoint import DenseCheckpoint
from lrc_edge.errors import UserError
from lrc_edge.export.gguf.to_gguf import export_gguf
from lrc_edge.export.onnx.to_onnx import export_onnx
from lrc_edge.targets.devices import emulation, kits
from lrc_edge.targets.devices.kits import Npm, unfinished
from lrc_edge.targets.runtimes.worker import Command, Worker, WorkerFailed

IDS = list(range(40))
RUNTIMES = ["llama.cpp", "onnxruntime", "onnxruntime-genai"]
# As the Python worker, with 8 MB more than its imports take.
LIMITED = """
import importlib, resource, runpy, sys
importlib.import_module({"llama.cpp": "llama_cpp"}.get(sys.argv[1], sys.argv[1]))
status = dict(line.split(":") for line in open("/proc/self/status"))
resource.setrlimit(resource.RLIMIT_AS, (1024 * int(status["VmSize"].split()[0]) + (8 << 20),) * 2)
runpy.run_module("lrc_edge.targets.runtimes.python_worker", run_name="__main__")
"""


def worker_of(runtime: str) -> Worker:
    return Worker(Command((sys.executable, "-m", "lrc_edge.targets.runtimes.python_worker", runtime)))


def program(text: str) -> Command:
    """A worker that is this program of Python."""
    return Command((sys.executable, "-c", text))


@pytest.fixture(scope="module")
def files(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runtime -> an F32 file for it."""
    return export(tiny_llama, tmp_path_factory.mktemp("files"))


def export(model: Path, out: Path) -> dict[str, Path]:
    checkpoint = DenseCheckpoint.open(model)
    [gguf] = export_gguf(checkpoint, out / "gguf", ["f32"])
    [onnx] = export_onnx(checkpoint, out / "onnx", ["fp32"])
    return {runtime: out / (gguf if runtime == "llama.cpp" else onnx).path for runtime in RUNTIMES}


# Answers


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_answers_are_the_models(runtime: str, tiny_llama: Path, files: dict[str, Path]) -> None:
    model = DenseCheckpoint.open(tiny_llama).model()
    with torch.no_grad():
        logprobs = torch.log_softmax(model(torch.tensor([IDS])).logits[0].double(), -1).numpy()
    wanted = np.random.default_rng(0).integers(0, 512, (len(IDS), 5))
    with worker_of(runtime) as worker:
        opened = worker.ask("open", path=str(files[runtime]), n_ctx=64, threads=1)
        scored = worker.ask("score", ids=IDS, wanted=wanted.tolist())
        made = worker.ask("generate", ids=IDS, n_tokens=4, stop=[])["ids"]
        stopped = worker.ask("generate", ids=IDS, n_tokens=4, stop=[made[2]])["ids"]
        memory = worker.ask("memory")
    assert opened["label"].startswith(runtime) and opened["n_ctx"] == 64 and opened["vocab_size"] == 512
    np.testing.assert_allclose(scored["logprobs"], np.take_along_axis(logprobs, wanted, -1), atol=0.02)
    assert np.mean(np.array(scored["argmax"]) == logprobs.argmax(-1)) > 0.9
    assert len(made) == 4 and made[0] == scored["argmax"][-1]
    assert stopped == made[:made.index(made[2])]
    assert 30e6 < memory["peak_bytes"] < 2e9 and memory["how"] == "VmHWM"


@pytest.mark.parametrize("runtime", RUNTIMES[:2])
def test_a_generation_ends_with_the_context(runtime: str, files: dict[str, Path]) -> None:
    with worker_of(runtime) as worker:
        worker.ask("open", path=str(files[runtime]), n_ctx=256, threads=1)
        assert len(worker.ask("generate", ids=[5] * 250, n_tokens=100, stop=[])["ids"]) == 6


def test_a_request_that_is_wrong_is_answered_and_the_next_one_too(files: dict[str, Path]) -> None:
    with worker_of("llama.cpp") as worker:
        worker.ask("open", path=str(files["llama.cpp"]), n_ctx=256, threads=1)
        for fields, why in [({"op": "sing"}, "unknown request 'sing'; known: open, score"),
                            ({"op": "__init__"}, "unknown request"),
                            ({"op": "score"}, "missing 2 required"),
                            ({"op": "score", "ids": [5] * 300, "wanted": [[0]] * 300}, "in a context of 256"),
                            ({"op": "score", "ids": [5], "wanted": [[512]]}, "512 is out of bounds")]:
            with pytest.raises(WorkerFailed, match=why) as failed:
                worker.ask(**fields)
            assert "\n" not in str(failed.value)
        assert worker.ask("tokenize", texts=["a"])["ids"]


def test_lines_that_are_not_requests() -> None:
    done = subprocess.run([sys.executable, "-m", "lrc_edge.targets.runtimes.python_worker", "llama.cpp"], text=True,
                          input='garbage\n[1]\n{}\n{"op": "memory"}\n', capture_output=True, timeout=60)
    *errors, memory = map(json.loads, done.stdout.splitlines())
    assert done.returncode == 0 and len(errors) == 3 and all(list(error) == ["error"] for error in errors)
    assert memory["peak_bytes"]


# Files and memory that are not enough


def cut(path: Path, n_bytes: int) -> None:
    path.write_bytes(path.read_bytes()[:n_bytes])


@pytest.mark.parametrize(("runtime", "spoil"), [
    ("llama.cpp", lambda path: cut(path, path.stat().st_size // 2)),
    ("llama.cpp", lambda path: cut(path, 100)),
    ("llama.cpp", lambda path: path.unlink()),
    ("onnxruntime", lambda path: cut(path, path.stat().st_size // 2)),
    ("onnxruntime", lambda path: cut(path.with_name(f"{path.name}_data"), 1000)),
    ("onnxruntime", lambda path: cut(path, 0)),
])
def test_a_broken_file_is_a_line(runtime: str, spoil: Callable[[Path], None], files: dict[str, Path], tmp_path: Path
                                 ) -> None:
    path = Path(shutil.copytree(files[runtime].parent, tmp_path / "files")) / files[runtime].name
    spoil(path)
    with worker_of(runtime) as worker, pytest.raises(WorkerFailed, match="load") as failed:
        worker.ask("open", path=str(path), n_ctx=64, threads=1)
    assert str(path) in str(failed.value) and "\n" not in str(failed.value)


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS is Linux's")
@pytest.mark.parametrize("runtime", RUNTIMES[:2])
def test_too_little_memory_is_a_line(runtime: str, tmp_path: Path) -> None:
    path = export(make_tiny(tmp_path / "wide", vocab_size=16384, hidden_size=256, layers=1), tmp_path)[runtime]
    with worker_of(runtime) as worker:
        worker.ask("open", path=str(path), n_ctx=64, threads=1)
    limited = Command((sys.executable, "-c", LIMITED, runtime))
    with Worker(limited) as worker, pytest.raises(WorkerFailed, match=r"mmap failed|bad_alloc|allocate") as failed:
        worker.ask("open", path=str(path), n_ctx=64, threads=1)
    assert str(path) in str(failed.value) and "\n" not in str(failed.value)


# Death


@pytest.mark.parametrize(("number", "words"), [
    (signal.SIGILL, "illegal instruction during open (signal SIGILL)"),
    (signal.SIGSEGV, "segmentation fault during open (signal SIGSEGV)"),
    (signal.SIGABRT, "aborted during open (signal SIGABRT)"),
    (signal.SIGKILL, "killed (out of memory?) during open (signal SIGKILL)"),
    (signal.SIGTERM, "killed during open (signal SIGTERM)"),
])
def test_death_by_a_signal(number: signal.Signals, words: str) -> None:
    text = ("import os, sys; input(); print('a\\nlast words\\n', file=sys.stderr, flush=True);"
            f"os.kill(os.getpid(), {number:d})")
    with Worker(program(text)) as worker:
        for _ in range(2):  # and it stays dead
            with pytest.raises(WorkerFailed) as failed:
                worker.ask("open", path="x")
            assert str(failed.value) == f"{words}: last words"


def test_other_ends() -> None:
    for text, words in [("input(); raise SystemExit(3)", "ended during open with status 3"),
                        ("import no_such_module", "ended during open with status 1: ModuleNotFoundError: No module"),
                        ("input(); print('garbage')", "its answer to open is not JSON: b'garbage'"),
                        ("input(); print('{\"error\": \"two\\\\nlines\"}')", "^two lines$")]:
        with Worker(program(text)) as worker, pytest.raises(WorkerFailed, match=words):
            worker.ask("open")
    with pytest.raises(WorkerFailed, match="no-such-program: cannot start it"):
        Worker(Command(("no-such-program",)))


def test_a_worker_that_hangs_is_killed() -> None:
    """With a request longer than a pipe holds too: it is not read."""
    for request in ({}, {"ids": IDS * 100_000}):
        started = time.monotonic()
        with Worker(program("import time; time.sleep(60)")) as worker:
            with pytest.raises(WorkerFailed, match="no answer to score within 1 s"):
                worker.ask("score", seconds=1, **request)
            with pytest.raises(WorkerFailed, match="SIGKILL"):  # never a late answer to another request
                worker.ask("open")
        assert time.monotonic() - started < 10


def test_no_process_outlives_the_block(tmp_path: Path) -> None:
    """Neither what the worker started."""
    text = ("import pathlib, subprocess, time; child = subprocess.Popen(['sleep', '60']);"
            "input(); print('{\"pid\": %d}' % child.pid, flush=True); time.sleep(60)")
    with Worker(program(text)) as worker:
        pid = worker.ask("open")["pid"]
        assert alive(pid)
    deadline = time.monotonic() + 5
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(pid)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# Kits


@pytest.mark.parametrize("error", [KeyboardInterrupt, UserError, OSError])
def test_an_interrupted_kit_is_not_there(error: type[BaseException], tmp_path: Path) -> None:
    with pytest.raises(error), unfinished(tmp_path / "cache" / "kit") as folder:
        (folder / "half").write_text("half")
        raise error
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_finished_kit_is_there_under_the_name_of_its_pins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LRC_EDGE_CACHE", str(tmp_path / "cache"))
    one, other = Npm("kit", ("a@1",), "1 MB"), Npm("kit", ("a@2",), "1 MB")
    assert one.folder.parent == tmp_path / "cache" and one.folder != other.folder
    with unfinished(one.folder) as folder:
        (folder / "whole").write_text("whole")
    assert [path.name for path in one.folder.iterdir()] == ["whole"]
    assert len(list((tmp_path / "cache").iterdir())) == 1


@pytest.mark.parametrize(("absent", "why"), [("apt-get", "no apt-get"), ("npm", "npm")])
def test_a_program_that_a_kit_needs_is_named(absent: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
                                             ) -> None:
    monkeypatch.setenv("LRC_EDGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path))
    kit = emulation.KIT if absent == "apt-get" else Npm("kit", ("a@1",), "1 MB")
    assert kit.missing()
    with pytest.raises(UserError, match=why):
        kit.install(lambda line: None)
    assert not (tmp_path / "cache").exists() or list((tmp_path / "cache").iterdir()) == []


def test_a_command_that_fails_is_told_with_its_last_words() -> None:
    with pytest.raises(UserError, match=r"failed: .*no such"):
        kits.run([sys.executable, "-c", "raise SystemExit('no such')"], lambda line: None)
    with pytest.raises(UserError, match="no-such-program: cannot run it"):
        kits.run(["no-such-program"], lambda line: None)


def test_looking_for_pip_leaves_setuptools_alone(tmp_path: Path) -> None:
    """setuptools is imported by torch.compile; it refuses to work with the standard library's distutils."""
    code = """
import os, setuptools, sys
from lrc_edge.errors import UserError
from lrc_edge.targets.devices import emulation
os.environ["PATH"] = "/nothing"
try:
    emulation.KIT.install(print)
except UserError:
    sys.modules.pop("distutils", None)
import distutils
assert "_distutils" in distutils.__file__
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True,
                          env={**os.environ, "LRC_EDGE_CACHE": str(tmp_path)})
    assert done.returncode == 0, done.stderr
