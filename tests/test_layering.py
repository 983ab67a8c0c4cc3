"""Stages meet through the dense student and files: none imports another, and the core imports none."""
from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
STAGES = {"train", "export", "targets"}
JOINS_THE_STAGES = {"calibrate.py", "commands.py", "pipeline.py", "preflight.py", "target_checks.py",
                    "target_commands.py", "training.py", "verify.py"}  # and nothing else may


def imported_stages(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("lrc_edge.") and name.split(".")[1] in STAGES}
    return found


@pytest.mark.parametrize("folder", ["lrc_edge", *sorted(STAGES)])
def test_imports(folder: str) -> None:
    files = [f for f in (ROOT / folder).rglob("*.py") if f.name not in JOINS_THE_STAGES]
    assert files
    for file in files:
        assert imported_stages(file) <= {folder}, file


def test_the_test_sees_imports() -> None:
    assert imported_stages(ROOT / "lrc_edge" / "pipeline.py") == STAGES
