"""Small SVG charts for the report: lines, bars on a logarithmic scale, labelled points.

Built as element trees, so names from a teacher's files cannot break out of the markup. Colours are classes that
report.css gives for light and dark; a chart is drawn for a width of 480 and scales with its column. Lengths in SVG
units (about a pixel), text widths estimated.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from xml.etree import ElementTree as ET

from lrc_edge.figures import figure, visible

WIDTH = 480
CHAR = 6.6  # width of one character in the charts' text
LINE = 14.0  # height of a line of text


@dataclass(frozen=True)
class Series:
    """One line, or points alone. `css` is a class of report.css: c1 ... c4."""

    name: str
    css: str
    points: tuple[tuple[float, float], ...]
    dots: bool = False


@dataclass(frozen=True)
class Bar:
    """One row of the KL chart. None draws nothing. 0 is written as text: a logarithmic scale cannot show it."""

    label: str
    values: tuple[tuple[str, float | None], ...]  # (name, value): one thin bar each
    limit: float | None
    failed: bool


@dataclass(frozen=True)
class Point:
    label: str  # next to the point
    name: str  # in the tooltip, with the note
    x: float
    y: float
    css: str
    note: str
    y_error: float = 0.0
    radius: float = 5.0


@dataclass(frozen=True)
class Line:
    """Horizontal and vertical strokes from point to point. `css` is a class of report.css: front."""

    name: str
    css: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Level:
    """A vertical line across a chart at x. `css` is a class of report.css: level, limit."""

    name: str
    x: float
    css: str


class Scale:
    """Data -> pixels, linear or logarithmic, with round ticks inside [low, high]."""

    def __init__(self, values: Sequence[float], pixels: tuple[float, float], *, log: bool = False, pad: float = 0.06):
        self.log, self.pixels = log, pixels
        data = [math.log10(v) if log else v for v in values]
        self.low, self.high = min(data), max(data)
        spread = self.high - self.low
        if not spread:
            spread, pad = 0.3 if log else abs(self.high) * 0.1 or 1.0, pad or 0.06
        self.low, self.high = self.low - pad * spread, self.high + pad * spread

    def at(self, value: float) -> float:
        data = math.log10(value) if self.log else value
        share = (data - self.low) / (self.high - self.low)
        return self.pixels[0] + min(1.0, max(0.0, share)) * (self.pixels[1] - self.pixels[0])

    def ticks(self, wanted: int = 5) -> list[float]:
        return self._log_ticks(wanted) if self.log else self._linear_ticks(wanted)

    def _linear_ticks(self, wanted: int) -> list[float]:
        raw = (self.high - self.low) / wanted
        unit = 10.0 ** math.floor(math.log10(raw))
        step = next(unit * m for m in (1, 2, 5, 10) if unit * m >= raw)
        first, last = math.ceil(self.low / step), math.floor(self.high / step)
        return [i * step for i in range(first, last + 1)]

    def _log_ticks(self, wanted: int) -> list[float]:
        """Return decades, every n-th if there are many, or 1-2-5 steps if there are few."""
        decades = range(math.floor(self.low), math.ceil(self.high) + 1)
        for digits in ((1,), (1, 3), (1, 2, 5)):
            ticks = [d * 10.0**e for e in decades for d in digits if self.low <= math.log10(d * 10.0**e) <= self.high]
            if len(ticks) >= 3:
                break
        if len(ticks) < 2:
            return [t for t in _linear(10**self.low, 10**self.high) if t > 0]
        return ticks[::math.ceil(len(ticks) / (wanted + 2))]


def _linear(low: float, high: float) -> list[float]:
    return Scale((low, high), (0, 1), pad=0).ticks(4)


def _svg(height: float, name: str) -> ET.Element:
    return ET.Element("svg", {"xmlns": "http://www.w3.org/2000/svg", "viewBox": f"0 0 {WIDTH} {height:g}",
                              "role": "img", "class": "chart", "aria-label": visible(name)})


def _add(parent: ET.Element, tag: str, css: str, title: str = "", **attributes: float | str) -> ET.Element:
    values = {key.replace("_", "-"): f"{v:.2f}".rstrip("0").rstrip(".") if isinstance(v, float) else str(v)
              for key, v in attributes.items()}
    element = ET.SubElement(parent, tag, {"class": css, **values})
    if title:
        ET.SubElement(element, "title").text = visible(title)
    return element


def _text(parent: ET.Element, x: float, y: float, text: str, css: str = "", anchor: str = "start",
          title: str = "") -> ET.Element:
    element = _add(parent, "text", css, x=x, y=y, text_anchor=anchor)
    element.text = visible(text)
    if title:
        ET.SubElement(element, "title").text = visible(title)
    return element


def shortened(text: str, width: int) -> str:
    """Shorten to at most `width` characters by cutting the middle: names differ at their ends."""
    if len(text) <= width:
        return text
    head = (width - 1) // 2
    return f"{text[:head]}…{text[len(text) - (width - 1 - head):]}"


def _frame(svg: ET.Element, x: Scale, y: Scale, x_tick: Callable[[float], str], y_tick: Callable[[float], str],
           x_name: str, y_name: str) -> None:
    """Grid lines, tick labels and axis names."""
    (left, right), (bottom, top) = x.pixels, y.pixels
    for tick in y.ticks():
        at = y.at(tick)
        _add(svg, "line", "grid", x1=left, x2=right, y1=at, y2=at)
        _text(svg, left - 6, at + 4, y_tick(tick), "tick", "end")
    for tick in x.ticks():
        _add(svg, "line", "grid", x1=x.at(tick), x2=x.at(tick), y1=bottom, y2=bottom + 4)
        _text(svg, x.at(tick), bottom + 17, x_tick(tick), "tick", "middle")
    _add(svg, "line", "axis", x1=left, x2=right, y1=bottom, y2=bottom)
    _text(svg, right, bottom + 34, x_name, "name", "end")
    _text(svg, 4, top - 10, y_name, "name")


def _legend(svg: ET.Element, entries: Sequence[tuple[str, str]], y: float) -> float:
    """Coloured strokes with their names, in rows; returns the y below them."""
    x = 4.0
    for name, css in entries:
        width = 26 + CHAR * len(name) + 12
        if x > 4 and x + width > WIDTH:
            x, y = 4.0, y + LINE + 3
        if css.startswith("dot "):
            _add(svg, "circle", css, cx=x + 10, cy=y - 4, r=4)
        else:
            _add(svg, "line", f"line {css}", x1=x, x2=x + 20, y1=y - 4, y2=y - 4)
        _text(svg, x + 26, y, name, "label")
        x += width
    return y + LINE


def line_chart(name: str, series: Sequence[Series], *, x_name: str, y_name: str, x_tick: Callable[[float], str],
               log: bool = False, level: tuple[str, float] | None = None) -> str:
    """Lines over x with a legend; `level` is a dashed horizontal line. Needs at least one point."""
    svg = _svg(320, name)
    entries = [(s.name, f"dot {s.css}" if s.dots else s.css) for s in series]
    top = _legend(svg, [*entries, (level[0], "level")] if level else entries, 14) + 18
    xs = [x for s in series for x, _ in s.points]
    ys = [y for s in series for _, y in s.points] + ([level[1]] if level else [])
    x, y = Scale(xs, (52, WIDTH - 8), pad=0), Scale(ys, (278, top), log=log)
    _frame(svg, x, y, x_tick, figure, x_name, y_name)
    if level:
        _add(svg, "line", "line level", f"{level[0]}: {figure(level[1], 4)}", x1=52, x2=WIDTH - 8, y1=y.at(level[1]),
             y2=y.at(level[1]))
    for s in series:
        if len(s.points) > 1:
            path = " ".join(f"{x.at(px):.1f},{y.at(py):.1f}" for px, py in s.points)
            _add(svg, "polyline", f"line {s.css}" + " thin" * s.dots, points=path)
        for px, py in s.points:
            css = f"dot {s.css}" if s.dots or len(s.points) == 1 else "hit"
            _add(svg, "circle", css, f"{s.name} {figure(py, 4)} at {x_tick(px)}", cx=x.at(px), cy=y.at(py),
                 r=3.5 if "dot" in css else 5)
    return ET.tostring(svg, encoding="unicode")


def bar_chart(name: str, bars: Sequence[Bar], *, value_name: str, limit_name: str = "limit") -> str:
    """Horizontal bars on a logarithmic scale, each with its limit as a stroke across the row."""
    whats = list(dict.fromkeys(what for bar in bars for what, _ in bar.values))
    label_chars = min(24, max(len(bar.label) for bar in bars))
    left, right = 8 + CHAR * label_chars + 6, WIDTH - 70
    row = 9.0 * len(whats) + 15
    entries = [(what, f"c{i + 1} thick") for i, what in enumerate(whats)] + [(limit_name, "limit")]
    probe = ET.Element("svg")
    top = _legend(probe, entries, 14) + 6
    bottom = top + row * len(bars)
    svg = _svg(bottom + 40, name)
    _legend(svg, entries, 14)
    found = [v for bar in bars for v in (*(v for _, v in bar.values), bar.limit) if v]
    x = Scale([10.0 ** math.floor(math.log10(min(found)) - 0.3), max(found)] if found else [0.1, 1], (left, right),
              log=True, pad=0.02)
    for tick in x.ticks():
        _add(svg, "line", "grid", x1=x.at(tick), x2=x.at(tick), y1=top, y2=bottom)
        _text(svg, x.at(tick), bottom + 16, figure(tick), "tick", "middle")
    _text(svg, right, bottom + 33, value_name, "name", "end")
    for i, bar in enumerate(bars):
        _bar(svg, bar, whats, x, top + i * row, row, label_chars)
    return ET.tostring(svg, encoding="unicode")


def _bar(svg: ET.Element, bar: Bar, whats: list[str], x: Scale, y: float, row: float, label_chars: int) -> None:
    left = x.pixels[0]
    limit = f", limit {figure(bar.limit)}" if bar.limit is not None else ""
    _text(svg, left - 8, y + row / 2 + 4, shortened(bar.label, label_chars), "label" + " bad" * bar.failed, "end",
          title=bar.label)
    for what, value in bar.values:
        at = y + 7.5 + 9.0 * whats.index(what)
        if value:
            _add(svg, "rect", f"bar c{whats.index(what) + 1}" + " bad" * bar.failed,
                 f"{bar.label} {what}: {figure(value, 4)}{limit}", x=left, y=at, width=max(1.5, x.at(value) - left),
                 height=7.0, rx=1.5)
        elif value == 0:
            _add(svg, "rect", "bar zero", f"{bar.label} {what}: exactly 0{limit}", x=left, y=at, width=2.0, height=7.0)
    if bar.limit:
        _add(svg, "line", "line limit", f"{bar.label}: limit {figure(bar.limit)}", x1=x.at(bar.limit),
             x2=x.at(bar.limit), y1=y + 3, y2=y + row - 3)
    worst = max((v for _, v in bar.values if v is not None), default=None)
    _text(svg, WIDTH - 4, y + row / 2 + 4, "exactly 0" if worst == 0 else figure(worst),
          "label" + " bad" * bar.failed, "end")


def point_chart(name: str, points: Sequence[Point], *, x_name: str, y_name: str, x_tick: Callable[[float], str],
                log_y: bool = False, line: Line | None = None, levels: Sequence[Level] = ()) -> str:
    """Labelled points over a logarithmic x; `y_error` draws a whisker. y must be positive when log_y.

    line: below the points. A level far from all points has its name in the legend, but is not drawn.
    """
    height = 320 + 5 * max(0, len(points) - 8)
    svg = _svg(height, name)
    ends = [p.y + sign * p.y_error for p in points for sign in (-1, 1)]
    drawn = [level for level in levels if _is_near(level.x, [p.x for p in points])]
    entries = [(line.name, line.css)] if line else []
    entries += [(level.name if level in drawn else f"{level.name}, off the chart", level.css) for level in levels]
    top = _legend(svg, entries, 14) + 18 if entries else 26
    x = Scale([*(p.x for p in points), *(level.x for level in drawn)], (52, WIDTH - 14), log=True, pad=0.12)
    y = Scale([e for e in ends if e > 0] if log_y else ends, (height - 44, top), log=log_y, pad=0.14)
    _frame(svg, x, y, x_tick, figure, x_name, y_name)
    for level in drawn:
        _add(svg, "line", f"line {level.css}", level.name, x1=x.at(level.x), x2=x.at(level.x), y1=top, y2=height - 44)
    corners = [(x.at(px), y.at(py)) for px, py in line.points] if line else []
    if line:
        _add(svg, "polyline", f"line {line.css}", points=" ".join(f"{px:.1f},{py:.1f}" for px, py in corners))
    spots = [(x.at(p.x), y.at(p.y)) for p in points]
    taken = [(sx - p.radius - 1, sy - p.radius - 1, sx + p.radius + 1, sy + p.radius + 1)
             for p, (sx, sy) in zip(points, spots, strict=True)]
    taken += [(x.at(level.x) - 2, top, x.at(level.x) + 2, height) for level in drawn]
    taken += [(min(ax, bx), min(ay, by), max(ax, bx), max(ay, by)) for (ax, ay), (bx, by) in pairwise(corners)]
    marks: list[ET.Element] = []
    for p, (sx, sy) in zip(points, spots, strict=True):
        if p.y_error:
            _add(svg, "line", f"whisker {p.css}", x1=sx, x2=sx, y1=y.at(max(p.y - p.y_error, 1e-300) if log_y else
                 p.y - p.y_error), y2=y.at(p.y + p.y_error))
        _label(svg, shortened(p.label, 30), p.name, (sx, sy), p.radius, taken, (54, top - 6, WIDTH - 4, height - 48))
        marks.append(_add(svg, "circle", f"dot {p.css}", f"{p.name}: {p.note}", cx=sx, cy=sy, r=p.radius))
    # Above every leader line, and the small above the large: two artifacts may share one spot.
    for mark in sorted(marks, key=lambda mark: -float(mark.attrib["r"])):
        svg.remove(mark)
        svg.append(mark)
    return ET.tostring(svg, encoding="unicode")


def _is_near(value: float, points: Sequence[float]) -> bool:
    """Whether the value is less than half the points' range, on a logarithmic scale, away from them."""
    low, high = math.log10(min(points)), math.log10(max(points))
    margin = (high - low) / 2 or 0.1
    return low - margin < math.log10(value) < high + margin


def _label(svg: ET.Element, text: str, title: str, spot: tuple[float, float], radius: float,
           taken: list[tuple[float, float, float, float]], area: tuple[float, float, float, float]) -> None:
    """Put the text at the nearest free place around the point, with a leader line if that is not next to the point."""
    width, (sx, sy) = CHAR * len(text) + 4, spot
    for ring in range(40):
        away = radius + 4.0 + 9.0 * ring
        for step in range(16):
            angle = math.tau * step / 16
            cx, cy = sx + (away + width / 2) * math.cos(angle), sy + (away + 2) * math.sin(angle)
            box = (cx - width / 2, cy - LINE / 2, cx + width / 2, cy + LINE / 2)
            inside = box[0] >= area[0] and box[1] >= area[1] and box[2] <= area[2] and box[3] <= area[3]
            if inside and not any(_overlap(box, other) for other in taken):
                taken.append(box)
                if ring:
                    _add(svg, "line", "leader", x1=sx, y1=sy, x2=min(max(sx, box[0]), box[2]),
                         y2=min(max(sy, box[1]), box[3]))
                _text(svg, cx, cy + 4, text, "label", "middle", title=title)
                return
    # No free place: the tooltip and the table still name the point.


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
