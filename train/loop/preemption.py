"""SIGTERM, which a machine sends before it is taken away: noted when it comes, obeyed between two steps."""
from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def sigterms(alone: bool) -> Iterator[list[int]]:
    """A list of the SIGTERMs so far, none of which ends the process while the block runs. Main thread only.

    Unless this process is `alone`, they do end it: several would have to agree on the step to stop after.
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
