"""The exit statuses of the command line."""
from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import IntEnum
from typing import Any


class ExitStatus(IntEnum):
    """Exit statuses. INTERRUPTED is 128 + SIGINT, as in shells."""

    PASSED = 0
    GATE_FAILED = 1
    BAD_INPUT = 2  # or a full disk, or too little memory
    NOT_CHECKED = 3  # every gate passed, but a device's runtime is not installed here
    INTERRUPTED = 130

    @classmethod
    def of_gates(cls, gates: Iterable[Mapping[str, Any]]) -> ExitStatus:
        """Return the status for the gates in report.json."""
        return cls.PASSED if all(gate["passed"] for gate in gates) else cls.GATE_FAILED
