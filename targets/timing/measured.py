"""Timings of the anchors on one machine: kept in the cache, and a file that can be brought from a device.

They belong to the processor, the versions of the libraries, the threads, the format and the shapes; a change in any of
these is another measurement.
"""
from __future__ import annotations

import json
import platform
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from lrc_edge.errors import UserError
from lrc_edge.machine import architecture, processors
from lrc_edge.shape import ModelShape
from lrc_edge.targets.devices.kits import cache_folder, digest
from lrc_edge.targets.runtimes.table import native_start, runtime_named
from lrc_edge.targets.timing.anchors import time_shapes
from lrc_edge.targets.timing.cost import CostModel, Timing
from lrc_edge.workspace import write_atomically

PACKAGES = {"llama.cpp": "llama-cpp-python"}  # runtime -> the package that carries it


@dataclass(frozen=True)
class Measured:
    """Timings of shapes, and where they were made."""

    machine: str  # "x86_64, 2 processors, Intel(R) Xeon(R) ..."
    library: str  # "llama-cpp-python 0.3.36"
    threads: int
    format: str
    timings: tuple[Timing, ...]

    def save(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        table = {"machine": self.machine, "library": self.library, "threads": self.threads, "format": self.format,
                 "timings": [timing.as_dict() for timing in self.timings]}
        write_atomically(file, json.dumps(table, indent=1) + "\n")

    @classmethod
    def load(cls, file: Path) -> Measured:
        """Raises UserError if the file is not one that `save` wrote."""
        try:
            table = json.loads(file.read_text())
            timings = tuple(Timing.from_dict(row) for row in table.pop("timings"))
            return cls(timings=timings, **table)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f"{file}: not a file of timings ({error}); make it with `lrc-edge plan --time-anchors`") \
                from error

    def model(self) -> CostModel:
        """Raises UserError if the timings are too few."""
        try:
            return CostModel.fit(self.timings, self.format)
        except ValueError as error:
            raise UserError(f"timings of {self.format} on {self.machine}: {error}; measure them again with "
                            "`lrc-edge plan --time-anchors`") from error


def measured_here(shapes: list[ModelShape], format_: str, context: int, threads: int,
                  progress: Callable[[str], None]) -> Measured:
    """Return timings of GGUF files of these shapes on this machine, measured unless they are in the cache already.

    Raises UserError for a format that is not a GGUF, WorkerFailed.
    """
    runtime = runtime_named("llama.cpp")
    machine, library = machine_name(), f"{PACKAGES[runtime.name]} {version(PACKAGES[runtime.name])}"
    key = digest(machine, library, str(threads), format_, str(context), *(json.dumps(s.as_dict()) for s in shapes))
    file = cache_folder() / f"timings-{key}.json"
    if file.exists():
        return Measured.load(file)
    timings = time_shapes(shapes, format_, native_start(runtime.name), context, threads, progress)
    found = Measured(machine, library, threads, format_, tuple(timings))
    found.save(file)
    return found


def machine_name() -> str:
    return f"{architecture()}, {processors()} processors, {_processor()}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown processor"
    named = [line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "CPU part", "Model"))]
    return named[0] if named else "unknown processor"
