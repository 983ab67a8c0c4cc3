"""Find out whether llama.cpp's extra buffers (AMX tiles, repacked rows) work on this processor.

If gcc before 14.1 compiled llama.cpp, its AMX kernels read a tile configuration that the compiler never stored, and
crash (llama.cpp #20824). Child processes test this once for each machine and build of the library: they decode some
tokens of a tiny quantized model with the extra buffers and without. The result is kept in the cache.
"""
from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import signal
import subprocess
import sys
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


@dataclass(frozen=True)
class ExtraBuffers:
    """Whether llama.cpp may use its extra buffers here. If not, `why` is a clause for the report."""

    usable: bool
    why: str = ""

    @property
    def advice(self) -> str:
        """The problem, what was done about it, and how to fix the library."""
        return "" if self.usable else f"{self.why}: verified without them; to fix the library: {REBUILD}"


@functools.cache
def extra_buffers() -> ExtraBuffers:
    """Return the cached result, or run the probe. Without llama-cpp-python there is nothing to probe."""
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
    """Run both variants in child processes. Returns None if the model fails even without the extra buffers."""
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
    """Return the logits of the tiny model, or how the child process ended."""
    command = [sys.executable, "-P", "-m", "lrc_edge.targets.runtimes.llama_probe_child", str(int(use_extra))]
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
    """In the block, models are opened with the extra buffers only if these work.

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
    """Return a digest of the processor and the library's files."""
    files = sorted((package / "lib").glob("*"))
    parts = [_cpu(), *(f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _cpu() -> str:
    """Return the processor's name and instruction sets."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join(dict.fromkeys(line for line in lines if line.startswith(wanted)))
