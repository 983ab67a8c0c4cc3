"""Counters of energy in a folder like Linux's powercap, and joules per token measured with them."""
from __future__ import annotations

import os
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest

from lrc_edge.targets import speed
from lrc_edge.targets.energy import EnergyCounter, EnergyUnavailable
from lrc_edge.targets.runtimes.worker import Command

LARGEST = 262_143_328_850


def zone(folder: Path, name: str, domain: str, microjoules: int, largest: int = LARGEST) -> Path:
    """Write a zone; return its counter."""
    path = folder / name
    path.mkdir(parents=True)
    for file, content in (("name", domain), ("energy_uj", microjoules), ("max_energy_range_uj", largest)):
        (path / file).write_text(f"{content}\n")
    return path / "energy_uj"


def advance(counter: Path, microjoules: int) -> None:
    counter.write_text(str(int(counter.read_text()) + microjoules))


def test_packages_are_summed_and_their_parts_not_counted_again(tmp_path: Path) -> None:
    """Nor what has a second interface, nor the memory modules, nor the whole platform."""
    (tmp_path / "intel-rapl").mkdir()  # the kind of counter, which has no name
    packages = [zone(tmp_path, f"intel-rapl:{i}", f"package-{i}", 5_000_000) for i in range(2)]
    others = [zone(tmp_path, name, domain, 7_000_000) for name, domain in (
        ("intel-rapl:0:0", "core"), ("intel-rapl:0:1", "uncore"), ("intel-rapl:0:2", "dram"), ("intel-rapl:2", "psys"),
        ("intel-rapl-mmio:0", "package-0"))]
    energy = EnergyCounter.find(tmp_path)
    assert [counter.file for counter in energy.counters] == packages
    before = energy.read()
    for file in packages:
        advance(file, 1_500_000)
    for file in others:
        advance(file, 900_000)
    assert energy.joules_since(before) == pytest.approx(3.0)


def test_the_dies_of_a_package_are_counters_of_their_own(tmp_path: Path) -> None:
    for i in range(2):
        zone(tmp_path, f"intel-rapl:{i}", f"package-0-die-{i}", 0)
    assert len(EnergyCounter.find(tmp_path).counters) == 2


def test_a_counter_may_start_again(tmp_path: Path) -> None:
    files = [zone(tmp_path, f"intel-rapl:{i}", f"package-{i}", LARGEST - 1_000_000) for i in range(2)]
    energy = EnergyCounter.find(tmp_path)
    before = energy.read()
    files[0].write_text("2000000")
    advance(files[1], 500_000)
    assert energy.joules_since(before) == pytest.approx(3.5)


def test_no_counter_is_said(tmp_path: Path) -> None:
    zone(tmp_path / "folder", "intel-rapl:0:0", "core", 1)
    for folder in (tmp_path / "absent", tmp_path / "folder"):
        with pytest.raises(EnergyUnavailable, match=f"no counter of a processor in {folder}"):
            EnergyCounter.find(folder)


@pytest.mark.parametrize("broken", ["energy_uj", "max_energy_range_uj"])
@pytest.mark.parametrize(("how", "why"), [("directory", "Is a directory"), ("empty", "not a number"),
                                          ("absent", "No such file")])
def test_a_counter_that_cannot_be_read_is_named(broken: str, how: str, why: str, tmp_path: Path) -> None:
    """One of two: half the energy would be a guess. A directory also stops root."""
    zone(tmp_path, "intel-rapl:0", "package-0", 1)
    file = zone(tmp_path, "intel-rapl:1", "package-1", 1).with_name(broken)
    file.unlink()
    if how == "directory":
        file.mkdir()
    elif how == "empty":
        file.touch()
    with pytest.raises(EnergyUnavailable, match=f"the counter {file} cannot be read .{why}"):
        EnergyCounter.find(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_a_counter_for_root_alone(tmp_path: Path) -> None:
    file = zone(tmp_path, "intel-rapl:0", "package-0", 1)
    file.chmod(0)
    with pytest.raises(EnergyUnavailable, match="Permission denied"):
        EnergyCounter.find(tmp_path)


# A runtime that spends a known energy: 1 mJ per token of a prompt and 20 mJ per token of its answer, whose length may
# be limited. Its counter starts again from time to time.
RUNTIME = """
import json, sys
file, largest, limit = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
for line in sys.stdin:
    request = json.loads(line)
    answer = {"prompt": 300.0, "prefill": 200.0, "decode": 50.0}
    if request["op"] == "generate":
        n = min(limit, request["n_tokens"])
        spent = int(open(file).read()) + 1000 * len(request["ids"]) + 20_000 * n
        open(file, "w").write(str(spent % largest))
        answer = {"ids": [5] * n}
    print(json.dumps(answer), flush=True)
"""


def measured(folder: Path, limit: int, energy: bool = True) -> list[dict[str, float]]:
    largest = 200_000_000
    counter = zone(folder, "intel-rapl:0", "package-0", largest - 100_000, largest)
    command = Command((sys.executable, "-c", RUNTIME, str(counter), str(largest), str(limit)))
    found = speed.measure({"file": (lambda _: nullcontext(command), folder / "file")}, [1] * 1200, 1200, 1,
                          lambda _: None, EnergyCounter.find(folder) if energy else None)
    return found["file"]


def test_joules_are_of_the_decoded_tokens_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "ENERGY_SECONDS", 0.002)  # so few answers that the counter starts again once at most
    empty, deep = measured(tmp_path, limit=1000)
    assert (empty["depth"], deep["depth"]) == (0, 1007)
    assert empty["joules"] == pytest.approx(0.02) and deep["joules"] == pytest.approx(0.02)
    assert (deep["prompt"], deep["prefill"], deep["decode"]) == (300, 200, 50)


def test_joules_are_not_guessed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no counter, one that does not advance, or a runtime that ends its answers early."""
    monkeypatch.setattr(speed, "ENERGY_SECONDS", 0.0)
    for name, limit, energy in (("none", 1000, False), ("short", 20, True)):
        assert [row["joules"] for row in measured(tmp_path / name, limit, energy)] == [None, None]
    monkeypatch.setattr(EnergyCounter, "joules_since", lambda self, before: 0.0)
    assert [row["joules"] for row in measured(tmp_path / "still", 1000)] == [None, None]
