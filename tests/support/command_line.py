"""The command line in a process of its own, forked from a server that has already imported the libraries.

The imports take most of the time of a small run. The server runs nothing else, so a process starts as a new one does.
"""
from __future__ import annotations

import atexit
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["lrc_edge.cli", "lrc_edge.pipeline.commands", "lrc_edge.train.hops",
                               "lrc_edge.train.loop.quantized_stage"])


def run(*args: object, timeout: float = 600, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run `lrc-edge` with these arguments. `env` adds variables, which must not matter to an import."""
    command = ["lrc-edge", *map(str, args)]
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("stdout", "stderr")]
        child = SERVER.Process(target=_main, args=(command, files, dict(os.environ) | dict(env or {}), os.getcwd()))
        child.start()
        child.join(timeout)
        if child.exitcode is None:
            child.kill()
            raise subprocess.TimeoutExpired(command, timeout)
        return subprocess.CompletedProcess(command, child.exitcode, *(file.read_text() for file in files))


def _main(command: list[str], files: list[Path], env: dict[str, str], folder: str) -> None:
    from lrc_edge.cli import main

    for file, stream in zip(files, (1, 2), strict=True):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), stream)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(folder)
    sys.argv = command
    try:
        main()
    finally:
        atexit._run_exitfuncs()  # which multiprocessing leaves out
