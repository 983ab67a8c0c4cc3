"""Measure tokens/s, and joules per token, of artifacts on this machine's processor.

A build's files and the teacher's own GGUF are measured in the same run."""
from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lrc_edge.targets.energy import EnergyCounter
from lrc_edge.targets.runtimes.table import Start
from lrc_edge.targets.runtimes.worker import Worker

N_PROMPT, N_DECODE = 128, 64  # tokens read and written at each depth
DEPTH = 1024  # tokens in the cache before the second measurement, where the context has room for them
ROUNDS = 3  # each file once per round, so that a disturbance slows all of them; each file's best counts
RATES = ("prompt", "prefill", "decode")  # in tokens/s
ANSWERS = {"joules_of_first": 1, "joules_of_answer": 1 + N_DECODE}  # energy that is measured -> tokens of the answer
ENERGY_SECONDS = 0.5  # the counters advance once per millisecond: short answers are repeated


def depths(n_ctx: int) -> list[int]:
    """Return the tokens in the cache before each measurement: 0, and DEPTH or what fits; empty for a tiny context."""
    deep = min(DEPTH, n_ctx - N_PROMPT - N_DECODE - 1)
    return [0, deep] if deep > N_PROMPT else [0] if deep >= 0 else []


def measure(files: dict[str, tuple[Start, Path]], prompt: list[int], n_ctx: int, threads: int,
            progress: Callable[[str], None], energy: EnergyCounter | None = None) -> dict[str, list[dict[str, Any]]]:
    """Return name -> for each depth {depth, prompt, prefill, decode, joules}; None where it could not be measured.

    Rates are in tokens/s, `joules` per decoded token. `prompt`: at least depth + N_PROMPT ids. `energy`: what to read
    joules from. Raises WorkerFailed, EnergyUnavailable.
    """
    rounds: dict[str, dict[int, list[dict[str, float | None]]]] = {
        name: {depth: [] for depth in depths(n_ctx)} for name in files}
    for i in range(ROUNDS):
        for name, (start, path) in files.items():
            progress(f"speed of {name}, round {i + 1} of {ROUNDS}")
            with start(path.parent) as command, Worker(command) as worker:
                worker.ask("open", path=str(path.resolve()), n_ctx=n_ctx, threads=threads)
                for depth, found in rounds[name].items():
                    ids = prompt[:depth + N_PROMPT]
                    found.append(worker.ask("speed", ids=ids, n_prompt=N_PROMPT, n_decode=N_DECODE)
                                 | (_energy_of_answers(worker, ids, energy) if energy else {}))
    return {name: [{"depth": depth, **_best(found)} for depth, found in table.items()]
            for name, table in rounds.items()}


def _best(rounds: list[dict[str, float | None]]) -> dict[str, float | None]:
    """Return the highest rates, and the lowest joules per decoded token: an answer's less those of its first token."""
    rates = {key: max((x for row in rounds if (x := row[key])), default=None) for key in RATES}
    first, answer = (min((x for row in rounds if (x := row.get(key))), default=None) for key in ANSWERS)
    measured = first is not None and answer is not None and answer > first
    return rates | {"joules": (answer - first) / N_DECODE if measured else None}  # type: ignore[operator]


def _energy_of_answers(worker: Worker, ids: list[int], energy: EnergyCounter) -> dict[str, float | None]:
    """Return the joules of answers to the prompt: of one token, and of the tokens whose speed is measured."""
    return {key: _joules(worker, ids, n_tokens, energy) for key, n_tokens in ANSWERS.items()}


def _joules(worker: Worker, ids: list[int], n_tokens: int, energy: EnergyCounter) -> float | None:
    """Return the mean joules of a prompt and an answer of n_tokens; None if the runtime ends it earlier."""
    answer: list[int] = []
    n_answers, before, started = 0, energy.read(), time.monotonic()
    while n_answers == 0 or time.monotonic() - started < ENERGY_SECONDS:
        answer, n_answers = worker.ask("generate", ids=ids, n_tokens=n_tokens, stop=[])["ids"], n_answers + 1
    return energy.joules_since(before) / n_answers if len(answer) == n_tokens else None


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
