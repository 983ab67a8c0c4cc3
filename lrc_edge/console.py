"""Terminal output: one line per stage, with a live progress bar on a terminal and plain lines otherwise."""
from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import Task as Bar
from rich.text import Text

PLAIN_EVERY = 5.0  # seconds between lines if the output is not a terminal


class Listener(Protocol):
    """Receives the progress of long work: a Task, or QUIET."""

    def expect(self, total: float | None, unit: str | None = None) -> None:
        """Set the amount of work, and in which unit it is counted."""

    def update(self, detail: str, completed: float | None = None) -> None:
        """Report the current step, and how much of the work is complete."""


class Task:
    """One running stage. `update` shows share, remaining time and rate: "  42%  eta 1:10  1,234 tokens/s  detail".

    total: amount of work, in units of `unit` ("tokens", "MB"); without a unit it is an estimate, and no rate is shown.
    `expect` corrects it at any time. The rate is the average since the first update with `completed`: that amount was
    done earlier, by the run that this one resumes.
    """

    def __init__(self, console: Console, name: str, total: float | None = None, unit: str = ""):
        self.console, self.name, self.total, self.unit = console, name, total, unit
        self._shown = time.monotonic()
        self._began: tuple[float, float] | None = None  # time, completed
        self._now: tuple[float, float] | None = None
        self._live: Progress | None = None
        if console.is_terminal:
            self._live = Progress(SpinnerColumn(), TextColumn("[bold]{task.description:>9}"), BarColumn(24),
                                  TimeElapsedColumn(), _Where(self), TextColumn("{task.fields[detail]}", markup=False),
                                  console=console, transient=True)
            self._id = self._live.add_task(name, total=total, detail="")
            self._live.start()

    def expect(self, total: float | None, unit: str | None = None) -> None:
        """Set or correct the amount of work. unit: unchanged by default."""
        self.total, self.unit = total, self.unit if unit is None else unit
        if self._live is not None:
            self._live.update(self._id, total=total)

    def update(self, detail: str, completed: float | None = None) -> None:
        """Show `detail`; in a log every PLAIN_EVERY seconds at most. completed: part of `total`; default: unchanged."""
        now = time.monotonic()
        if completed is not None:
            self._now = now, completed
            self._began = self._began or self._now
        if self._live is not None:
            self._live.update(self._id, detail=detail, completed=completed)
        elif now - self._shown >= PLAIN_EVERY:
            self._shown = now
            line = "  ".join(part for part in (f"{self.name:>9}", self.where(), detail) if part)
            self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def where(self) -> str:
        """Return "42%  eta 1:10  1,234 tokens/s", as far as known. The remaining time counts down between updates."""
        if not self._began or not self._now:
            return ""
        (began, had), (then, completed) = self._began, self._now
        rate = (completed - had) / (then - began) if then > began else 0.0
        parts = []
        if self.total:
            parts.append(f"{min(1.0, completed / self.total):4.0%}")
            if rate > 0:
                eta = round(max(0.0, (self.total - completed) / rate - (time.monotonic() - then)))
                parts.append(f"eta {eta // 60}:{eta % 60:02}")
        if rate > 0 and self.unit:
            parts.append(f"{rate:,.0f} {self.unit}/s" if rate >= 10 else f"{rate:.2g} {self.unit}/s")
        return "  ".join(parts)

    def stop(self) -> None:
        if self._live is not None:
            self._live.stop()


class _Where(ProgressColumn):
    """`Task.where` in the live bar, drawn again several times a second."""

    def __init__(self, task: Task):
        super().__init__()
        self._task = task

    def render(self, task: Bar) -> Text:
        return Text(self._task.where())


class _Quiet:
    """Ignores all progress. Implements Listener."""

    def expect(self, total: float | None, unit: str | None = None) -> None:
        pass

    def update(self, detail: str, completed: float | None = None) -> None:
        pass


QUIET = _Quiet()


@contextmanager
def running(console: Console, name: str, total: float | None = None, unit: str = "") -> Iterator[Task]:
    task = Task(console, name, total, unit)
    try:
        yield task
    finally:
        task.stop()


def stage_line(console: Console, name: str, text: str, seconds: float | None = None) -> None:
    """Print the final line of a stage."""
    took = f"  ({seconds:.1f} s)" if seconds is not None else ""
    console.print(f"{name:>9}  {text}{took}", highlight=False, markup=False, soft_wrap=True)
