"""Find out whether llama.cpp's extra buffers (AMX tiles, repacked rows) work on this processor.

When gcc before 14.1 builds them, its AMX kernels read a tile configuration that the compiler never stored, and crash
(llama.cpp #20824). Child processes test this once for each machine and build of the library: they decode some tokens of
a tiny quantized model with the extra buffers and without. The result is kept in the cache.
"""
from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import signal
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from lrc_edge.targets.devices.kits import cache_folder

SECONDS = 120.0  # then the probe counts as hung
LARGEST_ERROR = 0.05  # of the logits' standard deviation: 8-bit activations and another order of sums cost 0.01
BUILD_FLAGS = "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"
REBUILD = (f"CMAKE_ARGS='-DCMAKE_C_FLAGS=\"{BUILD_FLAGS}\" -DCMAKE_CXX_FLAGS=\"{BUILD_FLAGS}\"' "
           "pip install --force-reinstall --no-cache-dir --no-deps llama-cpp-python")
# The tiny model: rows that divide by every block, and enough of them for a tile.
WIDTH, VOCAB, N_TOKENS = 256, 64, 32


@dataclass(frozen=True)
class ExtraBuffers:
    """Whether llama.cpp may use its extra buffers here; if not, why: a clause for the report."""

    usable: bool
    why: str = ""

    @property
    def advice(self) -> str:
        """The problem, what was done about it, and how to fix the library."""
        return "" if self.usable else f"{self.why}: verified without them; to fix the library: {REBUILD}"


@functools.cache
def extra_buffers() -> ExtraBuffers:
    """The cached result, else the probe's. Without llama-cpp-python there is nothing to probe."""
    spec = find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        return ExtraBuffers(True)
    file = cache_folder() / f"llama-probe-{_digest(Path(spec.origin).parent)}.json"
    try:
        return ExtraBuffers(**json.loads(file.read_text()))
    except (OSError, ValueError, TypeError):
        pass
    found = probe()
    if found is None:  # no result to keep
        return ExtraBuffers(True)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f".{file.name}.{os.getpid()}")
        partial.write_text(json.dumps(asdict(found)) + "\n")
        partial.replace(file)
    except OSError:
        pass  # without a cache the next process probes again
    return found


def probe() -> ExtraBuffers | None:
    """Run both variants in child processes. None when the model does not run without the extra buffers either."""
    plain, extra = _run(False), _run(True)
    if not isinstance(plain, np.ndarray):
        return None
    if isinstance(extra, str):
        kernels = "AMX kernels" if "amx" in _cpu() else "kernels for this processor"
        return ExtraBuffers(False, f"the {kernels} of this llama.cpp crash on this machine ({extra}; "
                                   "llama.cpp #20824)")
    if not np.abs(plain - extra).max() < LARGEST_ERROR * plain.std():
        return ExtraBuffers(False, "the repacked kernels of this llama.cpp compute wrong numbers on this machine "
                                   "(llama.cpp #19561)")
    return ExtraBuffers(True)


def _run(use_extra: bool) -> np.ndarray | str:
    """Logits of the tiny model, or how the child ended."""
    command = [sys.executable, "-P", "-m", "lrc_edge.targets.runtimes.llama_probe", str(int(use_extra))]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return f"no answer within {SECONDS:.0f} s"
    if done.returncode < 0:
        return signal.Signals(-done.returncode).name
    try:
        return np.array(json.loads(done.stdout.decode().strip().splitlines()[-1]), dtype=np.float64)
    except (ValueError, IndexError):
        return f"status {done.returncode}"


@contextmanager
def sound_buffers() -> Iterator[None]:
    """Open models in this block with the extra buffers only where they work.

    For llama-cpp-python's own `Llama`, which has no parameter for it.
    """
    from llama_cpp import llama_cpp

    if extra_buffers().usable:
        yield
        return
    default = llama_cpp.llama_model_default_params

    def params() -> Any:
        found = default()
        found.use_extra_bufts = False
        return found

    llama_cpp.llama_model_default_params = params
    try:
        yield
    finally:
        llama_cpp.llama_model_default_params = default


