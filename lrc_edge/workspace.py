"""The output directory: the inputs and results of each finished stage, and atomic writes."""
from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lrc_edge.artifact import sha256_of
from lrc_edge.errors import UserError

MANIFEST = "build.json"
DIGEST = "sha256"  # key of the manifest: of all else in it
MOST_CHANGES = 6  # that one line names
PARTIAL = ".partial"  # what a stage has not finished; emptied when a build starts


class Workspace:
    """An output directory. `build.json` holds the named inputs, the outputs' hashes and the result of each stage."""

    def __init__(self, path: Path):
        self.path = path
        file = path / MANIFEST
        self.manifest: dict[str, Any] = _read_manifest(file) if file.exists() else {"stages": {}, "hashes": {}}

    @classmethod
    def create(cls, path: Path) -> Workspace:
        """Open or create the directory. Raises UserError if it cannot be written."""
        try:
            path.mkdir(parents=True, exist_ok=True)
            probe = path / f"{PARTIAL}-probe"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise UserError(f"{path}: cannot write there ({error.strerror}); give another --out") from error
        shutil.rmtree(path / PARTIAL, ignore_errors=True)
        return cls(path)

    def inputs(self, stage: str) -> dict[str, Any] | None:
        """Return the named inputs of the stage when it last finished; None if it never did."""
        record = self.manifest["stages"].get(stage)
        return None if record is None else record.get("inputs", {})  # {}: an earlier version recorded a digest alone

    def is_done(self, stage: str, inputs: dict[str, Any]) -> bool:
        """Whether the stage ran on these inputs and every file that it wrote is unchanged."""
        return (self.inputs(stage) == _plain(inputs)
                and all(self._is_unchanged(name, sha256) for name, sha256 in self.output_hashes(stage).items()))

    def _is_unchanged(self, name: str, sha256: str) -> bool:
        file = self.path / name
        return file.is_file() and self.hash(file) == sha256

    def result(self, stage: str) -> Any:
        return self.manifest["stages"][stage]["result"]

    def output_hashes(self, stage: str) -> dict[str, str]:
        outputs: dict[str, str] = self.manifest["stages"][stage]["outputs"]
        return outputs

    def record(self, stage: str, inputs: dict[str, Any], outputs: list[Path], result: Any = None) -> None:
        """Record a finished stage. `outputs` are files or folders below the directory."""
        files = sorted(f for path in outputs for f in (path.rglob("*") if path.is_dir() else [path]) if f.is_file())
        self.manifest["stages"][stage] = {
            "inputs": _plain(inputs), "result": result,
            "outputs": {str(file.relative_to(self.path)): self.hash(file) for file in files}}
        self.save()

    def forget(self, stage: str) -> None:
        if self.manifest["stages"].pop(stage, None) is not None:
            self.save()

    def save(self) -> None:
        table = {DIGEST: digest(self.manifest), **self.manifest}
        write_atomically(self.path / MANIFEST, json.dumps(table, indent=1) + "\n")

    def hash(self, file: Path) -> str:
        """Return the SHA-256 of the file, cached while its size and modification time stay the same."""
        stat = file.stat()
        key, state = str(file.resolve()), [stat.st_size, stat.st_mtime_ns]
        known = self.manifest["hashes"].get(key)
        if known is None or known[:2] != state:
            known = self.manifest["hashes"][key] = [*state, sha256_of(file)]
        return str(known[2])

    @contextmanager
    def partial(self, name: str) -> Iterator[Path]:
        """Yield a path below `.partial` to write to; what is left there is removed when the block ends."""
        path = self.path / PARTIAL / name
        shutil.rmtree(path, ignore_errors=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield path
        finally:
            shutil.rmtree(self.path / PARTIAL, ignore_errors=True)


def _read_manifest(file: Path) -> dict[str, Any]:
    """Return build.json without its digest. Raises UserError if it is damaged, since commands trust its contents."""
    needed = "delete it to build again"
    try:
        table: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        recorded = table.pop(DIGEST, None)
        sound = all(isinstance(part, dict) for part in (table["stages"], table["hashes"], table.get("job", {})))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{file}: not a build manifest ({error!r:.200}); {needed}") from error
    if not sound:
        raise UserError(f"{file}: not a build manifest (stages, hashes and job must be tables); {needed}")
    # A version is written with every job, and so is the digest.
    if recorded != digest(table) and (recorded is not None or "lrc_edge" in table):
        raise UserError(f"{file}: damaged, or of an earlier lrc-edge (its digest is {recorded!r:.70}); {needed}")
    return table


def digest(value: Any) -> str:
    """Return the SHA-256 of any value that JSON can represent."""
    return hashlib.sha256(json.dumps(_plain(value), sort_keys=True).encode()).hexdigest()


def _plain(value: Any) -> Any:
    """Convert the value as a round trip through JSON does: tuples become lists, keys become strings."""
    return json.loads(json.dumps(value, default=str))


def changes(before: dict[str, Any] | None, now: dict[str, Any]) -> list[str]:
    """ "train.tokens was 1000, is 2000" for each input that differs, or how many more; empty if `before` is None."""
    if not before:
        return [] if before is None else ["recorded by an earlier version of lrc-edge"]
    now = _plain(now)
    found = [f"{name} was {_shown(before.get(name))}, is {_shown(now.get(name))}" for name in {**before, **now}
             if before.get(name) != now.get(name)]
    return found[:MOST_CHANGES] + ([f"{len(found) - MOST_CHANGES} more"] if len(found) > MOST_CHANGES else [])


def _shown(value: Any) -> str:
    """Shorten the value to fit on a line; a digest to its beginning."""
    text = str(value)
    return text[:8] if re.fullmatch(r"[0-9a-f]{64}", text) else f"{text[:60]}..." if len(text) > 63 else text


def replace_tree(source: Path, target: Path) -> None:
    """Move a finished folder to `target`, replacing an older one."""
    shutil.rmtree(target, ignore_errors=True)
    os.replace(source, target)


def write_atomically(path: Path, text: str) -> None:
    """Write to a temporary file, then rename it, so that a reader sees either the old or the new text."""
    temporary = path.with_name(f".{path.name}.partial")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def free_bytes(path: Path) -> int:
    """Return the free bytes of the file system that contains, or would contain, `path`."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free
