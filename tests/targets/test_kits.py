"""`lrc-edge targets setup`: it says what it will do first, and what it cannot do; nothing is left half-installed."""
from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lrc_edge.errors import UserError
from lrc_edge.pipeline.target_commands import kits_named
from lrc_edge.targets.devices.kits import Apt, Pip

ABSENT = Apt("browser", ("some-browser", "some-fonts"), ("no-such-program-here",), "1 MB")


def setup(*names: str, cache: Path, path: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lrc_edge", "targets", "setup", *names]
    return subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL,
                          env={**os.environ, "LRC_EDGE_CACHE": str(cache), "PATH": path})


def test_without_rights_the_exact_command_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr("shutil.which", lambda name, **_: "/usr/bin/apt-get" if name == "apt-get" else None)
    with pytest.raises(UserError, match=r"run: sudo apt-get update && sudo apt-get install --yes "
                                        r"--no-install-recommends some-browser some-fonts$"):
        ABSENT.install(print)


def test_without_apt_the_programs_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name, **_: None)
    with pytest.raises(UserError, match="no apt-get; install one of no-such-program-here"):
        ABSENT.install(print)


def test_the_plan_comes_first_and_a_failure_leaves_nothing(tmp_path: Path) -> None:
    """No npm on the PATH, or one that cannot reach its registry."""
    done = setup("wllama", cache=tmp_path, path="/nowhere")
    assert done.returncode == 2 and "npm is not installed" in done.stderr and done.stderr.count("\n") == 1
    assert "npm install @wllama/wllama@" in done.stdout
    (tmp_path / "bin").mkdir()
    for name in ("npm", "node"):
        (tmp_path / "bin" / name).write_text("#!/bin/sh\necho no route to the registry >&2\nexit 1\n")
        (tmp_path / "bin" / name).chmod(0o755)
    done = setup("wllama", cache=tmp_path / "cache", path=f"{tmp_path / 'bin'}:/bin:/usr/bin")
    assert done.returncode == 2 and "no route to the registry" in done.stderr and done.stderr.count("\n") == 1
    assert list((tmp_path / "cache").iterdir()) == []


def test_names() -> None:
    assert {kit.name for kit in kits_named("browser-phone")} >= {"wllama", "chromium", "playwright"}
    assert kits_named("wllama")[0].name == "wllama"
    assert isinstance(kits_named("llama.cpp")[0], Pip) and kits_named("llama.cpp")[0].missing() is None
    with pytest.raises(UserError, match="did you mean raspberry-pi-5"):
        kits_named("raspberry-pi")
