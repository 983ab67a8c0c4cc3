"""A parsed report page, with its charts as XML."""
from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import Any
from xml.etree import ElementTree as ET

from lrc_edge.report.report_file import render_report

SVG = {"s": "http://www.w3.org/2000/svg"}
VOID = {"meta", "br", "link", "img", "hr", "input"}


class Page(HTMLParser):
    """Tags in order, text by section id, table rows by table id; complains about tags that do not nest."""

    def __init__(self, html: str):
        super().__init__(convert_charrefs=True)
        self.html, self.tags, self.open = html, list[tuple[str, dict[str, str | None]]](), list[tuple[str, str]]()
        self.text: dict[str, str] = {"": ""}
        self.rows: dict[str, list[list[str]]] = {}
        self.feed(html)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append((tag, dict(attrs).get("id") or ""))
        if tag == "tr":
            self.rows.setdefault(self._inside("table"), []).append([])
        if tag in ("td", "th"):
            self.rows[self._inside("table")][-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop()[0] == tag, tag

    def handle_data(self, data: str) -> None:
        if any(tag in ("style", "title") for tag, _ in self.open):
            return
        section = self._inside("section")
        self.text[section] = self.text.get(section, "") + data
        if any(tag in ("td", "th") for tag, _ in self.open):
            self.rows[self._inside("table")][-1][-1] += data

    def _inside(self, tag: str) -> str:
        return next((id_ for name, id_ in reversed(self.open) if name == tag), "")

    def svgs(self) -> list[ET.Element]:
        return [ET.fromstring(text) for text in re.findall(r"<svg.*?</svg>", self.html, re.DOTALL)]

    def words(self, section: str) -> str:
        return " ".join(self.text[section].split())


def titles(svg: ET.Element) -> list[str]:
    return [element.text or "" for element in svg.iterfind(".//s:title", SVG)]


def chart(report: dict[str, Any], name: str) -> ET.Element:
    return next(svg for svg in Page(render_report(report)).svgs() if svg.attrib["aria-label"] == name)
