"""Profiles: the known figures of a device, each with its source. One TOML file per device, data only.

A user's own device is another file with the same keys: `--target ./my-device.toml`.
"""
from __future__ import annotations

import datetime
import difflib
import math
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from lrc_edge.errors import UserError
from lrc_edge.formats import FORMATS, format_of
from lrc_edge.targets.runtimes.table import RUNTIMES, readers_of

ARCHITECTURES = ("x86_64", "aarch64", "wasm32")
# They decide which kernels a runtime uses, and how it stores the weights.
FEATURES = ("avx2", "avx512", "neon", "dotprod", "i8mm", "simd128")
# Their blocks have 32 weights at most, so that a student of any width can be written.
PROFILE_FORMATS = tuple(name for name, row in FORMATS.items() if row.in_profiles)


@dataclass(frozen=True)
class Figure:
    """A number with its source. `date`: when the source was read."""

    value: float
    source: str
    date: datetime.date


@dataclass(frozen=True)
class Format:
    """A format that runs well on the device, named as in `--formats`, and the reason."""

    name: str
    why: str


@dataclass(frozen=True)
class Profile:
    """One device. GB are 10^9 bytes."""

    name: str  # the file's
    name_or_path: str = field(compare=False)  # as given to load_profile
    description: str
    architecture: str
    features: tuple[str, ...]
    emulate: str  # qemu-user's -cpu where the machine is another; empty: nothing to emulate
    cores: Figure
    ram_gb: Figure
    usable_gb: Figure  # what one app may take
    bandwidth_gb_s: Figure
    context: int  # tokens to plan for
    runtimes: tuple[str, ...]
    formats: tuple[Format, ...]  # best first
    recommended: str

    @property
    def usable_bytes(self) -> int:
        return int(self.usable_gb.value * 1e9)

    @property
    def format_names(self) -> list[str]:
        return [format_.name for format_ in self.formats]

    @property
    def figures(self) -> dict[str, Figure]:
        return {name: getattr(self, name) for name in FIGURES}

    def format_named(self, name: str | None) -> str:
        """Return one of its formats by name; None: the recommended one. Raises UserError for any other name."""
        found = self.recommended if name is None else name.strip().lower()
        if found not in self.format_names:
            raise UserError(f"--format {name}: {self.name} runs {', '.join(self.format_names)}; give one of them")
        return found

    def runtime_of(self, format_name: str) -> str:
        """Return the first of its runtimes that reads the format."""
        readers = readers_of(format_of(format_name).kind)
        return next(name for name in self.runtimes if name in readers)


FIGURES = ("cores", "ram_gb", "usable_gb", "bandwidth_gb_s")
_NUMBER = (int, float)
_KINDS: dict[str, Any] = {"description": str, "architecture": str, "features": list, "emulate": str, "context": int,
                           "runtimes": list, "formats": list, "recommended": str} | dict.fromkeys(FIGURES, dict)
_FIGURE_KINDS = {"value": _NUMBER, "source": str, "date": datetime.date}
_FORMAT_KINDS = {"name": str, "why": str}
_WORDS = {str: "a text", list: "a list", int: "a whole number", dict: "a table of value, source and date",
          _NUMBER: "a number", datetime.date: "a date (2026-11-21)"}
_OPTIONAL = {"emulate"}


def profile_names() -> list[str]:
    return sorted(file.name.removesuffix(".toml") for file in _folder().iterdir() if file.name.endswith(".toml"))


def all_profiles() -> list[Profile]:
    return [load_profile(name) for name in profile_names()]


def load_profile(name_or_path: str) -> Profile:
    """Load a built-in profile by name, or a user's TOML file.

    Raises UserError for an unknown name (with the nearest one) or a bad file (with the key and what is needed).
    """
    if name_or_path in profile_names():
        return _read(_folder() / f"{name_or_path}.toml", name_or_path, name_or_path)
    path = Path(name_or_path).expanduser()
    if path.suffix == ".toml" or path.exists():
        if path.stem in profile_names():
            raise UserError(f"{path}: {path.stem} is a built-in target; give the file another name")
        return _read(path, path.stem, name_or_path)
    near = difflib.get_close_matches(name_or_path, profile_names(), n=1, cutoff=0.0)[0]
    raise UserError(f"target {name_or_path!r} is unknown; did you mean {near}? Known: {', '.join(profile_names())}; "
                    "or give a file like ./my-device.toml")


