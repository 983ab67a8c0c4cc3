"""Training checkpoints. Each is written under another name, then renamed: a kill leaves the previous one intact.

A checkpoint is a folder `step-NNNNNNNN` with `state.safetensors` (trained tensors, both Adam moments, the guard's
averages) and `state.json` (step, phase, seconds). Tensors are complete, however many processes wrote them, and any
number can resume. The order of the data follows from the step, and a step draws no random numbers, so nothing else is
needed.
"""
from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lrc_edge.errors import UserError
from lrc_edge.workspace import changes, write_atomically

PARTIAL = ".partial"
STATE_FILE, FACTS_FILE = "state.safetensors", "state.json"
INPUTS_FILE = "inputs.json"  # of the run that the checkpoints belong to


def claim(run: Path, inputs: dict[str, Any]) -> None:
    """Prepare `run` as the folder of the run with these named inputs; keep it if it already belongs to that run.

    Raises UserError if it has checkpoints or finished hops of another run, which this one would otherwise resume.
    """
    mark = run / INPUTS_FILE
    before = json.loads(mark.read_text()) if mark.exists() else None
    differences = changes(before, inputs)
    if before is not None and not differences:
        return
    if latest(run / "checkpoints") or any(PARTIAL not in file.parts for file in run.rglob("*.safetensors")):
        why = f" ({'; '.join(differences)})" if differences else ""
        raise UserError(f"{run}: holds checkpoints of a run with other settings or data{why}; restore those to "
                        "continue it, or remove this folder to start again")
    shutil.rmtree(run, ignore_errors=True)
    run.mkdir(parents=True)
    write_atomically(mark, json.dumps(inputs, indent=1) + "\n")


def save(folder: Path, step: int, tensors: dict[str, torch.Tensor], facts: dict[str, Any], keep: int) -> None:
    """Write checkpoint `step` in `folder` and keep the newest `keep`. Raises UserError if the disk is full."""
    partial = folder / PARTIAL
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        save_file(tensors, partial / STATE_FILE)
        (partial / FACTS_FILE).write_text(json.dumps({"step": step, **facts}))
        for file in (partial / STATE_FILE, partial / FACTS_FILE, partial):
            _sync(file)  # a rename that survives a power cut must not name a file that does not
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        if not isinstance(error, OSError) and "os error" not in str(error):
            raise
        last = latest(folder)
        kept = f"the last good one is {last}" if last else "there was none before"
        raise UserError(f"{folder}: the checkpoint of step {step} could not be written ({error}); {kept}: free some "
                        "space, then run the same command again") from error
    target = folder / f"step-{step:08d}"
    shutil.rmtree(target, ignore_errors=True)
    os.replace(partial, target)
    _sync(folder)
    for old in _all(folder)[:-keep]:
        shutil.rmtree(old)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _all(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*"))


def latest(folder: Path) -> Path | None:
    """Return the newest checkpoint. An incomplete one still has its temporary name."""
    return (_all(folder) or [None])[-1]  # type: ignore[list-item]


def load(path: Path) -> tuple[Any, dict[str, Any]]:
    """Open a checkpoint: (safetensors file, facts). get_tensor(name) reads one tensor, so no process holds all of them.

    Raises UserError if a file was damaged after it was written.
    """
    try:
        return safe_open(path / STATE_FILE, framework="pt"), json.loads((path / FACTS_FILE).read_text())
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(f"{path}: damaged checkpoint ({error}); delete this folder to continue from the one before it, "
                        "or from the start") from error
