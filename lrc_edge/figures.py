"""Format numbers and third-party text for people: sizes, counts, small numbers, invisible characters."""
from __future__ import annotations

import math
from typing import Any

NONE = "–"
_JOINER = "\u200d"  # holds emoji sequences together


def human_bytes(n: float | None) -> str:
    """12_900_000 -> "12.9 MB"; powers of 1000, as for disks and downloads."""
    return _scaled(n, ("B", "kB", "MB", "GB", "TB"), 1000)


def human_count(n: float | None) -> str:
    """12_900_000 -> "12.9 M"."""
    return _scaled(n, ("", "k", "M", "B", "T"), 1000).strip()


def _scaled(n: float | None, units: tuple[str, ...], base: int) -> str:
    if not is_number(n):
        return NONE
    assert n is not None
    power = 0
    while abs(n) >= 999.5 and power < len(units) - 1:
        n, power = n / base, power + 1
    digits = 0 if power == 0 or abs(n) >= 99.95 else 1 if abs(n) >= 9.995 else 2
    return f"{n:,.{digits}f} {units[power]}"


def tick(text: str) -> str:
    """Shorten a human_bytes or human_count for an axis: "2.00 MB" -> "2 MB"."""
    number, _, unit = text.partition(" ")
    return f"{number.rstrip('0').rstrip('.') if '.' in number else number} {unit}".strip()


def figure(x: Any, digits: int = 3) -> str:
    """Format a number with `digits` significant digits: "0.0313", "1.7e-9", "8,190", "0"; a dash for None."""
    if not is_number(x):
        return NONE
    if x == 0:
        return "0"
    if not 1e-4 <= abs(x) < 1e9:
        mantissa, exponent = f"{x:.{digits - 1}e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.') if '.' in mantissa else mantissa}e{int(exponent)}"
    if abs(x) >= 10 ** (digits - 1):
        return f"{x:,.0f}"
    # Trailing zeros of fractions are dropped: a limit of 0.15 is printed as its author wrote it, not as 0.150.
    return f"{x:.{digits - 1 - math.floor(math.log10(abs(x)))}f}".rstrip("0").rstrip(".")


def percent(share: Any) -> str:
    """Format a share as "99.95 %", rounded down, so that less than all is never shown as 100 %."""
    if not is_number(share):
        return NONE
    hundredths = math.floor(share * 10_000 + 1e-9)
    return f"{hundredths / 100:.2f}".rstrip("0").rstrip(".") + " %"


def duration(seconds: Any) -> str:
    """ "48 s", "12 min", "3 h 05 min"."""
    if not is_number(seconds):
        return NONE
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


def is_number(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x)


def visible(text: Any, *, keep: str = "") -> str:
    """Escape what is invisible in third-party text: control characters, terminal escapes, direction marks, odd spaces
    and lone surrogates appear as \\x1b, \\u202e, \\xa0. keep: characters that are not escaped."""
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in str(text))


def prose(text: Any) -> str:
    """`visible` for running text: line breaks, tabs and joined emoji are kept."""
    return visible(text, keep="\n\t" + _JOINER)