def load_profiles(names_or_paths: Iterable[str]) -> list[Profile]:
    """Load each target once. Raises UserError also for two of the same name, since results are stored by name."""
    profiles = list(dict.fromkeys(load_profile(name) for name in names_or_paths))
    by_name: dict[str, Profile] = {}
    for profile in profiles:
        if (other := by_name.setdefault(profile.name, profile)) is not profile:
            raise UserError(f"targets {other.name_or_path} and {profile.name_or_path}: both are called {profile.name}; "
                            "give one of the files another name")
    return profiles


def _folder() -> Traversable:
    return files("lrc_edge.targets") / "profiles"


def _read(file: Traversable | Path, name: str, name_or_path: str) -> Profile:
    try:
        table = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot read the profile ({error}); give a TOML file, or one of "
                        f"{', '.join(profile_names())}") from error
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise UserError(f"{file}: not TOML: {error}; fix the line") from error
    where = str(file) if isinstance(file, Path) else f"{name}.toml"
    _check_keys(table, _KINDS, where, "")
    figures = {key: _figure(table[key], where, key) for key in FIGURES}
    profile = Profile(
        name=name, name_or_path=name_or_path, description=table["description"], architecture=table["architecture"],
        features=tuple(table["features"]), emulate=table.get("emulate", ""), context=table["context"],
        runtimes=tuple(table["runtimes"]), recommended=table["recommended"],
        formats=tuple(_format(entry, where, i) for i, entry in enumerate(table["formats"])), **figures)
    _check(profile, where)
    return profile


def _check_keys(table: Mapping[str, Any], kinds: Mapping[str, Any], where: str, prefix: str) -> None:
    """Raise UserError unless the table has every key, each of its type, and no other."""
    if unknown := table.keys() - kinds.keys():
        key = min(unknown)
        near = difflib.get_close_matches(key, kinds, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(kinds)}"
        raise UserError(f"{where}: unknown key {prefix}{key}; {hint}")
    for key, kind in kinds.items():
        if key not in table and key in _OPTIONAL:
            continue
        if key not in table:
            raise UserError(f"{where}: {prefix}{key} is missing; need {_WORDS[kind]}")
        if not isinstance(table[key], kind) or isinstance(table[key], bool):
            raise UserError(f"{where}: {prefix}{key} = {table[key]!r}: need {_WORDS[kind]}")


def _figure(table: Mapping[str, Any], where: str, key: str) -> Figure:
    _check_keys(table, _FIGURE_KINDS, where, f"{key}.")
    value = float(table["value"])
    if not 0 < value < math.inf:
        raise UserError(f"{where}: {key}.value = {value:g}: need a number above 0")
    if not table["source"].strip():
        raise UserError(f"{where}: {key}.source is empty; need where the figure comes from, or that you judged it")
    return Figure(value, table["source"], table["date"])


def _format(entry: Any, where: str, index: int) -> Format:
    prefix = f"formats[{index}]"
    if not isinstance(entry, dict):
        raise UserError(f"{where}: {prefix} = {entry!r}: need a table of name and why; write [[formats]]")
    _check_keys(entry, _FORMAT_KINDS, where, f"{prefix}.")
    return Format(entry["name"], entry["why"])


def _check(profile: Profile, where: str) -> None:
    """Raise UserError unless the values are possible and agree with each other."""
    _check_one_of(profile.architecture, ARCHITECTURES, f"{where}: architecture")
    for key, words, known in (("features", profile.features, FEATURES),
                              ("runtimes", profile.runtimes, tuple(RUNTIMES)),
                              ("formats", profile.format_names, PROFILE_FORMATS)):
        for word in words:
            _check_one_of(word, known, f"{where}: {key}")
    if not profile.formats or not profile.runtimes:
        raise UserError(f"{where}: {'runtimes' if profile.formats else 'formats'} is empty; need at least one")
    _check_one_of(profile.recommended, tuple(profile.format_names), f"{where}: recommended")
    for name in profile.format_names:
        if not set(readers := readers_of(format_of(name).kind)) & set(profile.runtimes):
            raise UserError(f"{where}: formats has {name}, and none of its runtimes ({', '.join(readers)}) is among "
                            "runtimes; add one or remove the format")
    if profile.context < 1:
        raise UserError(f"{where}: context = {profile.context}: need 1 or more")
    if profile.usable_gb.value > profile.ram_gb.value:
        raise UserError(f"{where}: usable_gb.value = {profile.usable_gb.value:g}: need no more than ram_gb.value, "
                        f"{profile.ram_gb.value:g}")


def _check_one_of(word: Any, known: tuple[str, ...], where: str) -> None:
    if word not in known:
        raise UserError(f"{where} = {word!r}: need one of {', '.join(known)}")
