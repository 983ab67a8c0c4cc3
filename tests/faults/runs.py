"""Commands of lrc-edge in forked children that have imported everything, and what such a run left behind.

A fork costs milliseconds where an import of PyTorch costs seconds. The parent never computes, so it has no threads.
"""
from __future__ import annotations

import ctypes
import importlib
import json
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HEAVY = ("torch", "transformers", "safetensors.torch", "gguf", "llama_cpp", "onnx", "onnxruntime", "onnxruntime_genai",
         "pyarrow.parquet", "sentencepiece", "huggingface_hub", "rich.console", "lrc_edge.pipeline.commands",
         "lrc_edge.pipeline.target_commands", "lrc_edge.pipeline.device_checks", "lrc_edge.inspect.command",
         "lrc_edge.pipeline.stages", "lrc_edge.export.gguf.to_gguf", "lrc_edge.export.onnx.to_onnx",
         "lrc_edge.export.quantize.imatrix_file", "lrc_edge.export.fold", "lrc_edge.export.quantize.mixed_precision",
         "lrc_edge.export.quantize.sensitivity", "lrc_edge.train.loop.quantized_stage", "lrc_edge.train.data.stage",
         "lrc_edge.train.loop.stage", "lrc_edge.targets.proof.prove", "lrc_edge.targets.proof.reference",
         "lrc_edge.cli")
PR_SET_CHILD_SUBREAPER = 36
ORPHANS_LIVE = 5.0  # seconds that a killed run's children have to notice
BUG = 70  # exit status of an action of ours that raised; a command's traceback has status 1
LIBC = ctypes.CDLL(None, use_errno=True)

Stage = str
OnStage = Callable[[Stage], float | None]  # seconds until the kill, None for none


@dataclass(frozen=True)
class Ended:
    """How a run ended. status: the exit status, or minus the signal."""

    status: int
    out: str
    err: str
    seconds: float
    stages: tuple[tuple[Stage, float], ...] = ()  # each that began, and after how many seconds
    orphans: tuple[str, ...] = field(default=())  # command lines of children that outlived the run

    @property
    def last_stage(self) -> Stage:
        return self.stages[-1][0] if self.stages else "start"

    def told(self) -> str:
        """Status and the end of stderr, for a failure's line."""
        return f"status {self.status}: {' | '.join(self.err.strip().splitlines()[-3:])[-600:]}"


def import_everything() -> None:
    """What a command may import. A command's own imports then cost nothing."""
    for name in HEAVY:
        importlib.import_module(name)
    from lrc_edge.cli import _console

    _console()  # turns transformers' messages off, as every command does
    LIBC.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def lrc_edge(*argv: object) -> Callable[[], None]:
    """The command line with these arguments, to run in a child."""
    def action() -> None:
        from lrc_edge.cli import main

        sys.argv = ["lrc-edge", *map(str, argv)]
        main()

    return action


def run(action: Callable[[], None], *, on_stage: OnStage | None = None, kill_after: float | None = None,
        seconds: float = 300.0) -> Ended:
    """Fork, run `action`, wait. SIGKILL after `kill_after`, or when `on_stage` says so; a run that hangs ends as one
    that was killed by SIGALRM.

    Stages are noted only when `action` calls `watch_stages`.
    """
    sys.stdout.flush()
    outputs = [os.memfd_create("stdout"), os.memfd_create("stderr")]
    reading, writing = os.pipe()
    started, others = time.monotonic(), _children()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        _be_the_run(action, outputs, writing)
    os.close(writing)
    try:
        status, stages = _watch(pid, reading, started, on_stage, kill_after, seconds)
    finally:
        os.close(reading)
    out, err = (_text_of(descriptor) for descriptor in outputs)
    return Ended(status, out, err, time.monotonic() - started, tuple(stages), tuple(end_orphans(others)))


def _be_the_run(action: Callable[[], None], outputs: list[int], stages: int) -> None:
    status = BUG
    try:
        os.dup2(outputs[0], 1)
        os.dup2(outputs[1], 2)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # not a test runner's
        global _stages
        _stages = stages
        action()
        status = 0
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else int(bool(ended.code))
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(status)


_stages = -1  # in a child: where it writes the names of its stages


