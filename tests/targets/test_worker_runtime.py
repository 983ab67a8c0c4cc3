"""A runtime that crashes, hangs or runs out of memory costs its own rows; the proof, and what started it, go on."""
from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sabotage import AMX_CRASH, before_decode, sabotage
from test_worker import RUNTIMES, alive, export
from tiny_models import make_tiny

from lrc_edge.checkpoint import DenseCheckpoint
from lrc_edge.export.gguf.to_gguf import export_gguf
from lrc_edge.targets.proof.reference import Reference
from lrc_edge.targets.runtimes import llama_probe, worker_runtime
from lrc_edge.targets.runtimes.llama_probe import ExtraBuffers, extra_buffers
from lrc_edge.targets.runtimes.table import native_command
from lrc_edge.targets.runtimes.worker import WorkerFailed
from lrc_edge.targets.runtimes.worker_runtime import WorkerRuntime

ROWS = np.random.default_rng(0).integers(0, 512, (3, 40))


@pytest.fixture(scope="module")
def files(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return export(tiny_llama, tmp_path_factory.mktemp("files"))


@pytest.fixture
def fresh_probe() -> Any:
    """Whatever this process knows of the extra buffers is forgotten, before and after."""
    extra_buffers.cache_clear()
    yield
    extra_buffers.cache_clear()


def opened(name: str, files: dict[str, Path]) -> WorkerRuntime:
    return WorkerRuntime(name, files[name], n_ctx=64, threads=1, n_params=100_000)


# Answers


@pytest.mark.parametrize("name", RUNTIMES[:2])
def test_logits_are_the_models(name: str, tiny_llama: Path, files: dict[str, Path]) -> None:
    """Of several rows at once, of chosen positions, in every mode."""
    reference = Reference(DenseCheckpoint.open(tiny_llama).model())
    expected = np.stack([reference.prefill(row) for row in ROWS])
    with opened(name, files) as runtime:
        np.testing.assert_allclose(runtime.prefill(ROWS), expected, atol=1e-4)
        np.testing.assert_allclose(runtime.decode(ROWS[:1]), expected[:1], atol=1e-4)
        runtime.context(40, n_rows=3)
        np.testing.assert_allclose(runtime.decode(ROWS), expected, atol=1e-4)
        runtime.context(64)
        for ask in (runtime.prefill, runtime.decode):
            np.testing.assert_allclose(ask(ROWS, [3, 17, 39]), expected[:, [3, 17, 39]], atol=1e-4)
        assert runtime.rows_at_once(40) == 8 and runtime.rows_at_once(1 << 19) == 2


@pytest.mark.parametrize("name", RUNTIMES[:2])
def test_rows_longer_than_a_part(name: str, tmp_path: Path) -> None:
    """More tokens than a runtime reads in one call, positions on both sides of its border."""
    model = make_tiny(tmp_path / "model", max_position_embeddings=1024)
    row = np.random.default_rng(1).integers(0, 512, 600)
    positions = [0, 100, 510, 511, 512, 513, 599]
    expected = Reference(DenseCheckpoint.open(model).model()).prefill(row, positions)
    with WorkerRuntime(name, export(model, tmp_path)[name], 600, 1, 100_000) as runtime:
        for ask in (runtime.prefill, runtime.decode):
            np.testing.assert_allclose(ask(row[None], positions)[0], expected, atol=2e-4)


@pytest.mark.parametrize("cache", ["f16", "q8_0", "q4_0"])
def test_quantized_caches_round(cache: str, tmp_path: Path) -> None:
    model = make_tiny(tmp_path / "model", head_dim=32)
    file = export(model, tmp_path)["llama.cpp"]
    expected = Reference(DenseCheckpoint.open(model).model()).prefill(ROWS[0])
    with WorkerRuntime("llama.cpp", file, 64, 1, 100_000) as runtime:
        runtime.open()
        runtime.context(64, cache=cache)
        error = np.abs(runtime.prefill(ROWS[:1])[0] - expected).mean()
        runtime.context(64)
        exact = np.abs(runtime.prefill(ROWS[:1])[0] - expected).mean()
    low, high = {"f16": (1e-6, 1e-2), "q8_0": (1e-4, 0.05), "q4_0": (3e-3, 1.0)}[cache]
    assert exact < 1e-5 < error and low < error < high


# Failures


@pytest.mark.parametrize(("number", "words"), [
    ("SIGSEGV", "segmentation fault during prefill (signal SIGSEGV)"),
    ("SIGABRT", "aborted during prefill (signal SIGABRT)"),
    ("SIGILL", "illegal instruction during prefill (signal SIGILL)")])
def test_a_crash_in_one_stage_leaves_the_others(number: str, words: str, files: dict[str, Path], tmp_path: Path,
                                                monkeypatch: pytest.MonkeyPatch, fresh_probe: Any) -> None:
    """Prefill crashes each time it is asked; decode, by another worker, answers."""
    sabotage(tmp_path, before_decode(f"if batch.n_tokens >= 2: die('{number}')"), monkeypatch)
    with opened("llama.cpp", files) as runtime:
        for _ in range(2):
            with pytest.raises(WorkerFailed) as failed:
                runtime.prefill(ROWS)
            assert str(failed.value) == f"llama.cpp, prefill: {words}"
        assert runtime.decode(ROWS[:1]).shape == (1, 40, 512)
        assert runtime.tokenize(["a"])


def test_a_hang_is_waited_for_once(files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                   fresh_probe: Any) -> None:
    """As long as the work could take on a slow machine, and the worker is not asked again."""
    sabotage(tmp_path, before_decode("if batch.n_tokens >= 2: time.sleep(600)"), monkeypatch)
    monkeypatch.setattr(llama_probe, "SECONDS", 3.0)
    with opened("llama.cpp", files) as runtime:
        runtime.open()
        monkeypatch.setattr(worker_runtime, "BASE_SECONDS", 2.0)
        for ask in (lambda: runtime.prefill(ROWS), lambda: runtime.tokenize(["a"])):
            with pytest.raises(WorkerFailed, match=r"^llama.cpp, prefill: no answer to prefill within 2 s"):
                ask()


def test_a_file_that_does_not_open_is_asked_once(files: dict[str, Path], tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(files["llama.cpp"].read_bytes()[:5000])
    with WorkerRuntime("llama.cpp", broken, 64, 1, 100_000) as runtime:
        for ask in (lambda: runtime.prefill(ROWS), lambda: runtime.generate([1], 2, [])):
            with pytest.raises(WorkerFailed, match=r"^llama.cpp, open: .*broken.gguf: llama.cpp cannot load"):
                ask()


def test_too_little_memory_fails_the_row(files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                         fresh_probe: Any) -> None:
    sabotage(tmp_path, before_decode("""
        import resource
        used = int(open('/proc/self/statm').read().split()[0]) * os.sysconf('SC_PAGESIZE')
        resource.setrlimit(resource.RLIMIT_AS, (used + (8 << 20),) * 2)
        bytearray(64 << 20)
        """), monkeypatch)
    with opened("llama.cpp", files) as runtime, pytest.raises(WorkerFailed, match=r"llama.cpp, prefill: .*MemoryError"):
        runtime.prefill(ROWS)


def test_an_answer_of_the_wrong_shape_is_a_failure(files: dict[str, Path]) -> None:
    with opened("onnxruntime", files) as runtime:
        runtime.open()
        runtime.vocab_size = 511
        with pytest.raises(WorkerFailed, match=r"onnxruntime, prefill: logits of shape \[3, 40, 512\], need"):
            runtime.prefill(ROWS)


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel is asked for the parent's death")
def test_no_worker_outlives_a_killed_parent(files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
                                            ) -> None:
    """SIGKILL, which nobody can catch, in the middle of a request that would take ten minutes."""
    sabotage(tmp_path, before_decode(f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(600)"),
             monkeypatch)
    parent = subprocess.Popen([sys.executable, "-c", f"""if True:
        import numpy as np
        from pathlib import Path
        from lrc_edge.targets.runtimes import llama_probe
        llama_probe.SECONDS = 0.0
        from lrc_edge.targets.runtimes.worker_runtime import WorkerRuntime
        with WorkerRuntime("llama.cpp", Path({str(files['llama.cpp'])!r}), 64, 1, 100_000) as runtime:
            runtime.prefill(np.zeros((1, 8), int))
        """])
    deadline = time.monotonic() + 120
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert time.monotonic() < deadline and parent.poll() is None
        time.sleep(0.05)
    worker = int((tmp_path / "pid").read_text())
    assert alive(worker)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    while alive(worker) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(worker)


# The probe


def test_the_probe_finds_sound_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_probe: Any) -> None:
    """On this machine, whatever it is: sound, or crashing, and then it says so. The answer is kept, and believed."""
    monkeypatch.setenv("LRC_EDGE_CACHE", str(tmp_path))
    found = extra_buffers()
    assert found.usable or "llama.cpp #" in found.advice
    [kept] = tmp_path.glob("llama-probe-*.json")
    assert ExtraBuffers(**json.loads(kept.read_text())) == found
    kept.write_text(json.dumps({"usable": False, "why": "kept"}))
    extra_buffers.cache_clear()
    assert extra_buffers().why == "kept"
    kept.write_text("damaged")
    extra_buffers.cache_clear()
    assert extra_buffers() == found


def test_kernels_that_crash_are_not_used(files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                         fresh_probe: Any) -> None:
    """The probe finds the crash; the worker opens the file without the extra buffers, and everything works."""
    sabotage(tmp_path, AMX_CRASH, monkeypatch)
    found = extra_buffers()
    assert not found.usable and "SIGSEGV" in found.why and "#20824" in found.why
    assert "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16" in found.advice and "verified without them" in found.advice
    assert native_command("llama.cpp").argv[-1] == "--plain-buffers"
    with opened("llama.cpp", files) as runtime:
        assert runtime.prefill(ROWS).shape == (3, 40, 512)


def test_kernels_that_compute_nonsense_are_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_probe: Any
                                                    ) -> None:
    sabotage(tmp_path, AMX_CRASH.replace('die("SIGSEGV")', "batch.token[1] = 5"), monkeypatch)
    assert not extra_buffers().usable and "wrong numbers" in extra_buffers().advice


def test_a_library_that_never_works_proves_nothing_of_the_buffers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                                  fresh_probe: Any) -> None:
    """Nothing is concluded and nothing kept: the rows themselves will say what happens."""
    sabotage(tmp_path, before_decode("die('SIGSEGV')"), monkeypatch)
    assert extra_buffers().usable
    assert not list(tmp_path.glob("cache/*"))


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                        fresh_probe: Any) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("LRC_EDGE_CACHE", str(tmp_path / "file"))
    assert isinstance(extra_buffers(), ExtraBuffers)


