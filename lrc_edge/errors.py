"""The exception that the command line prints as one line without a traceback, and other errors printed like it."""
from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

from lrc_edge.figures import visible

_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS, errno.EPERM)
# How PyTorch, safetensors, tokenizers, onnxruntime and numpy report the same without Python's types.
_NO_MEMORY = re.compile(r"can(?:no|')t allocate memory|failed to allocate memory|bad_alloc|not enough memory|"
                        r"can't start new thread|ThreadPoolBuildError|std::length_error|unable to allocate|"
                        r"could not (?:create|execute) a primitive$", re.IGNORECASE)  # oneDNN reports no more
_NO_SPACE = re.compile(r"no space left on device|disk quota exceeded|file too large|\d+ requested and \d+ written",
                       re.IGNORECASE)


class UserError(Exception):
    """A mistake that the user can fix. Its text is one line: where, what was found, what was needed, what to do."""


def shortage(error: BaseException) -> str | None:
    """Describe a full or write-protected disk or too little memory in one line; None for any other error.

    A library's error may hide the system's, so its causes are searched as well.
    """
    seen: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in seen:
        if told := _shortage(cause):
            return told
        seen.append(cause)
        cause = cause.__cause__ or cause.__context__
    return None


def _shortage(error: BaseException) -> str | None:
    kept = "finished stages are kept"
    text = str(error)
    if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM or _NO_MEMORY.search(text):
        return (f"out of memory ({one_line(error)}); {kept}: free some memory, or lower train.micro_batch if training "
                "needed it, then run the command again")
    if isinstance(error, OSError) and error.errno in _DISK:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}; {kept}: fix that, then run the command again"
    if _NO_SPACE.search(text):
        return f"{one_line(error)}; {kept}: free some disk space, then run the command again"
    return None


@contextmanager
def quiet_panics() -> Iterator[None]:
    """Print what native code writes to stderr only if no exception follows.

    A Rust library reports a panic twice: as an exception and in several lines on stderr.
    """
    stderr = os.dup(2)
    reading, writing = os.pipe()
    for end in (reading, writing):
        os.set_blocking(end, False)  # output that a pipe cannot hold is lost, but nothing blocks
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
