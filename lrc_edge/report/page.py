"""HTML pages from templates: one environment that escapes every text, and the folder's style sheets."""
from __future__ import annotations

import math
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup

from lrc_edge.figures import prose


@cache
def template(name: str) -> Template:
    environment = Environment(autoescape=True, finalize=_shown, undefined=StrictUndefined, trim_blocks=True,
                              lstrip_blocks=True)
    return environment.from_string(_file(name))


def style(*names: str) -> Markup:
    """Return these style sheets, one after the other."""
    return Markup("".join(_file(name) for name in names))


def finite(value: Any) -> Any:
    """Replace NaN and infinity, which JSON does not have, by null."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _shown(value: Any) -> Any:
    """Return what the template prints: charts unchanged, other text without hidden characters (escaped later)."""
    return value if isinstance(value, Markup) else prose(value)


def _file(name: str) -> str:
    return (files("lrc_edge.report") / name).read_text("utf-8")
