"""A few of each fault that `make faults` makes by the hundred (tests/faults): kills, full disks, too little memory,
damaged inputs, the same bytes twice. The seed is printed; it and a case's number replay it."""
from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from faults import mutate, mutations, runs
from faults.bench import STAGES
from paths import ROOT


def faults(*options: object) -> str:
    """What `python -m faults` prints: a process of its own, for it forks before anything computes."""
    seed = os.environ.get("FAULTS_SEED", "1")  # `make faults` is for chance; a test that fails must fail again
    print(command := [sys.executable, "-m", "faults", "--seed", str(seed), *map(str, options)])
    ended = subprocess.run(command, cwd=ROOT / "tests", capture_output=True, text=True, timeout=1200,
                           env={**os.environ, "PYTHONPATH": str(ROOT / "tests" / "support")})
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def test_a_few_of_each() -> None:
    """`make faults` in small; the stages whose disk fills and whose memory ends change with the seed."""
    told = faults("--kills", 3, "--disk", 1, "--memory", 1, "--mutations", 30, "--same", 1)
    assert "all 34 cases passed" in told or ("SKIPPED: full disks" in told and "all 33 cases passed" in told)


def test_what_a_case_is_judged_by(tmp_path: Path) -> None:
    """The harness must see what it looks for: tracebacks, signals, chatter, silence, hangs, children left behind."""
    def problems(code: str, seconds: float = 60) -> str:
        return " ".join(mutations.judged(runs.run(lambda: exec(code), seconds=seconds)))

    assert problems("") == problems("raise SystemExit(3)") == ""
    assert problems("import sys; print('lrc-edge: no', file=sys.stderr); sys.exit(2)") == ""
    assert "status 2 without a word" in problems("raise SystemExit(2)")
    assert "traceback: ZeroDivisionError" in problems("1 / 0")
    assert "signal 9" in problems("import os; os.kill(os.getpid(), 9)")
    assert "signal 14" in problems("while True: pass", seconds=0.2)
    assert "2 lines on stderr" in problems("import sys; print('a\\nb', file=sys.stderr)")
    assert "status 4" in problems("raise SystemExit(4)")


def test_orphans_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "ORPHANS_LIVE", 0.2)
    runs.LIBC.prctl(runs.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        ended = runs.run(lambda: subprocess.Popen(["sleep", "1000"]) and None)
    finally:
        runs.LIBC.prctl(runs.PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
    assert ended.orphans == ("sleep 1000 ",)


def test_every_mutation_changes_its_file(tiny_llama: Path, tmp_path: Path) -> None:
    rng = random.Random(0)
    for name in ("config.json", "model.safetensors", "chat_template.jinja"):
        original = (tiny_llama / name).read_bytes()
        changed = set()
        for _ in range(60):
            (tmp_path / name).write_bytes(original)
            mutate.damage(rng, tmp_path / name)
            changed.add((tmp_path / name).read_bytes())
        assert len(changed - {original}) > 30, name


def test_every_stage_of_a_build_is_known() -> None:
    from lrc_edge.pipeline import stages

    assert STAGES == (*(stage.name for stage in stages.STAGES), "report", "device")
