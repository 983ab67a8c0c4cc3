"""Folders of the checkout that tests read."""
from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NODE = ROOT / "tests" / "node"
STORYTELLER = ROOT / "examples" / "demo" / "storyteller"  # the demo's teacher
