"""llama.cpp's log: nothing is printed, error lines are kept for the message of the exception that follows.

llama-cpp-python's own callback takes ggml's levels for those of an older header: it prints warnings as errors and drops
the errors.
"""
from __future__ import annotations

import ctypes
from collections import deque

import llama_cpp

_ERROR, _CONTINUED = 4, 5  # enum ggml_log_level in ggml.h
_errors: deque[str] = deque(maxlen=50)
_level = 0


@llama_cpp.llama_log_callback
def _collect(level: int, text: bytes, _: ctypes.c_void_p) -> None:
    global _level
    _level = _level if level == _CONTINUED else level
    if _level == _ERROR:
        _errors.append(text.decode(errors="replace"))


def listen() -> None:
    """From here on collect errors, starting with none, and keep everything else off the terminal."""
    _errors.clear()
    llama_cpp.llama_log_set(_collect, ctypes.c_void_p(0))


def errors() -> str:
    """Error text since listen(), on one line; "" when there was none."""
    return " ".join("".join(_errors).split())
