"""`lrc-edge export` of a model of realistic size: time per stage, CPU time and memory of all its processes.

    python benchmarks/real_size.py --work WORK                        15 GB of disk, 10 GB of RAM, up to half an hour
    python benchmarks/real_size.py --work WORK --lrc-edge OLD/.venv/bin/lrc-edge --label before
    python benchmarks/real_size.py --work WORK --label same-positions --set parity.long_rows='[]' \
        --set parity.kv_cache_positions=1           about as many positions as version 0.1.0 compared

The student has random weights (random_student.py) and is made once, in --work. The measured command is a child process,
so the executable of any version can be measured. A run replaces an earlier run with the same label in --results. CPU
seconds cover the command and every process that it waited for. Memory is the largest sum of PSS over all its processes
(a page shared by n processes counts 1/n in each), sampled twice per second. It includes mapped parts of files.
"""
from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from random_student import SHAPES, make_student

RESULTS = Path(__file__).parent / "results" / "real_size"
FORMATS = "gguf:q4_0,onnx:q4"
SAMPLE_SECONDS = 0.5
STAGE = re.compile(r"^ *(\w+)  .*\((\d+\.\d+) s\)$")  # the line that a finished stage prints
PROC = Path("/proc")


@dataclass
class Run:
    """One measured command. Bytes and seconds; `stages` are in the order in which they ended."""

    label: str
    shape: str
    formats: str
    n_params: int
    float32_bytes: int  # the student's parameters in float32
    status: int
    wall: float
    user: float
    system: float
    peak_bytes: int  # PSS of all processes
    peak_anonymous_bytes: int  # the part that is not the content of a file
    largest_process_bytes: int  # VmHWM
    load: float  # average of the last minute, at the start
    machine: str
    stages: list[dict[str, Any]] = field(default_factory=list)  # name, seconds, peak_bytes


class Memory(threading.Thread):
    """Samples the memory of a process and all its descendants until `stop`."""

    def __init__(self, root: int):
        super().__init__(daemon=True)
        self.root, self.peak, self.peak_anonymous, self.largest = root, 0, 0, 0
        self._since_stage, self._ended = 0, threading.Event()

    def run(self) -> None:
        while not self._ended.wait(SAMPLE_SECONDS):
            total = anonymous = 0
            for pid in descendants(self.root):
                rollup, status = fields(PROC / str(pid) / "smaps_rollup"), fields(PROC / str(pid) / "status")
                total += rollup.get("Pss", 0)
                anonymous += rollup.get("Pss_Anon", 0)
                self.largest = max(self.largest, status.get("VmHWM", 0))
            self.peak, self._since_stage = max(self.peak, total), max(self._since_stage, total)
            self.peak_anonymous = max(self.peak_anonymous, anonymous)

    def stage_peak(self) -> int:
        """Return the peak since the last call."""
        peak, self._since_stage = self._since_stage, 0
        return peak

    def stop(self) -> None:
        self._ended.set()
        self.join()


def fields(file: Path) -> dict[str, int]:
    """Return the lines "Name: N kB" of a file in /proc, in bytes; {} if the process has ended."""
    try:
        text = file.read_text()
    except OSError:
        return {}
    return {name: int(kb) * 1024 for name, kb in re.findall(r"^(\w+):\s+(\d+) kB$", text, re.MULTILINE)}


def descendants(root: int) -> list[int]:
    """Return the process and all its running descendants."""
    children: dict[int, list[int]] = {}
    for stat in PROC.glob("[0-9]*/stat"):
        try:
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue
        if state != "Z":
            children.setdefault(int(parent), []).append(int(stat.parent.name))
    found = [root]
    for pid in found:
        found += children.get(pid, [])
    return found


