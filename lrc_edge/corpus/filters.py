"""Filters: conditions on numeric fields of records, as in "score >= 4". They are parsed, never run as code."""
from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from lrc_edge.errors import UserError

COMPARISONS: dict[str, Callable[[Any, float], bool]] = {
    ">=": operator.ge, "<=": operator.le, "==": operator.eq, "!=": operator.ne, ">": operator.gt, "<": operator.lt}
_FORM = re.compile(rf"\s*([^\s<>=!]+)\s*({'|'.join(COMPARISONS)})\s*([^\s<>=!]+)\s*")
MOST_FIELDS = 40  # names of fields to remember for an error message


@dataclass(frozen=True)
class Filter:
    """One condition. A dot in `field` enters a nested table: `metadata.int_score`."""

    field: str
    comparison: str
    number: float

    @classmethod
    def parse(cls, text: str) -> Filter:
        """Raises UserError unless `text` is a field, a comparison and a finite number."""
        match = _FORM.fullmatch(text)
        number = _number(match[3]) if match else None
        if match is None or number is None:
            raise UserError(f"recipe: data.filters: {text!r} is not a condition; need a field, one of "
                            f"{' '.join(COMPARISONS)} and a number, as in 'score >= 4'")
        return cls(match[1], match[2], number)

    def __str__(self) -> str:
        return f"{self.field} {self.comparison} {self.number:g}"

    def keeps(self, value: Any, where: str) -> bool:
        """Whether a record with this value of the field is kept. Raises UserError if it is not a number."""
        if isinstance(value, bool) or not isinstance(value, int | float | Decimal):
            raise UserError(f"{where}: {self.field} is {value!r:.40}, and data.filters compares it with a number "
                            f"({self}); fix the record, or remove the filter")
        return bool(COMPARISONS[self.comparison](value, self.number))


def _number(text: str) -> float | None:
    try:
        return number if math.isfinite(number := float(text)) else None
    except ValueError:
        return None


class Filters:
    """The filters of a corpus, and the names of the fields that its records had so far.

    A record passes a filter whose field it lacks, or has as null: other sources of a mixture have no such field.
    """

    def __init__(self, texts: Iterable[str] = ()):
        """Raises UserError for a text that is not a condition."""
        self.filters = tuple(Filter.parse(text) for text in texts)
        self.fields: dict[str, None] = {}  # in the order of reading

    @property
    def columns(self) -> list[str]:
        """The fields that are compared."""
        return [one.field for one in self.filters]

    def note(self, fields: Iterable[str]) -> None:
        """Remember the names of fields that a source has."""
        if self.filters:
            full = len(self.fields) >= MOST_FIELDS
            self.fields.update(dict.fromkeys(name for name in fields if not full or name in self.columns))

    def keeps(self, record: Mapping[str, Any], where: str) -> bool:
        """Whether the record passes every filter. Raises UserError for a value that is not a number."""
        self.note(record)
        kept = True
        for one in self.filters:
            value = _value(record, one.field)
            if value is not None:
                self.fields[one.field] = None
                kept = one.keeps(value, where) and kept
        return kept

    def check_found(self) -> None:
        """Raise UserError if no record had the field of a filter, which is then misspelt, or has no effect."""
        for one in self.filters:
            if one.field not in self.fields:
                found = ", ".join(self.fields) or "none: no source is jsonl, parquet or of the hub"
                raise UserError(f"data.filters: no record has a field {one.field!r} with a value to compare ({one}); "
                                f"fields found: {found}; correct the name, or remove the filter")


def _value(record: Mapping[str, Any], field: str) -> Any:
    """Return the value of a field, by its name or by its path through nested tables; None if there is none."""
    if field in record:
        return record[field]
    value: Any = record
    for part in field.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value
