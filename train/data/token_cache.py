"""Folders for a tokenized corpus: a resumable one, and a cache that several builds share."""
from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lrc_edge.errors import UserError
from lrc_edge.workspace import replace_tree, write_atomically

UNFINISHED = ".unfinished"
KEY = ".key"  # next to a folder: the key of its contents, or of its unfinished copy's


def make_resumable(folder: Path, key: str, make: Callable[[Path], None]) -> None:
    """Let `make` fill a folder next to `folder`, then rename it. After a kill, `make` finds what it wrote for this key.

    The key stays until `forget_key`. So a caller that is killed before it has recorded the finished folder does not
    make it again.
    """
    work, mark = folder.with_name(folder.name + UNFINISHED), _key_file(folder)
    if not mark.exists() or mark.read_text() != key:
        mark.unlink(missing_ok=True)
        shutil.rmtree(work, ignore_errors=True)
    elif folder.exists() and not work.exists():
        return
    work.mkdir(parents=True, exist_ok=True)
    write_atomically(mark, key)
    make(work)
    replace_tree(work, folder)


def forget_key(folder: Path) -> None:
    """Call this once `folder` is recorded as finished: the record then shows whether its files are unchanged."""
    _key_file(folder).unlink(missing_ok=True)


def _key_file(folder: Path) -> Path:
    return folder.with_name(folder.name + KEY)


def make_or_link(cache: Path, key: str, folder: Path, make: Callable[[Path], None]) -> None:
    """Fill `folder` with links to the cache's corpus of this key; `make` makes that corpus if the cache has none."""
    entry = cache / key
    with _only_one(cache, key):
        if not entry.exists():
            make_resumable(entry, key, make)
            forget_key(entry)
    work = folder.with_name(folder.name + UNFINISHED)
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(entry, work, copy_function=_link)
    replace_tree(work, folder)


@contextmanager
def _only_one(cache: Path, key: str) -> Iterator[None]:
    """Lock the key: of two simultaneous builds, the second waits and uses the files of the first."""
    import fcntl

    try:
        cache.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise UserError(f"data.cache = {str(cache)!r}: not a folder; give a folder") from error
    with (cache / f"{key}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another disk, or a file system without links
        shutil.copy2(source, target)
