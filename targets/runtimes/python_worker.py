"""The worker of the runtimes that have Python bindings: llama.cpp, onnxruntime, onnxruntime-genai. See worker.py.

Run as `python -m lrc_edge.targets.runtimes.python_worker llama.cpp`. Of lrc-edge's dependencies it needs only numpy and
that runtime, so it also runs in a bare Python on an emulated processor.
"""
from __future__ import annotations

import json
import math
import os
import sys
import time
import traceback
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lrc_edge.errors import UserError

TIMING_SECONDS = 0.2
STEP_QUANTILE = 0.2  # of the seconds of a token: other work on the machine disturbs the slower ones
PLAIN_BUFFERS = "--plain-buffers"  # llama.cpp without its extra buffers (llama_probe.py)
NO_SPINNING = "--no-spinning"  # waiting threads sleep: less CPU time next to other work, but slower alone
OPS = ("open", "score", "generate", "tokenize", "speed", "memory", "context", "prefill", "decode", "read", "end_tokens",
       "chat")


def open_llama_cpp(path: Path, n_ctx: int, threads: int, cache: str, flags: Collection[str]) -> Any:
    from lrc_edge.targets.runtimes.llamacpp import LlamaCpp

    return LlamaCpp(path, n_ctx, threads, cache, extra_buffers=PLAIN_BUFFERS not in flags)


def open_onnxruntime(path: Path, n_ctx: int, threads: int, cache: str, flags: Collection[str]) -> Any:
    from lrc_edge.targets.runtimes.onnxrt import OnnxRuntime

    return OnnxRuntime(path, threads, spinning=NO_SPINNING not in flags)


def open_genai(path: Path, n_ctx: int, threads: int, cache: str, flags: Collection[str]) -> Any:
    from lrc_edge.targets.runtimes.ort_genai import OrtGenai

    return OrtGenai(path.parent.parent, f"{path.parent.name}/{path.name}", threads)


OPEN = {"llama.cpp": open_llama_cpp, "onnxruntime": open_onnxruntime, "onnxruntime-genai": open_genai}


class PythonWorker:
    """Answers the requests of worker.py for one of OPEN's runtimes. `flags`: PLAIN_BUFFERS, NO_SPINNING.

    Raises KeyError for another runtime.
    """

    def __init__(self, runtime: str, flags: Collection[str] = ()):
        self._runtime_name = runtime
        self._open_runtime = OPEN[runtime]
        self._flags = flags
        self._runtime: Any = None

    def open(self, path: str, n_ctx: int, threads: int, cache: str = "f16") -> dict[str, Any]:
        self._runtime = self._open_runtime(Path(path), n_ctx, threads, cache, self._flags)
        self._n_ctx = min(n_ctx, getattr(self._runtime, "n_ctx", n_ctx))
        return {"label": self._runtime.label, "n_ctx": self._n_ctx, "vocab_size": self._runtime.vocab_size}

    def context(self, n_ctx: int, n_rows: int, cache: str) -> dict[str, Any]:
        self._runtime.new_context(n_ctx, n_rows, cache)
        self._n_ctx = n_ctx
        return {}

    def prefill(self, rows: list[list[int]], positions: list[int] | None, fd: int) -> dict[str, Any]:
        return _send_logits((self._runtime.prefill(np.array(row), positions) for row in rows), fd)

    def decode(self, rows: list[list[int]], positions: list[int] | None, fd: int) -> dict[str, Any]:
        if positions is None and len(rows) > 1:
            return _send_steps(self._runtime.decode_rows(np.array(rows)), len(rows[0]), fd)
        return _send_logits((self._runtime.decode(np.array(row), positions) for row in rows), fd)

    def read(self, row: list[int], positions: list[int], alone: list[int], fd: int) -> dict[str, Any]:
        return _send_logits(iter([self._runtime.read(np.array(row), positions, alone)]), fd)

    def end_tokens(self) -> dict[str, Any]:
        return {"ids": sorted(self._runtime.end_tokens)}

    def chat(self, messages: list[dict[str, str]], engine: str) -> dict[str, Any]:
        text, ids = self._runtime.render_chat(messages, engine)
        return {"text": text, "ids": ids}

    def score(self, ids: list[int], wanted: list[list[int]]) -> dict[str, Any]:
        logits_TV = self._runtime.prefill(np.array(ids))
        top = logits_TV.argmax(-1)
        # Row by row: a whole row's float64 log-softmax at 128k tokens of vocabulary would be the peak of memory.
        logprobs = [(row[columns].astype(np.float64) - _log_sum_exp(row)).tolist()
                    for row, columns in zip(logits_TV, wanted, strict=True)]
        return {"logprobs": logprobs, "argmax": top.tolist()}

    def generate(self, ids: list[int], n_tokens: int, stop: list[int]) -> dict[str, Any]:
        return {"ids": self._runtime.generate(ids, min(n_tokens, self._n_ctx - len(ids)), set(stop))}

    def tokenize(self, texts: list[str]) -> dict[str, Any]:
        return {"ids": [self._runtime.tokenize(text) for text in texts]}

    def speed(self, ids: list[int], n_prompt: int, n_decode: int) -> dict[str, Any]:
        """Measure tokens/s: of the whole prompt, of its last n_prompt tokens, and of the answer. None: not measurable,
        as where onnxruntime-genai ends at an end of text, however many tokens are requested."""
        depth = len(ids) - n_prompt
        self._timed(ids[:16], 2)  # pages in, threads started
        before = self._timed(ids[:depth], 1)[0] if depth else 0.0
        read, steps = self._timed(ids, 1 + n_decode)
        step = float(np.quantile(steps, STEP_QUANTILE)) if len(steps) > n_decode // 2 else None
        return {"prompt": len(ids) / read, "prefill": n_prompt / (read - before) if read > before else None,
                "decode": 1 / step if step else None}

    def _timed(self, ids: list[int], n_tokens: int) -> tuple[float, list[float]]:
        """Return the seconds to the first token of an answer, the least of those that fit into TIMING_SECONDS, and the
        seconds of every later token."""
        started, first, steps = time.perf_counter(), math.inf, []
        while first == math.inf or time.perf_counter() - started < TIMING_SECONDS:
            times = [time.perf_counter(), *(time.perf_counter() for _ in self._runtime.tokens(ids, n_tokens))]
            ended = times[1:2] or [time.perf_counter()]  # no token: the answer is an end of text
            first = min(first, ended[0] - times[0])
            steps += np.diff(times[1:]).tolist()
        return first, steps

    def memory(self) -> dict[str, Any]:
        return {"peak_bytes": peak_bytes(), "how": "VmHWM"}


