"""Errors that the command line prints as one line instead of a traceback."""
from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

from lrc_edge.figures import visible

_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS, errno.EPERM)
# What PyTorch, safetensors, tokenizers, onnxruntime and numpy write in errors of other types.
_NO_MEMORY = re.compile(r"can(?:no|')t allocate memory|failed to allocate memory|bad_alloc|not enough memory|"
                        r"can't start new thread|ThreadPoolBuildError|std::length_error|unable to allocate|"
                        r"could not (?:create|execute) a primitive$", re.IGNORECASE)  # the last: oneDNN
_NO_SPACE = re.compile(r"no space left on device|disk quota exceeded|file too large|\d+ requested and \d+ written",
                       re.IGNORECASE)


class UserError(Exception):
    """A mistake that the user can fix. Its text is one line: where, what was found, what is needed, what to do."""


def shortage(error: BaseException) -> str | None:
    """Return one line about a full or read-only disk or too little memory; None for any other error.

    A library's error may hide the system's error, so its causes are searched too.
    """
    seen: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in seen:
        if line := _shortage(cause):
            return line
        seen.append(cause)
        cause = cause.__cause__ or cause.__context__
    return None


def _shortage(error: BaseException) -> str | None:
    again = "then rerun the same command (finished stages are kept)"
    text = str(error)
    if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM or _NO_MEMORY.search(text):
        return (f"out of memory ({one_line(error)}); free memory, or lower train.micro_batch if this happened in "
                f"training, {again}")
    if isinstance(error, OSError) and error.errno in _DISK:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}; free disk space or fix permissions, {again}"
    if _NO_SPACE.search(text):
        return f"{one_line(error)}; free disk space, {again}"
    return None


@contextmanager
def quiet_panics() -> Iterator[None]:
    """Hold back what native code writes to stderr, and print it only if no exception is raised.

    A Rust library reports a panic twice: as an exception and in several lines on stderr.
    """
    stderr = os.dup(2)
    reading, writing = os.pipe()
    for end in (reading, writing):
        os.set_blocking(end, False)  # text that the pipe cannot hold is lost, but nothing blocks
    os.dup2(writing, 2)
    os.close(writing)
    panicked = True
    try:
        yield
        panicked = False
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        with os.fdopen(reading, "rb", buffering=0) as printed:
            text = printed.read() or b""
        if not panicked:
            os.write(2, text)


def one_line(error: object, longest: int = 200) -> str:
    """Return an error's text on one line of at most `longest` characters, control characters made visible.

    An error without a text gives the name of its type.
    """
    return visible(" ".join(str(error).split()))[:longest] or type(error).__name__
