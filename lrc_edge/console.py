"""What the terminal shows: one line a stage, a live bar where there is a terminal, plain lines where there is none."""
from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

PLAIN_EVERY = 5.0  # seconds between lines when the output is no terminal


class Task:
    """One running stage: `update` shows where it is."""

    def __init__(self, console: Console, name: str, total: int | None):
        self.console, self.name, self.total = console, name, total
        self._shown = time.monotonic()
        self._began: tuple[float, int] | None = None  # when it first said what was done, and what: none of it is ours
        self._live: Progress | None = None
        if console.is_terminal:
            self._live = Progress(SpinnerColumn(), TextColumn("[bold]{task.description:>9}"), BarColumn(24),
                                  TextColumn("{task.percentage:>3.0f}%"), TimeElapsedColumn(), TextColumn("eta"),
                                  TimeRemainingColumn(elapsed_when_finished=False), TextColumn("{task.fields[detail]}"),
                                  console=console, transient=True)
            self._id = self._live.add_task(name, total=total, detail="")
            self._live.start()

    def expect(self, total: int, unit: str = "") -> None:
        self.total = total
        if self._live is not None:
            self._live.update(self._id, total=total)

    def update(self, detail: str, completed: int | None = None) -> None:
        if self._began is None and completed is not None:
            self._began = time.monotonic(), completed
        if self._live is not None:
            self._live.update(self._id, detail=detail, completed=completed)
        elif time.monotonic() - self._shown >= PLAIN_EVERY:
            self._shown = time.monotonic()
            self.console.print(f"{self.name:>9}  {self._where(completed)}{detail}", highlight=False, markup=False,
                               soft_wrap=True)

    def _where(self, completed: int | None) -> str:
        if not self.total or not completed or not self._began:
            return ""
        started, had = self._began
        if completed == had:
            return f"{completed / self.total:4.0%}  "
        eta = (time.monotonic() - started) / (completed - had) * (self.total - completed)
        return f"{completed / self.total:4.0%}  eta {eta // 60:.0f}:{eta % 60:02.0f}  "

    def stop(self) -> None:
        if self._live is not None:
            self._live.stop()


@contextmanager
def running(console: Console, name: str, total: int | None = None) -> Iterator[Task]:
    task = Task(console, name, total)
    try:
        yield task
    finally:
        task.stop()


def stage_line(console: Console, name: str, text: str, seconds: float | None = None) -> None:
    """The line that a stage leaves behind."""
    took = f"  ({seconds:.1f} s)" if seconds is not None else ""
    console.print(f"{name:>9}  {text}{took}", highlight=False, markup=False, soft_wrap=True)
