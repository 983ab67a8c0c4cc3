"""Where a tokenized corpus is made and kept: a folder that survives a kill, and a cache that builds share."""
from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lrc_edge.build import replace_tree
from lrc_edge.errors import UserError

UNFINISHED = ".unfinished"
KEY_FILE = "key"  # in an unfinished folder: what it is the beginning of


def make_resumable(folder: Path, key: str, make: Callable[[Path], None]) -> None:
    """Let `make` fill a folder beside `folder`, then rename it. After a kill it finds what it left of this key."""
    work = folder.with_name(folder.name + UNFINISHED)
    mark = work / KEY_FILE
    if not mark.exists() or mark.read_text() != key:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        mark.write_text(key)
    make(work)
    mark.unlink()
    replace_tree(work, folder)


def make_or_link(cache: Path, key: str, folder: Path, make: Callable[[Path], None]) -> None:
    """Fill `folder` with links to the cache's corpus of this key, which `make` makes where there is none."""
    entry = cache / key
    with _only_one(cache, key):
        if not entry.exists():
            make_resumable(entry, key, make)
    work = folder.with_name(folder.name + UNFINISHED)
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(entry, work, copy_function=_link)
    replace_tree(work, folder)


@contextmanager
def _only_one(cache: Path, key: str) -> Iterator[None]:
    """Two builds at once would write the same files: the second waits, and finds them made."""
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
