"""SIGKILL: at the n-th write of a stage, some time after a stage began, anywhere, and while Python still imports.

A case is one build that is killed up to once in every stage, then left alone. It must end in the bytes of the
undisturbed one. Every other case begins on a finished build of another seed, whose files are replaced.
"""
from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from faults.bench import STAGES, Bench, on_write
from faults.runs import Ended, Stage, artifacts, differences, end_orphans, half_written, run, unsound

PER_CASE = len(STAGES) + 2  # one in each stage, one while Python imports, one anywhere
IMPORTS, ANYWHERE = "imports", "anywhere"
INSTANT = 0.05  # seconds: a stage that is over sooner is killed at one of its writes


def cases(kills: int) -> list[int]:
    """The number of kills of each case."""
    return [PER_CASE] * (kills // PER_CASE) + [kills % PER_CASE] * (kills % PER_CASE > 0)


def case(bench: Bench, rng: random.Random, folder: Path, number: int, kills: int) -> tuple[list[str], Counter[Stage]]:
    """(what went wrong, kills in each stage)."""
    out, wrong, landed = folder / "out", list[str](), Counter[Stage]()
    if number % 2:
        shutil.copytree(bench.built, out)
        ended = run(bench.build(out, "--set", "train.seed=1"))
        if ended.status:
            return [f"the older build failed: {ended.told()}"], landed
    places = [IMPORTS, *STAGES, ANYWHERE]
    for place in sorted(rng.sample(range(len(places)), kills)):
        where, problems = _kill(bench, rng, out, places[place])
        landed[where] += 1
        wrong += [f"killed in {where}: {problem}" for problem in problems]
    ended = run(bench.build(out))
    if ended.status:
        wrong.append(f"the last run: {ended.told()}")
    elif different := differences(bench.expected, artifacts(out)) or unsound(out) or ", ".join(half_written(out)):
        wrong.append(f"after {kills} kills: {different}")
    return wrong, landed


def _kill(bench: Bench, rng: random.Random, out: Path, place: str) -> tuple[Stage, list[str]]:
    """Start the build, kill it at `place` or, where that is done already, in a later stage."""
    if place == IMPORTS:
        return IMPORTS, _kill_imports(bench, rng, out)
    ended = _killed_build(bench, rng, out, place)
    if not ended.status:  # it ended before; the device is checked in every run
        ended = _killed_build(bench, rng, out, "device")
    problems = [unsound(out)] if unsound(out) else []
    problems += [f"still running: {orphan}" for orphan in ended.orphans]
    if ended.status != -signal.SIGKILL:
        problems.append(ended.told() if ended.status else "was not killed")
    return ended.last_stage, problems


def _killed_build(bench: Bench, rng: random.Random, out: Path, place: str) -> Ended:
    if place == ANYWHERE:
        return run(bench.build(out), kill_after=rng.uniform(0, bench.whole_seconds))
    if bench.seconds[place] < INSTANT or rng.random() < 0.5:
        return _kill_at_write(bench, rng, out, place)
    delay, first = rng.uniform(0, bench.seconds[place]), STAGES.index(place)
    return run(bench.build(out), on_stage=lambda stage: delay if STAGES.index(stage) >= first else None)


def _kill_at_write(bench: Bench, rng: random.Random, out: Path, place: Stage) -> Ended:
    first, left, armed = STAGES.index(place), rng.randrange(max(1, bench.writes[place])), False

    def note(stage: Stage) -> None:
        nonlocal armed
        armed = armed or (stage != "" and STAGES.index(stage) >= first)

    def count() -> None:
        nonlocal left
        if armed:
            left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def action() -> None:
        on_write(count)
        bench.build(out, note=note)()

    return run(action)


def _kill_imports(bench: Bench, rng: random.Random, out: Path) -> list[str]:
    """The command as a shell starts it."""
    process = subprocess.Popen([sys.executable, "-m", "lrc_edge", *bench.arguments(out)], stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    time.sleep(rng.uniform(0, 5))
    process.kill()
    process.wait()
    return [f"still running: {orphan}" for orphan in end_orphans()]