def _digest(package: Path) -> str:
    """Digest of the processor and of the library's files."""
    files = sorted((package / "lib").glob("*"))
    parts = [_cpu(), *(f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _cpu() -> str:
    """The processor's name and its instruction sets."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join(dict.fromkeys(line for line in lines if line.startswith(wanted)))


# -- in the child process ----------------------------------------------------------------------------------------------


def tiny_model() -> bytes:
    """A GGUF of one llama layer in Q8_0 with random weights, written by hand: the gguf package may be missing."""
    rng = np.random.default_rng(0)
    metadata: list[tuple[str, Any]] = [
        ("general.architecture", "llama"), ("llama.context_length", N_TOKENS), ("llama.embedding_length", WIDTH),
        ("llama.block_count", 1), ("llama.feed_forward_length", WIDTH), ("llama.attention.head_count", 4),
        ("llama.attention.layer_norm_rms_epsilon", 1e-5), ("llama.vocab_size", VOCAB),
        ("tokenizer.ggml.model", "no_vocab")]
    matrices = {"token_embd.weight": VOCAB, "output.weight": VOCAB,
                **{f"blk.0.{name}.weight": WIDTH for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate",
                                                              "ffn_up", "ffn_down")}}
    vectors = ("output_norm.weight", "blk.0.attn_norm.weight", "blk.0.ffn_norm.weight")
    # Both encodings: the FFN in Q4_0, which x86 repacks, the rest in Q8_0, which only AMX and Arm do.
    tensors: list[tuple[str, tuple[int, ...], int, bytes]] = [
        (name, (WIDTH, rows), *(_q4_0(rng, rows) if "ffn" in name else _q8_0(rng, rows)))
        for name, rows in matrices.items()]
    tensors += [(name, (WIDTH,), 0, np.ones(WIDTH, np.float32).tobytes()) for name in vectors]
    header = struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(metadata))
    header += b"".join(_string(key) + _value(value) for key, value in metadata)
    offset = 0
    for name, shape, kind, data in tensors:
        header += _string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)
        offset += len(data)  # every length is a multiple of the alignment
    return header + bytes(-len(header) % 32) + b"".join(data for *_, data in tensors)


def _q8_0(rng: np.random.Generator, rows: int) -> tuple[int, bytes]:
    """ggml's number of the type, and blocks of 32 weights of about 1/16: a float16 scale, then 32 integers."""
    blocks = np.zeros(rows * WIDTH // 32, np.dtype([("scale", "<f2"), ("quants", "i1", 32)]))
    blocks["scale"] = 1 / 1024
    blocks["quants"] = rng.integers(-127, 128, (len(blocks), 32))
    return 8, blocks.tobytes()


def _q4_0(rng: np.random.Generator, rows: int) -> tuple[int, bytes]:
    """The same with integers of 4 bits, two in a byte."""
    blocks = np.zeros(rows * WIDTH // 32, np.dtype([("scale", "<f2"), ("quants", "u1", 16)]))
    blocks["scale"] = 1 / 64
    blocks["quants"] = rng.integers(0, 256, (len(blocks), 16))
    return 2, blocks.tobytes()


def _string(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def _value(value: Any) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", 8) + _string(value)
    return struct.pack("<If", 6, value) if isinstance(value, float) else struct.pack("<II", 4, value)


def main(use_extra: bool) -> None:
    from lrc_edge.targets.runtimes.llamacpp import LlamaCpp

    with tempfile.NamedTemporaryFile(suffix=".gguf") as file:
        file.write(tiny_model())
        file.flush()
        with LlamaCpp(file.name, n_ctx=N_TOKENS, threads=1, extra_buffers=use_extra) as runtime:
            logits = runtime.prefill(np.arange(N_TOKENS) % VOCAB)
    print(json.dumps(logits.ravel().tolist()))


if __name__ == "__main__":
    main(sys.argv[1] == "1")
