"""Stages meet through the dense student and files: none imports another, and the core imports none."""
from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
STAGES = {"train", "export", "targets"}
JOINS_THE_STAGES = ROOT / "lrc_edge" / "pipeline"  # and nothing else may


def imported(file: Path) -> set[str]:
    """Modules of lrc_edge that the file imports anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name.startswith("lrc_edge.")}


def imported_stages(file: Path) -> set[str]:
    return {name.split(".")[1] for name in imported(file)} & STAGES


def sources(folder: str) -> list[Path]:
    """Python files below the folder; the core's links to the stage folders are not followed."""
    files = [file for file in (ROOT / folder).rglob("*.py") if not any(part.is_symlink() for part in file.parents)]
    assert files
    return files


@pytest.mark.parametrize("folder", ["lrc_edge", *sorted(STAGES)])
def test_imports(folder: str) -> None:
    for file in sources(folder):
        if JOINS_THE_STAGES not in file.parents:
            assert imported_stages(file) <= {folder}, file


def test_the_test_sees_imports() -> None:
    assert imported_stages(JOINS_THE_STAGES / "plan.py") == {"export", "targets"}
