"""llama.cpp and onnxruntime on emulated aarch64 processors say what they say here; what a processor lacks is told."""
from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from paths import ROOT
from tiny_models import make_tiny

from lrc_edge.checkpoint import DenseCheckpoint
from lrc_edge.errors import UserError
from lrc_edge.export.gguf.to_gguf import export_gguf
from lrc_edge.export.onnx.to_onnx import export_onnx
from lrc_edge.targets.devices import emulation
from lrc_edge.targets.devices.emulation import CPUS, KIT, command
from lrc_edge.targets.runtimes.worker import Command, Worker, WorkerFailed

CONTEXT = 512
# Runtime, encoding, and the limit of the mean KL. Where activations are quantized too, one step more or less makes this
# machine's own prefill and decode differ by 1e-4; onnxruntime quantizes them more coarsely for dotprod than for x86.
CASES = [("llama.cpp", "f32", 1e-8), ("llama.cpp", "q4_0", 2e-4), ("llama.cpp", "q8_0", 2e-4),
         ("llama.cpp", "q4_k_m", 2e-4), ("onnxruntime", "fp32", 1e-10), ("onnxruntime", "q4", 1e-2),
         ("onnxruntime-genai", "q4", 1e-2)]
BACKENDS = {"cortex-a53": "libggml-cpu-armv8.0_1.so", "cortex-a76": "libggml-cpu-armv8.2_2.so"}
IDS = np.random.default_rng(0).integers(0, 512, CONTEXT).tolist()
SEEN = range(7, CONTEXT, 8)  # positions that are compared
WANTED = [list(range(512)) if i in SEEN else [] for i in range(CONTEXT)]
TEXTS = ["Once upon a time", "  two  spaces\n", "naïve café 日本語 👩‍👩‍👧", "<|eot_id|> in text", ""]
targets = pytest.mark.targets


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Encoding -> file, of a model that is wide enough for the encodings' blocks."""
    assert KIT.missing() is None, "lrc-edge targets setup"
    out = tmp_path_factory.mktemp("emulated")
    checkpoint = DenseCheckpoint.open(make_tiny(out / "model", hidden_size=256, intermediate_size=256, head_dim=64,
                                                layers=1, max_position_embeddings=CONTEXT))
    artifacts = [*export_gguf(checkpoint, out / "gguf", ["f32", "q4_0", "q8_0", "q4_k_m"]),
                 *export_onnx(checkpoint, out / "onnx", ["fp32", "q4"])]
    return {artifact.encoding: out / artifact.path for artifact in artifacts}


def answers(start: Command, file: Path, reads_text: bool) -> dict[str, Any]:
    with Worker(start) as worker:
        found = worker.ask("open", path=str(file), n_ctx=CONTEXT, threads=1)
        found |= worker.ask("score", ids=IDS, wanted=WANTED)
        found["made"] = worker.ask("generate", ids=IDS[:-4], n_tokens=50, stop=[])["ids"]
        if reads_text:
            found["ids"] = worker.ask("tokenize", texts=TEXTS)["ids"]
        return found | worker.ask("memory")


@targets
@pytest.mark.parametrize(("runtime", "encoding", "limit"), CASES)
def test_emulated_processors_say_what_this_one_says(runtime: str, encoding: str, limit: float, files: dict[str, Path]
                                                    ) -> None:
    """A whole context at once: matrix kernels that single tokens do not reach are at work."""
    native = Command((sys.executable, "-m", "lrc_edge.targets.runtimes.python_worker", runtime))
    reads_text = runtime != "onnxruntime"
    here = answers(native, files[encoding], reads_text)
    for cpu in CPUS:
        there = answers(command(runtime, cpu), files[encoding], reads_text)
        p, q = (np.array([found["logprobs"][i] for i in SEEN]) for found in (here, there))
        divergence = float((np.exp(p) * (p - q)).sum(-1).mean())
        print(f"{encoding} in {there['label']}: KL {divergence:.2e}")
        assert divergence < limit
        assert np.mean(np.array(here["argmax"]) == np.array(there["argmax"])) > 0.9
        assert len(there["made"]) == len(here["made"]) == 4
        assert there.get("ids") == here.get("ids")
        assert (there["n_ctx"], there["vocab_size"]) == (CONTEXT, 512)
        assert f" on emulated {cpu} (aarch64 Linux, qemu-user " in there["label"] and "emulator" in there["how"]
        assert there["label"].endswith(BACKENDS.get(cpu, ".so") if runtime == "llama.cpp" else ")")