def test_targets_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sabotage(tmp_path, AMX_CRASH, monkeypatch)
    command = [sys.executable, "-m", "lrc_edge.cli", "targets"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "#20824" in done.stdout and "-mno-amx-tile" in done.stdout


def test_chat_does_without_kernels_that_crash(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
                                              ) -> None:
    """Where llama-cpp-python's own class opens the file, in the process that talks."""
    [artifact] = export_gguf(DenseCheckpoint.open(tiny_llama), tmp_path / "gguf", ["q8_0"])
    sabotage(tmp_path / "fault", AMX_CRASH, monkeypatch)
    chat = [sys.executable, "-m", "lrc_edge.cli", "chat", str(tmp_path / artifact.path), "--max-tokens", "3"]
    done = subprocess.run(chat, input="Hello there\n", capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


# A whole export


@pytest.mark.parametrize(("code", "status"), [(before_decode("die('SIGSEGV')"), 1), (AMX_CRASH, 0)])
def test_an_export_survives(code: str, status: int, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
                            ) -> None:
    sabotage(tmp_path / "fault", code, monkeypatch)
    done = subprocess.run(
        [sys.executable, "-m", "lrc_edge.cli", "export", str(tiny_llama), "--out", str(tmp_path / "out"), "--formats",
         "gguf:f32,onnx:fp32", "--set", "parity.positions=128", "--set", "parity.row_len=64", "--set",
         "parity.generate_tokens=4", "--set", "export.calibration_tokens=0", "--set", "parity.long_rows=128"],
        capture_output=True, text=True, timeout=300, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert done.returncode == status, done.stdout + done.stderr
    assert not done.stderr, done.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    page = (tmp_path / "out" / "report.html").read_text()
    failed = [gate for gate in report["gates"] if not gate["passed"]]
    assert all(gate["artifact"].startswith("gguf/") and "SIGSEGV" in gate["why"] for gate in failed)
    assert {gate["passed"] for gate in report["gates"] if gate["artifact"].startswith("onnx/")} == {True}
    if status:
        assert {"prefill vs student", "decode vs student", "prefill at 128 tokens", "smoke generation"} <= {
            gate["name"] for gate in failed}
        assert "during prefill (signal SIGSEGV)" in page and "during prefill (signal SIGSEGV)" in done.stdout
    else:
        assert not failed and "#20824" in page and "-mno-amx-tile" in done.stdout and report["notes"]
