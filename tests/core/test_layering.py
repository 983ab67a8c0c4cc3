"""Stages meet through the dense student and files: none imports another, and the core imports none."""
from __future__ import annotations

import ast
import tomllib
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from paths import ROOT

STAGES = {"train", "export", "targets"}
JOINS_THE_STAGES = ROOT / "lrc_edge" / "pipeline"  # and nothing else may
LONGEST_FUNCTION = 50  # lines


def sources(folder: str) -> list[Path]:
    """Python files below the folder; the core's links to the stage folders are not followed."""
    files = [file for file in (ROOT / folder).rglob("*.py") if not any(part.is_symlink() for part in file.parents)]
    assert files
    return files


def module_of(file: Path) -> str:
    """lrc_edge.train.clone of train/clone.py."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in ("lrc_edge", *parts[parts[0] == "lrc_edge":]) if part != "__init__")


MODULES = {module_of(file): file for folder in ("lrc_edge", *sorted(STAGES)) for file in sources(folder)}


def imported(file: Path) -> set[str]:
    """Modules of lrc_edge that the file imports, anywhere in it but for type checkers alone."""
    tree = ast.parse(file.read_text())
    for_checkers = {id(node) for block in ast.walk(tree) if isinstance(block, ast.If)
                    and ast.unparse(block.test) == "TYPE_CHECKING" for node in ast.walk(block)}
    found: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in for_checkers:
            continue
        if isinstance(node, ast.ImportFrom):
            found |= {name if (name := f"{node.module}.{alias.name}") in MODULES else str(node.module)
                      for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & MODULES.keys()


def imported_stages(file: Path) -> set[str]:
    return {name.split(".")[1] for name in imported(file) if name.count(".")} & STAGES


@pytest.mark.parametrize("folder", ["lrc_edge", *sorted(STAGES)])
def test_imports(folder: str) -> None:
    for file in sources(folder):
        if JOINS_THE_STAGES not in file.parents:
            assert imported_stages(file) <= {folder}, file


def test_the_test_sees_imports() -> None:
    assert imported_stages(JOINS_THE_STAGES / "commands.py") == {"targets", "train"}


def test_every_package_is_installed() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted(name for name, file in MODULES.items() if file.name == "__init__.py")


def test_no_module_imports_itself_through_others() -> None:
    graph = {name: imported(file) - {name} for name, file in MODULES.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(error.args[1]))


def test_functions_are_short() -> None:
    for name, file in MODULES.items():
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef):
                n_lines = (node.end_lineno or node.lineno) - node.lineno + 1
                assert n_lines <= LONGEST_FUNCTION, f"{name}.{node.name}"
