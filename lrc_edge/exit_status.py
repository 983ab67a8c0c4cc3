"""The exit statuses of the command line."""
from __future__ import annotations

from enum import IntEnum


class ExitStatus(IntEnum):
    """INTERRUPTED is 128 + SIGINT, as shells count."""

    PASSED = 0
    GATE_FAILED = 1
    BAD_INPUT = 2  # or a full disk, or too little memory
    NOT_CHECKED = 3  # every gate passed, but a device's runtime is not installed here
    INTERRUPTED = 130
