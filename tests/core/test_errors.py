"""A full disk and too little memory are one line, whichever library reports them; other errors keep their traceback."""
from __future__ import annotations

import contextlib
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from lrc_edge.errors import quiet_panics, shortage

MUCH = 10**15


def write_array(file: Path) -> None:
    with file.open("wb") as handle:
        np.save(handle, np.zeros(10**6))


@pytest.mark.parametrize("write", [
    lambda file: file.write_text("x" * 10**6), lambda file: np.zeros(10**6).tofile(file), write_array,
    lambda file: np.savez(file, x=np.zeros(10**6)), lambda file: save_file({"x": torch.zeros(10**6)}, file)])
def test_a_full_disk(write: Callable[[Path], None], tmp_path: Path) -> None:
    """The system refuses to write past a limit on the file size, as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
        with pytest.raises(Exception) as caught:  # of any type: that is the point
            write(tmp_path / "file")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    told = shortage(caught.value)
    assert told is not None and "finished stages are kept" in told and "\n" not in told
    assert "memory" not in told


@pytest.mark.parametrize("allocate", [lambda: bytearray(MUCH), lambda: np.zeros(MUCH), lambda: torch.zeros(MUCH)])
def test_too_little_memory(allocate: Callable[[], object]) -> None:
    with pytest.raises((MemoryError, RuntimeError)) as caught:
        allocate()
    told = shortage(caught.value)
    assert told is not None and told.startswith("out of memory (") and "\n" not in told


def test_a_cause_counts_and_a_bug_does_not() -> None:
    try:
        try:
            raise MemoryError
        except MemoryError as error:
            raise ValueError("cannot read the tensor") from error
    except ValueError as error:
        assert shortage(error) is not None
    for bug in (ValueError("no"), KeyError("memory"), FileNotFoundError(2, "No such file", "x"), RuntimeError("")):
        assert shortage(bug) is None


def test_the_command_line_prints_one_line(tmp_path: Path) -> None:
    """The command line with a memory limit of 2 GiB."""
    code = ("import resource; resource.setrlimit(resource.RLIMIT_AS, (2**31, 2**31))\n"
            "from lrc_edge import cli\n"
            "cli.app = lambda: bytearray(2**32)\n"
            "cli.main()")
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 2 and ended.stderr.startswith("lrc-edge: out of memory"), ended.stderr
    assert ended.stderr.count("\n") == 1


def test_a_panic_is_one_exception_and_no_lines(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(BaseException) as caught, quiet_panics():
        with contextlib.suppress(BlockingIOError):  # more than a pipe holds
            os.write(2, b"thread panicked\n" * 10000)
        raise BaseException("panic")
    assert str(caught.value) == "panic" and capfd.readouterr().err == ""
    with quiet_panics():
        os.write(2, b"a warning\n")
    assert capfd.readouterr().err == "a warning\n"