def with_program(start: Command, program: str) -> Command:
    """A worker's command with another program for its Python."""
    at = start.argv.index("-c") + 1
    return Command((*start.argv[:at], emulation.PATHS + program, *start.argv[at + 1:]), start.env)


FORCED = """
import ctypes
def load(libraries):
    cpu = ctypes.CDLL(str(libraries / "libggml-cpu-{}.so"))
    cpu.ggml_backend_init.restype = ctypes.c_void_p
    ctypes.CDLL(str(libraries / "libggml.so")).ggml_backend_register(ctypes.c_void_p(cpu.ggml_backend_init()))
emulated_worker.load_backends = load
emulated_worker.main(*sys.argv[4:])
"""


@targets
@pytest.mark.parametrize(("cpu", "build", "when"), [
    ("cortex-a53", "armv8.2_1", "score"),  # dotprod
    ("cortex-a76", "armv8.6_1", "open"),   # i8mm and SVE
])
def test_a_build_for_another_processor_is_an_illegal_instruction(cpu: str, build: str, when: str, tmp_path: Path,
                                                                 files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
                                                                 ) -> None:
    """llama.cpp's own choice among its builds is passed over. It is told at once, and leaves no core file."""
    monkeypatch.chdir(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (limits[1], limits[1]))
    try:
        with Worker(with_program(command("llama.cpp", cpu), FORCED.format(build))) as worker, \
                pytest.raises(WorkerFailed, match=rf"illegal instruction during {when} \(signal SIGILL\)"):
            worker.ask("open", seconds=60, path=str(files["q4_0"]), n_ctx=CONTEXT, threads=2)
            worker.ask("score", seconds=60, ids=IDS, wanted=WANTED)
    finally:
        resource.setrlimit(resource.RLIMIT_CORE, limits)
    assert list(tmp_path.iterdir()) == []


@targets
def test_the_same_build_runs_where_it_belongs(files: dict[str, Path]) -> None:
    with Worker(with_program(command("llama.cpp", "max"), FORCED.format("armv8.6_1"))) as worker:
        assert worker.ask("open", path=str(files["q4_0"]), n_ctx=CONTEXT, threads=2)["label"].endswith("armv8.6_1.so")
        assert len(worker.ask("score", ids=IDS, wanted=WANTED)["argmax"]) == CONTEXT


@targets
@pytest.mark.parametrize(("runtime", "encoding"), [("llama.cpp", "q4_0"), ("onnxruntime", "fp32")])
def test_a_file_that_is_cut_is_a_line(runtime: str, encoding: str, files: dict[str, Path], tmp_path: Path
                                      ) -> None:
    cut = tmp_path / files[encoding].name
    cut.write_bytes(files[encoding].read_bytes()[:2000])
    with Worker(command(runtime, "cortex-a76")) as worker, pytest.raises(WorkerFailed, match="load") as failed:
        worker.ask("open", path=str(cut), n_ctx=CONTEXT, threads=1)
    assert str(cut) in str(failed.value) and "\n" not in str(failed.value)


DEFAULTS = """
def defaults(llama_cpp):
    made = [llama_cpp.llama_model_default_params(), llama_cpp.llama_context_default_params()]
    values = [(name, getattr(params, name)) for params in made for name, _ in params._fields_]
    return [[name, value] for name, value in values if isinstance(value, (int, float))]
"""


@targets
def test_the_bindings_are_the_librarys(files: dict[str, Path]) -> None:
    """Structures have the same fields at the same places, so the library's defaults read the same."""
    program = DEFAULTS + ("emulated_worker.llama_libraries(); import json, llama_cpp\n"
                          "print(json.dumps(defaults(llama_cpp)))")
    done = subprocess.run(with_program(command("llama.cpp", "max"), program).argv, capture_output=True, text=True)
    namespace: dict[str, Any] = {}
    exec(DEFAULTS, namespace)
    here = namespace["defaults"](llama_cpp)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == here and len(here) > 30


# Without the kit


def test_the_kit_has_the_versions_of_everything_else() -> None:
    constraints = (ROOT / "constraints.txt").read_text().split("\n")
    for pin in (*emulation.WHEELS, f"llama_cpp_python=={emulation.LLAMA_CPP_PYTHON}"):
        assert pin in constraints


def test_a_kit_that_is_not_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LRC_EDGE_CACHE", str(tmp_path))
    assert KIT.missing() == "aarch64 emulation is not installed"
    assert str(KIT.folder) in KIT.plan()[-1] and list(tmp_path.iterdir()) == []


def test_an_unknown_processor() -> None:
    with pytest.raises(UserError, match=r"cortex-m0: .* choose among cortex-a53, cortex-a76, max"):
        command("llama.cpp", "cortex-m0")