def measure(command: list[str], heard: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """Run the command and pass each line that it prints to `heard`. Returns fields of Run."""
    load, started = os.getloadavg()[0], time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    memory = Memory(process.pid)
    memory.start()
    stages = []
    assert process.stdout is not None
    for line in process.stdout:
        heard(line.rstrip("\n"))
        if match := STAGE.match(line.rstrip("\n")):
            stages.append({"name": match[1], "seconds": float(match[2]), "peak_bytes": memory.stage_peak()})
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    wall = time.monotonic() - started
    memory.stop()
    return dict(status=process.returncode, wall=wall, user=usage.ru_utime, system=usage.ru_stime, load=load,
                peak_bytes=memory.peak, peak_anonymous_bytes=memory.peak_anonymous,
                largest_process_bytes=memory.largest, stages=stages)


def export_run(lrc_edge: Path, student: Path, out: Path, label: str, formats: str, settings: list[str]) -> Run:
    from lrc_edge.shape import ModelShape

    shape = ModelShape.from_config(json.loads((student / "config.json").read_text()), student.name)
    shutil.rmtree(out, ignore_errors=True)

    def show(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    try:
        found = measure([str(lrc_edge), "export", str(student), "--formats", formats, "--out", str(out),
                         *(word for one in settings for word in ("--set", one))], show)
    finally:
        shutil.rmtree(out, ignore_errors=True)
    return Run(label=label, shape=student.name, formats=formats, n_params=shape.n_params,
               float32_bytes=4 * shape.n_params, machine=machine(), **found)


def machine() -> str:
    """Return the processor, its number, and the system."""
    text = Path("/proc/cpuinfo").read_text()
    model = re.search(r"^model name\s*: (.*)$", text, re.MULTILINE)
    return f"{model[1] if model else platform.machine()}, {len(os.sched_getaffinity(0))} processors"


def table(runs: list[Run]) -> str:
    """Return Markdown with one column per run."""
    stages = list(dict.fromkeys(stage["name"] for run in runs for stage in run.stages))

    def stage_cell(run: Run, name: str) -> str:
        found = [stage for stage in run.stages if stage["name"] == name]
        return f"{found[-1]['seconds']:.1f} s, {found[-1]['peak_bytes'] / 1e9:.2f} GB" if found else ""

    cells: list[tuple[str, Callable[[Run], str]]] = [
        *((name, lambda run, name=name: stage_cell(run, name)) for name in stages),
        ("wall time", lambda run: f"{run.wall:.0f} s"),
        ("CPU time, user + system", lambda run: f"{run.user:.0f} + {run.system:.0f} s"),
        ("peak memory, all processes", lambda run: f"{run.peak_bytes / 1e9:.2f} GB, "
                                                   f"{run.peak_bytes / run.float32_bytes:.2f} x the float32 student"),
        ("of it anonymous, at most", lambda run: f"{run.peak_anonymous_bytes / 1e9:.2f} GB"),
        ("largest process", lambda run: f"{run.largest_process_bytes / 1e9:.2f} GB"),
        ("load average before", lambda run: f"{run.load:.2f}"),
        ("exit status", lambda run: str(run.status)),
    ]
    head = [f"`lrc-edge export` of {run.shape}, {run.n_params:,} parameters, to {run.formats}: {run.label}, "
             f"{run.machine}" for run in runs]
    lines = [*(f"- {line}" for line in head), "", "| stage: time, peak memory | "
             + " | ".join(run.label for run in runs) + " |", "|---" * (len(runs) + 1) + "|"]
    lines += [f"| {name} | " + " | ".join(cell(run) for run in runs) + " |" for name, cell in cells]
    return "\n".join(lines) + "\n"


def save(run: Run, folder: Path) -> str:
    """Add the run to folder/runs.jsonl, replacing one of the same label and shape, and return the table."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "runs.jsonl"
    kept = [Run(**json.loads(line)) for line in file.read_text().splitlines()] if file.exists() else []
    runs = [other for other in kept if (other.label, other.shape) != (run.label, run.shape)] + [run]
    file.write_text("".join(json.dumps(asdict(run)) + "\n" for run in runs))
    (folder / "table.md").write_text(table(runs))
    return table(runs)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the student and the export")
    parser.add_argument("--lrc-edge", type=Path, default=Path(sys.executable).with_name("lrc-edge"),
                        help="executable to measure; default: this environment's")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="lrc-1.5b")
    parser.add_argument("--formats", default=FORMATS)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the recipe")
    parser.add_argument("--label", default="now", help="the run's name in the results")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for runs.jsonl and table.md")
    args = parser.parse_args()
    student = make_student(args.work / "students", args.shape)
    run = export_run(args.lrc_edge, student, args.work / "out" / args.label, args.label, args.formats, args.set)
    print(save(run, args.results))
    return run.status


if __name__ == "__main__":
    sys.exit(main())