def peak_bytes() -> int | None:
    """Return the largest resident set of this process; None if the kernel does not report it."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    return next((1024 * int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")),
                None)


def _send_logits(rows: Iterator[np.ndarray], fd: int) -> dict[str, Any]:
    """Write the logits (P, V) of each row to the file, starting at its beginning."""
    n_rows, shape = 0, ()
    for logits in rows:
        _write_logits(fd, logits, n_rows * logits.size)
        n_rows, shape = n_rows + 1, logits.shape
    return {"shape": [n_rows, *shape]}


def _send_steps(steps: Iterator[np.ndarray], n_steps: int, fd: int) -> dict[str, Any]:
    """Write the logits of rows that are decoded together: each step has (B, V), one position of every row.

    Written step by step: eight rows of 256 tokens with a vocabulary of 128k take 1 GB.
    """
    shape: tuple[int, ...] = ()
    for step, logits in enumerate(steps):
        shape = logits.shape
        for row, of_row in enumerate(logits):
            _write_logits(fd, of_row, (row * n_steps + step) * len(of_row))
    return {"shape": [shape[0], n_steps, shape[1]]}


def _write_logits(fd: int, logits: np.ndarray, at: int) -> None:
    """Write logits to the file. `at`: the number of values before them."""
    data = memoryview(np.ascontiguousarray(logits, dtype=np.float32)).cast("B")  # type: ignore[arg-type]
    offset = 4 * at
    while data:
        written = os.pwrite(fd, data, offset)
        data, offset = data[written:], offset + written


def _log_sum_exp(row_V: np.ndarray) -> float:
    row = row_V.astype(np.float64)
    largest = float(row.max())
    return largest + float(np.log(np.exp(row - largest).sum()))


def answer_requests(worker: PythonWorker) -> None:
    """Answer requests on the original stdout. Anything that runtimes print to stdout is sent to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    os.environ["GGML_NO_BACKTRACE"] = "1"  # the last line of llama.cpp's output is then why it aborted
    for line in sys.stdin:
        answers.write(json.dumps(answer(worker, line)) + "\n")
        answers.flush()


def answer(worker: PythonWorker, line: str) -> dict[str, Any]:
    try:
        request = json.loads(line)
        op = request.pop("op")
        if op not in OPS:
            raise ValueError(f"unknown request {op!r}; known: {', '.join(OPS)}")
        found: dict[str, Any] = getattr(worker, op)(**request)
    except UserError as error:
        return {"error": str(error)}
    except Exception as error:  # the answer is whatever the runtime raises; the traceback goes to stderr
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"}
    return found


if __name__ == "__main__":
    answer_requests(PythonWorker(sys.argv[1], sys.argv[2:]))
