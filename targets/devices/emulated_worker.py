"""The variant of python_worker that emulation.py starts in the bare Python of an emulated aarch64 processor."""
from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lrc_edge.targets.runtimes.python_worker import PythonWorker, answer_requests


class EmulatedWorker(PythonWorker):
    """A PythonWorker on an emulated processor. `label`: the runtime's build and the processor."""

    def __init__(self, runtime: str, label: str):
        super().__init__(runtime)
        self._label = label

    def open(self, path: str, n_ctx: int, threads: int, cache: str = "f16") -> dict[str, Any]:
        detail = PREPARE[self._runtime_name]()
        return super().open(path, n_ctx, threads, cache) | {"label": self._label + detail}

    def memory(self) -> dict[str, Any]:
        return super().memory() | {"how": "VmHWM, the emulator included"}


class OlderLibrary(ctypes.CDLL):
    """A llama.cpp slightly older than its bindings: a missing function fails when it is called, not at import."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError as error:
            if not name.startswith("llama_"):
                raise
            why = str(error)

        def lacking(*_: Any) -> None:
            raise RuntimeError(why)
        return lacking


def llama_libraries() -> Path:
    """Import llama.cpp's bindings and return the folder of its libraries."""
    ctypes.CDLL = OlderLibrary  # type: ignore[misc]
    import llama_cpp

    return Path(llama_cpp.__file__).parent / "lib"


def load_backends(libraries: Path) -> None:
    """Load the best CPU backend for this processor, from a build with one for each generation of processors."""
    ctypes.CDLL(str(libraries / "libggml.so")).ggml_backend_load_all_from_path(os.fsencode(libraries))


def cpu_backend() -> str:
    """Return the name of the loaded CPU backend, such as libggml-cpu-armv8.2_2.so."""
    loaded = re.search(r"libggml-cpu-\S+", Path("/proc/self/maps").read_text())
    return loaded.group() if loaded else "no CPU backend"


def load_llama_cpp() -> str:
    load_backends(llama_libraries())
    return f", {cpu_backend()}"


# Runtime (a key of python_worker.OPEN) -> what prepares it and returns the end of its label.
PREPARE: dict[str, Callable[[], str]] = {"llama.cpp": load_llama_cpp, "onnxruntime": str, "onnxruntime-genai": str}


def main(runtime: str, label: str) -> None:
    answer_requests(EmulatedWorker(runtime, label))
