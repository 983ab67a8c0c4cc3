"""A teacher, text, a recipe with every stage, a device, and an undisturbed build of them to compare with."""
from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from faults.runs import Ended, Stage, artifacts, lrc_edge, run, watch_stages

# In the order in which a build runs them; `device`: the check in a target's runtimes, after the report.
STAGES = ("weights", "vocabulary", "data", "identity", "start", "train", "fold", "quantize", "imatrix",
          "sensitivity", "allocate", "gguf", "onnx", "check", "teacher", "report", "device")
RECIPE = """
[student]
hidden_size = 32
vocab_size = 400
[train]
tokens = 6144
seq_len = 64
batch_tokens = 512
checkpoint_every = 3
eval_every = 6
device = "cpu"
precision = "fp32"
[quantize]
tokens = 4096
batch_tokens = 512
[export]
formats = ["gguf:f32", "gguf:q4_0", "onnx:fp32", "onnx:q4"]
targets = ["{device}"]
bits_per_weight = 8.0
calibration_tokens = 512
[parity]
positions = 64
row_len = 32
generate_tokens = 4
prompts = ["Once upon a time"]
"""
DEVICE = """
description = "This machine, with one format"
architecture = "{architecture}"
features = []
context = 128
runtimes = ["onnxruntime"]
recommended = "onnx:q4"
cores = {{ value = 1, source = "judged", date = 2026-01-01 }}
ram_gb = {{ value = 4, source = "judged", date = 2026-01-01 }}
usable_gb = {{ value = 2, source = "judged", date = 2026-01-01 }}
bandwidth_gb_s = {{ value = 10, source = "judged", date = 2026-01-01 }}
[[formats]]
name = "onnx:q4"
why = "small"
"""


@dataclass
class Bench:
    """Inputs and the undisturbed build; `writes`: its events (see `count_writes`) of each stage."""

    folder: Path
    expected: dict[str, str] = field(default_factory=dict)
    seconds: dict[Stage, float] = field(default_factory=dict)
    writes: dict[Stage, int] = field(default_factory=dict)
    whole_seconds: float = 0.0

    @property
    def teacher(self) -> Path:
        return self.folder / "inputs" / "teacher"

    @property
    def text(self) -> Path:
        return self.folder / "inputs" / "text.jsonl"

    @property
    def recipe(self) -> Path:
        return self.folder / "inputs" / "recipe.toml"

    @property
    def device(self) -> Path:
        return self.folder / "inputs" / "this-machine.toml"

    @property
    def built(self) -> Path:
        return self.folder / "built"

    def arguments(self, out: Path, *more: str) -> list[str]:
        """Of a build of these inputs in `out`."""
        return ["build", str(self.teacher), "--out", str(out), "--data", str(self.text), "--recipe", str(self.recipe),
                *more]

    def build(self, out: Path, *more: str, note: Callable[[Stage], None] | None = None) -> Callable[[], None]:
        """The build, for `run`: its stages are watched."""
        command = lrc_edge(*self.arguments(out, *more))

        def action() -> None:
            watch_stages(note)
            command()

        return action

    @classmethod
    def make(cls, folder: Path) -> Bench:
        """In an empty folder; about ten seconds. Raises RuntimeError when the undisturbed build fails."""
        bench = cls(folder)
        ended = run(lambda: _make_inputs(bench), seconds=120)
        if ended.status:
            raise RuntimeError(f"the inputs could not be made: {ended.told()}")
        counts = folder / "writes.json"
        ended = run(lambda: _count(bench, counts))
        require_passed(ended)
        bench.expected, bench.whole_seconds = artifacts(bench.built), ended.seconds
        bench.writes = json.loads(counts.read_text())
        times = [*ended.stages, ("", ended.seconds)]
        bench.seconds = {name: following[1] - at for (name, at), following in pairwise(times)}
        if missing := set(STAGES) - set(bench.seconds):
            raise RuntimeError(f"the undisturbed build has no stage {', '.join(missing)}")
        return bench


def require_passed(ended: Ended) -> None:
    if ended.status:
        raise RuntimeError(f"the undisturbed build failed: {ended.told()}\n{ended.out}")


def _make_inputs(bench: Bench) -> None:
    from tiny_models import TEXT, make_tiny

    from lrc_edge.machine import architecture

    bench.text.parent.mkdir(parents=True)
    make_tiny(bench.teacher, layers=1)
    bench.text.write_text("".join(json.dumps({"text": TEXT[i:i + 300]}) + "\n" for i in range(0, 150_000, 300)))
    bench.device.write_text(DEVICE.format(architecture=architecture()))
    bench.recipe.write_text(RECIPE.format(device=bench.device))


def _count(bench: Bench, file: Path) -> None:
    """Build, and leave the number of writes of each stage in `file`."""
    counts: dict[Stage, int] = dict.fromkeys(STAGES, 0)
    stage = ""

    def note(name: Stage) -> None:
        nonlocal stage
        stage = name

    def count() -> None:
        if stage:
            counts[stage] += 1

    on_write(count)
    try:
        bench.build(bench.built, note=note)()
    finally:
        file.write_text(json.dumps(counts))


CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "subprocess.Popen"}


def on_write(act: Callable[[], None]) -> None:
    """In a child: call `act` before each change of the file system that Python makes, and each start of a process."""
    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if event in CHANGES or (event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")):
            act()

    sys.addaudithook(hook)
