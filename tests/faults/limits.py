"""What full disks and too little memory share: a limit from the beginning of one stage, then the same command without.

The limited run must end by itself with one line and status 2 (1 where a runtime failed its row), keep what was
finished and leave nothing half-written; the next one must end in the bytes of the undisturbed build.
"""
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from faults.bench import STAGES, Bench
from faults.runs import Ended, Stage, artifacts, differences, finished_stages, half_written, run, unsound

IN_RUNTIMES = ("check", "teacher", "report", "device")  # from here on a runtime can fail, and with it a row


def limited_build(bench: Bench, out: Path, stage: Stage, limit: Callable[[], None], lift: Callable[[], None]
                  ) -> tuple[Ended, list[str]]:
    """Build with `limit` called in the child as `stage` begins; `lift`, then build again. (first run, problems)."""
    def note(name: Stage) -> None:
        if name == stage:
            limit()

    ended = run(bench.build(out, note=note))
    problems = _problems(ended, stage) + _left_behind(out, stage)
    lift()
    again = run(bench.build(out))
    if again.status:
        problems.append(f"without the limit: {again.told()}")
    elif different := differences(bench.expected, artifacts(out)):
        problems.append(f"without the limit: {different}")
    return ended, problems


def _problems(ended: Ended, stage: Stage) -> list[str]:
    """Of how the limited run ended; a death in native code is counted by the caller."""
    lines = ended.err.splitlines()
    problems = [f"still running: {orphan}" for orphan in ended.orphans]
    if ended.status == 2 and (len(lines) != 1 or not lines[0].startswith("lrc-edge: ")):
        problems.append(f"status 2 with {len(lines)} lines on stderr: {ended.told()}")
    elif ended.status in (0, 1, 3) and lines:
        problems.append(ended.told())
    elif ended.status == 1 and ended.last_stage not in IN_RUNTIMES:
        problems.append(f"status 1 in {stage}, where no gate is judged")
    elif ended.status not in (0, 1, 2, 3) and ended.status >= 0:
        problems.append(ended.told())
    return problems


def _left_behind(out: Path, stage: Stage) -> list[str]:
    problems = [f"left {name}" for name in half_written(out)]
    if wrong := unsound(out):
        problems.append(wrong)
    before = set(STAGES[:STAGES.index(stage)]) - {"report"}
    if lost := before - finished_stages(out):
        problems.append(f"lost {', '.join(sorted(lost))}")
    return problems
