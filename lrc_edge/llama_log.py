"""Capture llama.cpp's log: nothing is printed, and error lines are kept for the message of the next exception.

llama-cpp-python's own callback uses the log levels of an older ggml header: it prints warnings as errors and drops the
errors.
"""
from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import llama_cpp

_ERROR, _CONTINUED = 4, 5  # enum ggml_log_level in ggml.h
_errors: deque[str] = deque(maxlen=50)
_level = 0
_hear: Callable[[str], None] | None = None
_raised: list[BaseException] = []


@llama_cpp.llama_log_callback
def _collect(level: int, text: bytes, _: ctypes.c_void_p) -> None:
    global _level
    try:
        _level = _level if level == _CONTINUED else level
        if _level == _ERROR:
            _errors.append(text.decode(errors="replace"))
        if _hear is not None:
            _hear(text.decode(errors="replace"))
    except BaseException as error:  # ctypes would drop it; Ctrl-C is one, too
        _raised.append(error)


def listen() -> None:
    """Clear the collected errors and start collecting. Nothing of the log is printed."""
    _errors.clear()
    llama_cpp.llama_log_set(_collect, ctypes.c_void_p(0))


def errors() -> str:
    """Return the error text since listen(), on one line; "" if there was none."""
    return " ".join("".join(_errors).split())


@contextmanager
def heard_by(hear: Callable[[str], None]) -> Iterator[None]:
    """In the block, call `hear` with every piece of llama.cpp's log. An exception from `hear` is raised at the end."""
    global _hear
    _hear = hear
    _raised.clear()
    try:
        yield
    finally:
        _hear = None
    if _raised:
        raise _raised[0]
