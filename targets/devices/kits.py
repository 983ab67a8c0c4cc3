"""Kits: what the runtimes of devices need besides Python, and how `lrc-edge targets setup` installs it.

A kit is a folder in the cache whose name contains a digest of its pinned versions: other versions get another folder.
It is either complete or absent. If a package needs root and setup runs without it, setup prints the exact command.
"""
from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

from lrc_edge.errors import UserError

Say = Callable[[str], None]


def cache_folder() -> Path:
    """Return $LRC_EDGE_CACHE, or lrc-edge in the user's cache folder."""
    own = os.environ.get("LRC_EDGE_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "lrc-edge"


@dataclass(frozen=True)
class Npm:
    """npm packages with their dependencies, in `<folder>/node_modules`. No install scripts run."""

    name: str
    packages: tuple[str, ...]  # name@version
    size: str  # on disk, for people

    @property
    def folder(self) -> Path:
        return cache_folder() / f"{self.name}-{digest(*self.packages)}"

    def module(self, package: str) -> Path:
        return self.folder / "node_modules" / package

    def missing(self) -> str | None:
        """Return why it cannot be used; None if it can."""
        if shutil.which("node") is None:
            return "node is not installed (nodejs.org, 20 or newer)"
        return None if self.folder.exists() else f"{self.name} is not installed"

    def plan(self) -> list[str]:
        """Return lines that describe what `install` will do."""
        return [f"npm install {' '.join(self.packages)}  ({self.size}, into {self.folder})"]

    def install(self, say: Say) -> None:
        """Install the packages. Raises UserError, and leaves no files, if npm is missing or fails."""
        if shutil.which("npm") is None:
            raise UserError(f"{self.name}: npm is not installed; install Node.js 20 or newer, which brings it")
        with unfinished(self.folder) as folder:
            run(["npm", "install", "--prefix", str(folder), "--ignore-scripts", "--omit=optional", "--no-package-lock",
                 "--no-audit", "--no-fund", "--loglevel=error", *self.packages], say)


@dataclass(frozen=True)
class Apt:
    """A program from Debian's or Ubuntu's packages, unless the machine has one already."""

    name: str
    packages: tuple[str, ...]
    programs: tuple[str, ...]  # any of these
    size: str

    @property
    def program(self) -> Path | None:
        return next((Path(found) for name in self.programs if (found := shutil.which(name))), None)

    def missing(self) -> str | None:
        return None if self.program else f"{self.name} is not installed (none of {', '.join(self.programs)})"

    def plan(self) -> list[str]:
        return [f"{self._command()}  ({self.size})"]

    def _command(self) -> str:
        return f"apt-get install --yes --no-install-recommends {' '.join(self.packages)}"

    def install(self, say: Say) -> None:
        if shutil.which("apt-get") is None:
            raise UserError(f"{self.name}: this machine has no apt-get; install one of {', '.join(self.programs)}")
        if os.geteuid():
            raise UserError(f"{self.name}: only root may install it; run: sudo apt-get update && "
                            f"sudo {self._command()}")
        run(["apt-get", "update", "-qq"], say)
        run(self._command().split(), say)


@dataclass(frozen=True)
class Pip:
    """A runtime with Python bindings, in the Python that runs lrc-edge. Any installed version is used."""

    package: str
    module: str
    version: str  # that `install` installs

    def missing(self) -> str | None:
        return None if find_spec(self.module) else f"{self.package} is not installed"

    def plan(self) -> list[str]:
        return [f"{sys.executable} -m pip install {self.package}=={self.version}"]

    def install(self, say: Say) -> None:
        run([sys.executable, "-m", "pip", "install", "--quiet", f"{self.package}=={self.version}"], say)


@dataclass(frozen=True)
class Unavailable:
    """A requirement that no installation can meet on this machine."""

    why: str

    def missing(self) -> str | None:
        return self.why

    def plan(self) -> list[str]:
        return []

    def install(self, say: Say) -> None:
        raise UserError(self.why)


class Kit(Protocol):
    def missing(self) -> str | None: ...
    def plan(self) -> list[str]: ...
    def install(self, say: Say) -> None: ...


def digest(*pins: str) -> str:
    return hashlib.sha256("\n".join(pins).encode()).hexdigest()[:12]


class unfinished:
    """Yield a new folder that becomes `folder` if the block succeeds, and is removed otherwise."""

    def __init__(self, folder: Path):
        self._folder = folder

    def __enter__(self) -> Path:
        self._folder.parent.mkdir(parents=True, exist_ok=True)
        self._partial = Path(tempfile.mkdtemp(prefix=f".{self._folder.name}-", dir=self._folder.parent))
        return self._partial

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None and not self._folder.exists():
            self._partial.rename(self._folder)
        shutil.rmtree(self._partial, ignore_errors=True)


def run(argv: list[str], say: Say, cwd: Path | None = None) -> str:
    """Run a command and return its standard output. If it fails, raises UserError with its last lines."""
    say(" ".join(argv))
    try:
        done = subprocess.run(argv, cwd=cwd, capture_output=True, text=True, check=False)
    except OSError as error:
        raise UserError(f"{argv[0]}: cannot run it ({error.strerror}); install it") from error
    if done.returncode:
        last = [line for line in (done.stderr or done.stdout).split("\n") if line.strip()][-3:]
        raise UserError(f"`{' '.join(argv)}` failed: {' '.join(last)}")
    return done.stdout


def missing(kits: tuple[Kit, ...]) -> str | None:
    """Return the first reason why a runtime with these kits cannot run; None if it can."""
    return next((why for kit in kits if (why := kit.missing())), None)