def watch_stages(note: Callable[[Stage], None] | None = None) -> None:
    """In a child: tell the parent, and `note`, of each stage that begins, and of "" when it has ended."""
    from lrc_edge.pipeline import check_stages, device_checks, stage

    def begins(stage: Stage) -> None:
        os.write(_stages, f"{stage}\n".encode())
        if note:
            note(stage)

    def watched(function: Callable[..., Any], name: Callable[..., Stage]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            begins(name(*args, **kwargs))
            result = function(*args, **kwargs)
            begins("")
            return result

        return call

    stage._run = watched(stage._run, lambda ran, *_: ran.name)
    check_stages.report = watched(check_stages.report, lambda *_: "report")
    device_checks._check_target = watched(device_checks._check_target, lambda *_, **named: "device")


def _watch(pid: int, stages: int, started: float, on_stage: OnStage | None, kill_after: float | None,
           seconds: float) -> tuple[int, list[tuple[Stage, float]]]:
    """(exit status or minus the signal, stages with their times)."""
    found: list[tuple[Stage, float]] = []
    ended = os.pidfd_open(pid)
    kill_at = started + kill_after if kill_after is not None else None
    listening = [ended, stages]
    try:
        while True:
            now = time.monotonic()
            limit = min(started + seconds, kill_at if kill_at is not None else started + seconds)
            ready, _, _ = select.select(listening, [], [], max(0.0, limit - now))
            if stages in ready:
                if not (text := os.read(stages, 4096).decode()):
                    listening.remove(stages)
                for name in text.splitlines():
                    found.append((name, time.monotonic() - started))
                    delay = on_stage(name) if on_stage and name else None
                    if delay is not None and kill_at is None:
                        kill_at = time.monotonic() + delay
            elif ended in ready:
                break
            elif time.monotonic() >= limit:
                hangs = kill_at is None or time.monotonic() < kill_at
                os.kill(pid, signal.SIGALRM if hangs else signal.SIGKILL)
                seconds += 60.0
                kill_at = time.monotonic() + 60.0
        _, status = os.waitpid(pid, 0)
        return os.waitstatus_to_exitcode(status), [(name, at) for name, at in found if name]
    finally:
        os.close(ended)


def _text_of(descriptor: int) -> str:
    with os.fdopen(descriptor, "rb") as file:
        file.seek(0)
        return file.read().decode(errors="replace")


def end_orphans(besides: Collection[int] = ()) -> list[str]:
    """Command lines of this process's children that are still there after a while; they are ended. `besides`: children
    that are none of the run's."""
    deadline = time.monotonic() + ORPHANS_LIVE
    while (pids := _living(besides)) and time.monotonic() < deadline:
        time.sleep(0.02)
    told = []
    for pid in pids:
        told.append(Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")[:200])
        os.kill(pid, signal.SIGKILL)
    while pids and _living(besides):
        time.sleep(0.02)
    return told


def _living(besides: Collection[int]) -> list[int]:
    """Children that have not ended; those that have are reaped."""
    return [pid for pid in _children() if pid not in besides and not os.waitpid(pid, os.WNOHANG)[0]]


def _children() -> list[int]:
    """Processes whose parent this is."""
    found = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            parent = (folder / "stat").read_text().rsplit(")", 1)[1].split()[1]
        except OSError:
            continue
        if int(parent) == os.getpid():
            found.append(int(folder.name))
    return found


# -- what a run leaves -------------------------------------------------------------------------------------------------

# The same bytes whoever builds, where and when. Left out: times, rates and paths (metrics, summaries, reports,
# build.json).
ARTIFACTS = ("data/*.np?", "train/trained.safetensors", "student/*", "student-q4_0/*", "imatrix/*", "sensitivity/*",
             "gguf/*", "onnx/**/*", "check/*.npz", "check/*.gguf")


def artifacts(out: Path) -> dict[str, str]:
    """Path -> SHA-256 of everything that must not depend on where, when and with what interruptions it was built."""
    from lrc_edge.artifact import sha256_of

    return {str(file.relative_to(out)): sha256_of(file) for pattern in ARTIFACTS
            for file in sorted(out.glob(pattern)) if file.is_file()}


def differences(expected: dict[str, str], found: dict[str, str]) -> str:
    """One line on what differs; empty where nothing does."""
    names = [f"{name} {'is missing' if name not in found else 'is new' if name not in expected else 'differs'}"
             for name in sorted(expected.keys() | found.keys()) if expected.get(name) != found.get(name)]
    return "; ".join(names)


def half_written(out: Path) -> list[str]:
    """What no run that ended by itself may leave: anything that is called partial."""
    return sorted(str(path.relative_to(out)) for path in out.rglob("*") if ".partial" in path.name)


def unsound(out: Path) -> str:
    """What is wrong with build.json and the outputs of the stages that it calls finished; empty when it is sound."""
    from lrc_edge.artifact import sha256_of

    manifest = out / "build.json"
    if not manifest.exists():
        return ""
    try:
        stages = json.loads(manifest.read_text())["stages"]
    except (ValueError, KeyError) as error:
        return f"build.json is damaged ({error!r})"
    for stage, record in stages.items():
        for name, digest in record["outputs"].items():
            if not (out / name).exists() or sha256_of(out / name) != digest:
                return f"{name} is not what stage {stage} left"
    return ""


def finished_stages(out: Path) -> set[str]:
    return set(json.loads((out / "build.json").read_text())["stages"]) if (out / "build.json").exists() else set()
