"""Progress on a terminal and in a log: share, remaining time, rate."""
from __future__ import annotations

import io
import re
from collections.abc import Callable

import pytest
from rich.console import Console

from lrc_edge import console as module
from lrc_edge.console import PLAIN_EVERY, running, stage_line


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """A clock that the test advances."""
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])

    def pass_time(seconds: float) -> None:
        now[0] += seconds

    return pass_time


def log() -> tuple[Console, Callable[[], list[str]]]:
    """A console that is not a terminal, and its lines so far."""
    file = io.StringIO()
    return Console(file=file, width=60), lambda: file.getvalue().splitlines()


def test_a_log_gets_share_remaining_time_and_rate(clock: Callable[[float], None]) -> None:
    console, lines = log()
    with running(console, "imatrix", 16_384, "tokens") as task:
        clock(50)  # the model is loaded
        task.update("", 0)
        clock(10)
        task.update("row 24 of 64", 6_144)
        clock(10)
        task.update("row 48 of [64]", 12_288)  # no markup
    assert lines() == ["  imatrix    0%", "  imatrix   38%  eta 0:17  614 tokens/s  row 24 of 64",
                       "  imatrix   75%  eta 0:07  614 tokens/s  row 48 of [64]"]


def test_a_log_gets_no_more_than_a_line_every_few_seconds(clock: Callable[[float], None]) -> None:
    console, lines = log()
    with running(console, "gguf", 100, "MB") as task:
        for done in range(100):
            clock(0.25)
            task.update("tensor", done)
    assert len(lines()) == 25 // PLAIN_EVERY and all("eta 0:" in line and "4 MB/s" in line for line in lines())


def test_an_estimate_may_be_corrected(clock: Callable[[float], None]) -> None:
    console, lines = log()
    with running(console, "check", 10.0) as task:
        task.update("first", 0)
        clock(60)
        task.update("second", 5.0)
        task.expect(25.5)
        clock(60)
        task.update("third", 10.0)
        task.expect(12.5, "rows")
        clock(60)
        task.update("fourth", 15.0)  # more than expected
    assert lines() == ["    check   50%  eta 1:00  second", "    check   39%  eta 3:06  third",
                       "    check  100%  eta 0:00  0.083 rows/s  fourth"]


def test_work_that_an_earlier_run_did_is_not_in_the_rate(clock: Callable[[float], None]) -> None:
    console, lines = log()
    with running(console, "train", 1000, "tokens") as task:
        clock(6)
        task.update("resumed", 800)
        clock(10)
        task.update("step", 900)
    assert lines() == ["    train   80%  resumed", "    train   90%  eta 0:10  10 tokens/s  step"]


def test_without_a_total_there_is_no_share_and_without_figures_only_the_detail(clock: Callable[[float], None]) -> None:
    console, lines = log()
    with running(console, "data", unit="tokens") as task:
        clock(6)
        task.update("reading")
        clock(6)
        task.update("reading", 0)
        clock(6)
        task.update("reading", 30_000)
    assert lines() == ["     data  reading", "     data  reading", "     data  5,000 tokens/s  reading"]


def test_a_terminal_shows_the_same_in_a_bar_and_the_remaining_time_runs_on(clock: Callable[[float], None]) -> None:
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=120)
    with running(console, "imatrix", 100, "rows") as task:
        task.update("first", 0)
        clock(10)
        task.update("[second]", 50)
        assert task.where() == " 50%  eta 0:10  5 rows/s"
        clock(4)
        assert task._live is not None
        task._live.refresh()
        assert task.where() == " 50%  eta 0:06  5 rows/s"
        clock(60)
        assert task.where() == " 50%  eta 0:00  5 rows/s"
        task.expect(200)
        task._live.refresh()
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", file.getvalue())
    assert " 50%  eta 0:06  5 rows/s [second]" in shown and " 25%  eta 0:00  5 rows/s [second]" in shown


def test_a_finished_stage_leaves_a_line() -> None:
    console, lines = log()
    stage_line(console, "imatrix", "importance of inputs on 16,384 tokens", 458.06)
    stage_line(console, "weights", "unchanged, nothing to do")
    assert lines() == ["  imatrix  importance of inputs on 16,384 tokens  (458.1 s)",
                       "  weights  unchanged, nothing to do"]
