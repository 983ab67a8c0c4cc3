"""Shared fixtures: a few tiny checkpoints, made once a session; a pristine copy for tests that break them."""
from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from tiny_models import make_tiny


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied llama with head_dim != hidden_size / heads. Read only: copy it to change it."""
    return make_tiny(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture
def llama_copy(tiny_llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama, tmp_path / "tiny-llama"))
