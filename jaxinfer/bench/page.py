"""Figures for people: one description of tables, shown on the terminal and as an HTML page."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jinja2
from markupsafe import Markup
from rich.console import Group
from rich.table import Table
from rich.text import Text

Row = tuple[str, ...]


@dataclass(frozen=True)
class Sheet:
    """A table; its first column is text, the others are figures but for `texts`."""

    title: str
    columns: Row
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()
    breaks: frozenset[int] = frozenset()
    """Rows after which a line is drawn."""
    texts: frozenset[int] = frozenset()
    """Columns that are text too."""
    marks: Mapping[tuple[int, int], str] = field(default_factory=dict)
    """On a page, of cells by row and column: good, bad or head."""

    def css(self, row: int, column: int) -> str:
        """The classes of a cell."""
        kind = "text" if column in self.texts else ""
        return f"{kind} {self.marks.get((row, column), '')}".strip()


@dataclass(frozen=True)
class Picture:
    """An SVG, and what it shows."""

    title: str
    svg: Markup


@dataclass(frozen=True)
class Page:
    """What a measurement comes to, for a page that loads nothing from elsewhere."""

    title: str
    lines: tuple[str, ...]
    tiles: tuple[tuple[str, str, str], ...]
    """Name, value and unit of the few figures that one looks at first."""
    sheets: tuple[Sheet, ...]
    pictures: tuple[Picture, ...] = ()


def shown(sheet: Sheet) -> Group:
    """For the terminal."""
    found = Table(*sheet.columns)
    for number, column in enumerate(found.columns):
        column.justify = "right" if number and number not in sheet.texts else "left"
    for number, row in enumerate(sheet.rows):
        found.add_row(*row, end_section=number in sheet.breaks)
    notes = (Text(note, style="dim") for note in sheet.notes)
    return Group(Text(sheet.title, style="bold"), found, *notes)


def html(page: Page) -> str:
    """The page."""
    source = Path(__file__).with_name("page.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(source).render(page=page, style=style())


def style() -> Markup:
    """How pages of measurements look, light or dark."""
    return Markup(Path(__file__).with_name("style.css").read_text(encoding="utf-8"))


def spread(values: Sequence[float], form: str = "{:.2f}") -> str:
    """The middle half of some values, in a word."""
    low, high = quartiles(values)[::2]
    return f"{form.format(low)} to {form.format(high)}"


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median and third quartile, linearly interpolated."""
    ordered = sorted(values)

    def at(share: float) -> float:
        place = share * (len(ordered) - 1)
        low = int(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (ordered[high] - ordered[low]) * (place - low)

    return at(0.25), at(0.5), at(0.75)
