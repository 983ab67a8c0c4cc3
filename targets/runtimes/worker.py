"""Run a runtime in its own process. Requests and answers are lines of JSON on its stdin and stdout.

A runtime may therefore be in another language, on an emulated processor or in a browser, and a crash is a result.
These are the requests, in their possible order (`op` and its fields -> fields of the answer, or {"error": one line}):

    open      path, n_ctx, threads       -> label (runtime and version), n_ctx (the actual one), vocab_size
    score     ids (T), wanted (T, K)     -> logprobs (T, K) of the wanted ids at each position, argmax (T)
    generate  ids, n_tokens, stop        -> ids, greedy; ends early at a stop id and where the context is full
    tokenize  texts                      -> ids (one list per text), special tokens added and parsed
    speed     ids, n_prompt, n_decode    -> prefill (of the last n_prompt ids) and decode after them, in tokens/s
    memory                               -> peak_bytes, how (the method of measurement)
    requests                             -> foreign (URLs that a page requested from another server)

The native Python workers, which verify a build's files, also answer these (python_worker.py):

    context   n_ctx, n_rows, cache       -> nothing; a new KV cache, of the type `cache` (llama.cpp only)
    prefill   rows (B, T), positions (P), fd    -> shape (B, P, V) of the float32 logits that it wrote to the file `fd`
    decode    the same                   -> the same, with one token at a time at each of the positions
    read      row (T), positions (P), alone, fd -> shape (1, P, V); both in one pass: tokens in `alone` are read alone
    end_tokens                           -> ids at which the runtime ends a generation
    chat      messages, engine           -> text and ids of a rendered conversation
"""
from __future__ import annotations

import ctypes
import json
import os
import resource
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from lrc_edge.errors import UserError

ANSWER_SECONDS = 600.0
PR_SET_PDEATHSIG = 1  # prctl(2)
DEATHS: dict[int, str] = {signal.SIGILL: "illegal instruction", signal.SIGSEGV: "segmentation fault",
                          signal.SIGBUS: "bus error", signal.SIGABRT: "aborted",
                          signal.SIGKILL: "killed (out of memory?)"}


class WorkerFailed(UserError):
    """The runtime did not answer: it crashed, took too long, or reported an error."""


@dataclass(frozen=True)
class Command:
    """The command that starts a worker. `env` is added to this process's environment."""

    argv: tuple[str, ...]
    env: dict[str, str] = field(default_factory=dict)


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Turn SIGTERM and SIGHUP into an exception, so that no worker outlives the block. Main thread only."""
    def end(number: int, frame: Any) -> None:
        sys.exit(128 + number)

    ours = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) == signal.SIG_DFL]
    for number in ours:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)


def _dies_with_parent() -> Callable[[], None]:
    """Return a function for the child, between fork and exec: the kernel then kills it if this process dies.

    This includes SIGKILL. The child writes no core file, because a crash is a result.
    """
    parent = os.getpid()
    prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None

    def prepare() -> None:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if prctl is not None:
            prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != parent:  # it died before the kernel was asked
                os._exit(1)
    return prepare


class Worker:
    """One running worker. Use it as a context manager: it never outlives the block, nor this process.

    `files`: descriptors that it inherits. Raises WorkerFailed.
    """

    def __init__(self, command: Command, files: Collection[int] = ()):
        self._log = tempfile.TemporaryFile()
        try:
            self._process = subprocess.Popen(command.argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0,
                                             stderr=self._log, env={**os.environ, **command.env},
                                             start_new_session=True, pass_fds=tuple(files),
                                             preexec_fn=_dies_with_parent())
        except OSError as error:
            self._log.close()
            raise WorkerFailed(f"{command.argv[0]}: cannot start it ({error.strerror})") from error
        assert self._process.stdin is not None and self._process.stdout is not None
        self._stdin, self._stdout = self._process.stdin.fileno(), self._process.stdout.fileno()
        os.set_blocking(self._stdin, False)  # a worker that hangs does not read either
        self._pending = b""

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def close(self) -> None:
        """Kill it and its children. Calling it again does nothing."""
        if self._log.closed:
            return
        self._kill()
        self._process.communicate()
        self._log.close()

    def ask(self, op: str, seconds: float = ANSWER_SECONDS, **fields: Any) -> dict[str, Any]:
        """Send one request and return the answer. Raises WorkerFailed; a worker that takes too long is killed."""
        deadline = time.monotonic() + seconds
        try:
            self._send(memoryview(json.dumps({"op": op, **fields}).encode() + b"\n"), deadline)
            line = self._receive_line(deadline)
        except TimeoutError:
            self._kill()  # a late answer would be taken for the next one's
            raise WorkerFailed(f"no answer to {op} within {seconds:.0f} s{self._last_words()}") from None
        except (BrokenPipeError, EOFError):
            raise self._dead(op) from None
        try:
            answer: dict[str, Any] = json.loads(line)
        except ValueError:
            raise WorkerFailed(f"its answer to {op} is not JSON: {line[:100]!r}") from None
        if "error" in answer:
            raise WorkerFailed(" ".join(str(answer["error"]).split()))
        return answer

    def _send(self, data: memoryview, deadline: float) -> None:
        while data:
            _, ready, _ = select.select([], [self._stdin], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError
            data = data[os.write(self._stdin, data):]

    def _receive_line(self, deadline: float) -> bytes:
        while b"\n" not in self._pending:
            if not select.select([self._stdout], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise TimeoutError
            if not (data := os.read(self._stdout, 1 << 20)):
                raise EOFError
            self._pending += data
        line, _, self._pending = self._pending.partition(b"\n")
        return line

    def _kill(self) -> None:
        try:
            os.killpg(self._process.pid, signal.SIGKILL)  # also what it started: a browser
        except ProcessLookupError:
            pass

    def _dead(self, op: str) -> WorkerFailed:
        try:
            status = self._process.wait(10)
        except subprocess.TimeoutExpired:
            return WorkerFailed(f"stopped answering at {op}{self._last_words()}")
        if status < 0:
            name = DEATHS.get(-status, "killed")
            return WorkerFailed(f"{name} during {op} (signal {signal.Signals(-status).name}){self._last_words()}")
        return WorkerFailed(f"ended during {op} with status {status}{self._last_words()}")

    def _last_words(self) -> str:
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").split("\n")
        said = [line.strip() for line in lines if line.strip()][-1:]
        return f": {said[0][:300]}" if said else ""
