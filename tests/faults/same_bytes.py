"""The same inputs elsewhere, later, with another hash seed and time zone: the same bytes."""
from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

from faults.bench import Bench
from faults.runs import artifacts, differences


def case(bench: Bench, rng: random.Random, folder: Path) -> list[str]:
    """Build in a new process from copies of the inputs. Returns what differs."""
    elsewhere = Bench(folder / "some where" / "else" / str(rng.randrange(10**9)))
    shutil.copytree(bench.teacher, elsewhere.teacher)
    for mine, theirs in ((bench.text, elsewhere.text), (bench.device, elsewhere.device)):
        shutil.copyfile(mine, theirs)
    elsewhere.recipe.write_text(bench.recipe.read_text().replace(str(bench.device), str(elsewhere.device)))
    ended = subprocess.run([sys.executable, "-m", "lrc_edge", *elsewhere.arguments(Path("out"))], text=True,
                           capture_output=True, cwd=elsewhere.folder,
                           env={**os.environ, "PYTHONHASHSEED": str(rng.randrange(2**32)), "TZ": "Pacific/Apia"})
    if ended.returncode:
        return [f"status {ended.returncode}: {ended.stderr[-600:]}"]
    different = differences(bench.expected, artifacts(elsewhere.folder / "out"))
    return [different] if different else []
