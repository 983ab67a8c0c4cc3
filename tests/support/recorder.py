"""What long work reports of its progress, kept to be looked at."""
from __future__ import annotations


class Recorder:
    """Implements lrc_edge.console.Listener."""

    def __init__(self) -> None:
        self.total: float | None = None
        self.unit: str | None = None
        self.updates: list[tuple[str, float | None]] = []

    def expect(self, total: float | None, unit: str | None = None) -> None:
        self.total, self.unit = total, unit

    def update(self, detail: str, completed: float | None = None) -> None:
        self.updates.append((detail, completed))

    @property
    def completed(self) -> list[float]:
        """In the order of the updates that say it; raises AssertionError unless it grows from 0 to below the total."""
        found = [completed for _, completed in self.updates if completed is not None]
        assert found[0] == 0 and found == sorted(found) and self.total is not None and found[-1] <= self.total
        return found
