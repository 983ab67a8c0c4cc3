"""Shared fixtures: a few tiny checkpoints, made once a session; a pristine copy for tests that break them."""
from __future__ import annotations

import os
import random
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


@pytest.fixture
def chance() -> random.Random:
    """Random choices of this run. A failed test prints the seed; TEST_SEED=N replays it."""
    seed = int(os.environ.get("TEST_SEED") or random.randrange(2**32))
    print(f"TEST_SEED={seed}")
    return random.Random(seed)
