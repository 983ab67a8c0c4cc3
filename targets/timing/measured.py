"""Timings of the anchors on one machine: kept in the cache, and a file that can be brought from a device.

They belong to the processor, the versions of the runtime and of lrc-edge, which writes the graphs, the threads, the
format and the shapes; a change in any of these is another measurement.
"""
from __future__ import annotations

import json
import platform
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from lrc_edge import __version__
from lrc_edge.errors import UserError
from lrc_edge.formats import format_of
from lrc_edge.machine import architecture, processors
from lrc_edge.shape import ModelShape
from lrc_edge.targets.devices.kits import Pip, cache_folder, digest
from lrc_edge.targets.profile import Profile
from lrc_edge.targets.runtimes.table import DeviceRuntime, runtimes_of
from lrc_edge.targets.timing.anchors import WRITERS, time_shapes
from lrc_edge.targets.timing.cost import CostModel, Timing
from lrc_edge.workspace import write_atomically


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


def runtime_here(profile: Profile, format_: str) -> DeviceRuntime | None:
    """Return the profile's runtime for the format if its speed on this machine is the device's, else None."""
    name = profile.runtime_of(format_)
    return next((runtime for runtime in runtimes_of(profile) if runtime.name == name and runtime.timed), None)


def measured_here(runtime: DeviceRuntime, shapes: list[ModelShape], format_: str, context: int, threads: int,
                  progress: Callable[[str], None]) -> Measured:
    """Return timings of files of these shapes on this machine, measured unless they are in the cache already.

    runtime: runtime_here's. Raises UserError if a package is missing, WorkerFailed.
    """
    machine, library = machine_name(), library_of(runtime, format_)
    key = digest(machine, library, __version__, str(threads), format_, str(context),
                 *(json.dumps(s.as_dict()) for s in shapes))
    file = cache_folder() / f"timings-{key}.json"
    if file.exists():
        return Measured.load(file)
    timings = time_shapes(shapes, format_, runtime.start, context, threads, progress)
    found = Measured(machine, library, threads, format_, tuple(timings))
    found.save(file)
    return found


def library_of(runtime: DeviceRuntime, format_: str) -> str:
    """Return the runtime's package and version. Raises UserError if it or the package that writes files is missing."""
    kits = [kit for kit in runtime.kits if isinstance(kit, Pip)]
    writer, _ = WRITERS[format_of(format_).kind]
    absent = [kit.package for kit in kits if kit.missing()] + ([] if find_spec(writer) else [writer])
    if absent:
        raise UserError(f"timing {format_} in {runtime.name} needs {' and '.join(absent)}; run: pip install "
                        f"{' '.join(absent)}")
    return ", ".join(f"{kit.package} {version(kit.package)}" for kit in kits)


def machine_name() -> str:
    return f"{architecture()}, {processors()} processors, {_processor()}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown processor"
    named = [line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "CPU part", "Model"))]
    return named[0] if named else "unknown processor"
