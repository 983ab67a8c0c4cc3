"""SIGTERM, which a preempted machine sends to all processes: the main one records it and acts between two steps."""
from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def sigterms(alone: bool) -> Iterator[list[int]]:
    """Yield a list that collects SIGTERMs. They do not end the process while the block runs. Main thread only.

    If the process is not `alone`, they do end it: several processes would have to agree on the step to stop after.
    """
    seen: list[int] = []
    if not alone:
        yield seen
        return

    def note(number: int, frame: Any) -> None:
        seen.append(number)

    before = signal.signal(signal.SIGTERM, note)
    try:
        yield seen
    finally:
        signal.signal(signal.SIGTERM, before)


def ignore_sigterm(worker: int) -> None:
    """Let a DataLoader worker live until its loader ends it; without rows, the step could not be finished."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
