"""Energy of this machine's processors, from counters that Linux keeps (powercap, with RAPL of Intel and AMD).

Only packages count. A package contains its cores, caches and graphics, so `core` and `uncore` would be counted twice.
`dram`, the memory modules, exists on some processors only, and what `psys` covers depends on the machine.
"""
from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from lrc_edge.errors import UserError

POWERCAP = Path("/sys/class/powercap")
PACKAGE = re.compile(r"package-\d+(-die-\d+)?")
MEANING = "energy is that of the whole processor, other work included, without the memory modules"


class EnergyUnavailable(UserError):
    """This machine has no counter that can be read."""


@dataclass(frozen=True)
class Counter:
    """A file with the microjoules of one package. After `largest` it starts again at 0."""

    file: Path
    largest: int

    @classmethod
    def of_zone(cls, zone: Path) -> Counter:
        """Raises EnergyUnavailable if it cannot be read, which on most systems only root may."""
        counter = cls(zone / "energy_uj", _number(zone / "max_energy_range_uj"))
        counter.read()
        return counter

    def read(self) -> int:
        return _number(self.file)


@dataclass(frozen=True)
class EnergyCounter:
    """The counters of all packages. Two reads give the energy between them, if no counter starts again twice."""

    counters: tuple[Counter, ...]

    @classmethod
    def find(cls, folder: Path = POWERCAP) -> EnergyCounter:
        """Raises EnergyUnavailable."""
        # A package may have two interfaces, intel-rapl-mmio:0 and intel-rapl:0; the latter replaces the former.
        zones = {name: file.parent for file in sorted(folder.glob("*/name"))
                 if PACKAGE.fullmatch(name := file.read_text().strip())}
        if not zones:
            raise EnergyUnavailable(f"no counter of a processor in {folder}")
        return cls(tuple(map(Counter.of_zone, zones.values())))

    def read(self) -> tuple[int, ...]:
        """Return each counter, in microjoules. Raises EnergyUnavailable."""
        return tuple(counter.read() for counter in self.counters)

    def joules_since(self, before: tuple[int, ...]) -> float:
        """Return the joules of all packages since that read. Raises EnergyUnavailable."""
        spent = (now - then if now >= then else now - then + counter.largest
                 for counter, then, now in zip(self.counters, before, self.read(), strict=True))
        return sum(spent) / 1e6


def _number(file: Path) -> int:
    try:
        return int(file.read_text())
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else "not a number"
        raise EnergyUnavailable(f"the counter {file} cannot be read ({why})") from error
