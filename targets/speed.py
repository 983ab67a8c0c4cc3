"""Measure tokens/s of artifacts on this machine's processor, and of the teacher's own GGUF in the same run."""
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lrc_edge.targets.runtimes.table import Start
from lrc_edge.targets.runtimes.worker import Worker

N_PROMPT, N_DECODE = 128, 64  # tokens read and written at each depth
DEPTH = 1024  # tokens in the cache before the second measurement, where the context has room for them
ROUNDS = 3  # each file once per round, so that a disturbance slows all of them; each file's best counts


def depths(n_ctx: int) -> list[int]:
    """Return the tokens in the cache before each measurement: 0, and DEPTH or what fits; empty for a tiny context."""
    deep = min(DEPTH, n_ctx - N_PROMPT - N_DECODE - 1)
    return [0, deep] if deep > N_PROMPT else [0] if deep >= 0 else []


def measure(files: dict[str, tuple[Start, Path]], prompt: list[int], n_ctx: int, threads: int,
            progress: Callable[[str], None]) -> dict[str, list[dict[str, Any]]]:
    """Return name -> for each depth {depth, prefill, decode}, in tokens/s; None where it could not be measured.

    `prompt`: at least depth + N_PROMPT ids.
    """
    best: dict[str, dict[int, dict[str, float | None]]] = {name: {} for name in files}
    for i in range(ROUNDS):
        for name, (start, path) in files.items():
            progress(f"speed of {name}, round {i + 1} of {ROUNDS}")
            with start(path.parent) as command, Worker(command) as worker:
                worker.ask("open", path=str(path.resolve()), n_ctx=n_ctx, threads=threads)
                for depth in depths(n_ctx):
                    found = worker.ask("speed", ids=prompt[:depth + N_PROMPT], n_prompt=N_PROMPT, n_decode=N_DECODE)
                    known = best[name].setdefault(depth, found)
                    best[name][depth] = {key: max((x for x in (known[key], found[key]) if x), default=None)
                                         for key in found}
    return {name: [{"depth": depth, **rates} for depth, rates in table.items()] for name, table in best.items()}


def after_prompt(start: Start, path: Path, prompt: list[int], n_ctx: int, threads: int, progress: Callable[[str], None]
                 ) -> dict[str, float | None]:
    """Return tokens/s of reading this prompt (prompt) and of the answer (decode), and the peak of memory (peak_bytes).

    Rates are the best of ROUNDS. None where it could not be measured. Raises WorkerFailed.
    """
    best: dict[str, float | None] = {}
    for i in range(ROUNDS):
        progress(f"speed of {path.name} after {len(prompt):,} tokens, round {i + 1} of {ROUNDS}")
        with start(path.parent) as command, Worker(command) as worker:
            worker.ask("open", path=str(path.resolve()), n_ctx=n_ctx, threads=threads)
            found = worker.ask("speed", ids=prompt, n_prompt=len(prompt), n_decode=N_DECODE) | worker.ask("memory")
        best = {key: max((x for x in (best.get(key), found[key]) if x), default=None)
                for key in ("prompt", "decode", "peak_bytes")}
    return best
