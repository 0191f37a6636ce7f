"""Pieces of HTML. Whatever is no `Html` is text, and is escaped where it enters a page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape


class Html(str):
    """Text that is HTML already."""

    __slots__ = ()


def html(value: str) -> Html:
    """Text as HTML; HTML as it is."""
    return value if isinstance(value, Html) else Html(escape(value))


def join(parts: Iterable[str], between: str = "") -> Html:
    """Parts in a row, each escaped unless it is HTML."""
    return Html(html(between).join(html(part) for part in parts))


def element(name: str, inside: str, classes: str = "") -> Html:
    """<name class="…">inside</name>"""
    named = f' class="{escape(classes)}"' if classes else ""
    return Html(f"<{name}{named}>{html(inside)}</{name}>")


def section(title: str, *parts: str) -> Html:
    """A part of the page, under a heading."""
    return element("section", join([element("h2", title), *parts]))


def paragraph(*parts: str, classes: str = "") -> Html:
    """A paragraph of text and HTML."""
    return element("p", join(parts), classes)


def tile(title: str, figure: str, note: str) -> Html:
    """One of the figures at the top of the page."""
    lines = [element("span", title), element("b", figure), element("span", note)]
    return element("div", join(lines), "tile")


def details(title: str, inside: str) -> Html:
    """What is folded away until it is asked for."""
    return element("details", join([element("summary", title), inside]))


def definitions(pairs: Iterable[tuple[str, str]]) -> Html:
    """Names and what they stand for."""
    lines = (element("dt", name) + element("dd", value) for name, value in pairs)
    return element("dl", Html("".join(lines)))


@dataclass(frozen=True)
class Column:
    """A column of a table: its head, and the class of its cells (`n`: numbers, to the right)."""

    head: str
    classes: str = ""


NUMBER = "n"


def table(
    columns: Sequence[Column], rows: Iterable[Sequence[str]], foot: Sequence[str] = ()
) -> Html:
    """A table that scrolls where the window is too narrow for it."""
    heads = (
        f'<th scope="col"{_classes(column, "th")}>{html(column.head)}</th>' for column in columns
    )
    body = "".join(_row(columns, row) for row in rows)
    end = f"<tfoot>{_row(columns, foot)}</tfoot>" if foot else ""
    return Html(
        f'<div class="scroll"><table><thead><tr>{"".join(heads)}</tr></thead>'
        f"<tbody>{body}</tbody>{end}</table></div>"
    )


def _row(columns: Sequence[Column], cells: Sequence[str]) -> str:
    inside = (
        f"<td{_classes(column, 'td')}>{html(cell)}</td>"
        for column, cell in zip(columns, cells, strict=True)
    )
    return f"<tr>{''.join(inside)}</tr>"


def _classes(column: Column, cell: str) -> str:
    shown = column.classes if cell == "td" or column.classes == NUMBER else ""
    return f' class="{shown}"' if shown else ""
