"""Pages as a parser sees them, and as Chromium does, by the script of the docs' picture."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType

import pytest

VOID = {"meta", "br"}


def _script() -> ModuleType:
    file = Path(__file__).parents[2] / "scripts/screenshot_report.py"
    spec = importlib.util.spec_from_file_location("screenshot_report", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


screenshot_report = _script()

needs_chromium = pytest.mark.skipif(
    screenshot_report.find_chromium() is None,
    reason="no Chromium on the PATH (apt-get install chromium)",
)


@dataclass
class Cell:
    """A cell of the heat map: where it lies in its picture, its level, its title."""

    x: int
    y: int
    width: int
    height: int
    level: str
    title: str = ""


class Page(HTMLParser):
    """A page taken apart. Fails where an element is not closed, or closed by another."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.cells: list[Cell] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self._shift = (0, 0)
        self.feed(text)
        self.close()
        assert not self._open, f"never closed: {self._open}"

    @property
    def text(self) -> str:
        """All that is shown, in one line."""
        return re.sub(r"\s+", " ", " ".join(self.words))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._seen(tag, attrs)
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._seen(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open[-1:] == ["style"]:
            return
        self.words.append(data)
        if self._open[-2:] == ["rect", "title"] and self.cells and not self.cells[-1].title:
            self.cells[-1].title = data

    def _seen(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in found.items()]
        if tag == "g" and (
            place := re.match(r"translate\((\d+),(\d+)\)", found.get("transform", ""))
        ):
            self._shift = int(place[1]), int(place[2])
        if tag == "rect" and found.get("class", "").startswith("cell "):
            x, y = self._shift
            size = int(found["width"]), int(found["height"])
            self.cells.append(Cell(x + int(found["x"]), y, *size, found["class"].split()[1]))
