"""A disk that is full from the beginning of one stage on: a small tmpfs in a mount namespace of its own."""
from __future__ import annotations

import ctypes
import json
import os
import random
from pathlib import Path

from faults.bench import Bench
from faults.limits import limited_build
from faults.runs import LIBC, PR_SET_CHILD_SUBREAPER, Stage, run

CLONE_NEWNS, CLONE_NEWUSER = 0x00020000, 0x10000000
MS_REC, MS_PRIVATE = 0x4000, 0x40000
DISK = 64 * 2**20
PAGE = 4096
MOST_LEFT = 60  # pages: some stages write less, most write more


def reason_to_skip(folder: Path) -> str:
    """Why no disk can be mounted here; empty where one can."""
    ended = run(lambda: _mount(folder))
    return "" if ended.status == 0 else " ".join(ended.err.split("\n")[-2:]).strip()


def case(bench: Bench, rng: random.Random, folder: Path, stage: Stage) -> tuple[str, list[str]]:
    """(how the limited run ended, problems)."""
    left = PAGE * rng.choice((0, rng.randrange(MOST_LEFT)))
    found = folder / "found.json"

    def action() -> None:
        disk = folder / "disk"
        disk.mkdir()
        _mount(disk)
        LIBC.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        ballast = disk / "ballast"
        ended, problems = limited_build(bench, disk / "out", stage, lambda: _fill(ballast, left),
                                        lambda: ballast.unlink(missing_ok=True))
        found.write_text(json.dumps([f"status {ended.status} in {ended.last_stage}, {left} bytes left", problems]))

    ended = run(action)
    if ended.status:
        return "the harness failed", [ended.told()]
    how, problems = json.loads(found.read_text())
    return how, problems


def _fill(file: Path, left: int) -> None:
    """Take what is free, less `left` bytes."""
    with file.open("wb", buffering=0) as ballast:
        free = os.statvfs(file.parent)
        os.posix_fallocate(ballast.fileno(), 0, free.f_bavail * free.f_frsize)
        ballast.truncate(os.fstat(ballast.fileno()).st_size - left)


def _mount(folder: Path) -> None:
    """A tmpfs at `folder` that only this process and its children see; it goes with them. Raises OSError."""
    user, group = os.getuid(), os.getgid()
    if user == 0:
        _call("unshare", CLONE_NEWNS)
    else:
        _call("unshare", CLONE_NEWNS | CLONE_NEWUSER)
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    _call("mount", b"none", b"/", None, MS_REC | MS_PRIVATE, None)
    _call("mount", b"tmpfs", str(folder).encode(), b"tmpfs", 0, f"size={DISK}".encode())


def _call(name: str, *arguments: object) -> None:
    if getattr(LIBC, name)(*arguments):
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


