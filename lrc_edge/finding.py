"""One difference between a file and the model that it was made from."""
from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from lrc_edge.figures import visible

Severity = Literal["fault", "note"]

SHOWN = 90  # characters of one value in a text


@dataclass(frozen=True)
class Finding:
    """`name` is a stable key ("rope base"); `text` is one line for people, which starts with the name.

    severity: a "fault" changes what the file computes, or what programs do with it; a "note" changes neither.
    """

    name: str
    text: str
    severity: Severity = "fault"
    found: Any = None
    expected: Any = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "text", visible(" ".join(self.text.split())))  # which quotes files that others made


def differs(name: str, found: Any, expected: Any, why: str = "", severity: Severity = "fault") -> Finding:
    """A Finding of the form "rope base: found 10000, expected 500000 (why)"; `found` = None is shown as "nothing"."""
    reason = f" ({why})" if why else ""
    text = f"{name}: found {shown(found)}, expected {shown(expected)}{reason}"
    return Finding(name, text, severity, found, expected)


def faults(findings: Iterable[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.severity == "fault"]


def shown(value: Any) -> str:
    """Return the value as one line of limited length."""
    if value is None:
        return "nothing"
    text = f"{value:.7g}" if isinstance(value, float) else repr(value) if isinstance(value, str) else str(value)
    text = " ".join(text.split())
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}... ({len(text):,} characters)"
