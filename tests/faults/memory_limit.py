"""A limit of the address space (RLIMIT_AS) from the beginning of one stage on.

Native code that cannot allocate may abort the process (std::bad_alloc in a thread, Rust's allocator, OpenMP). Python
cannot catch that: such deaths are reported by stage, and must not harm what was finished.
"""
from __future__ import annotations

import random
import resource
from pathlib import Path

from faults.bench import Bench
from faults.limits import limited_build
from faults.runs import Stage

LEAST, MOST = 2**16, 2**26  # bytes above what the process has as the stage begins; freed memory comes on top


def case(bench: Bench, rng: random.Random, folder: Path, stage: Stage) -> tuple[str, list[str]]:
    """(how the limited run ended, problems)."""
    more = int(LEAST * (MOST / LEAST) ** rng.random())
    ended, problems = limited_build(bench, folder / "out", stage, lambda: _limit(more), lambda: None)
    return f"status {ended.status} in {ended.last_stage}, {more / 2**20:.0f} MiB left", problems


def _limit(more: int) -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + more, hard))
