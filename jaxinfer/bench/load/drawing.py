"""Lines and bars as SVG text; colours come from the page, so that it can be light or dark."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

LEFT, RIGHT, TOP, BOTTOM = 56.0, 14.0, 14.0, 38.0


@dataclass(frozen=True)
class Plot:
    """A frame with two linear axes from 0."""

    width: float
    height: float
    max_x: float
    max_y: float
    label_x: str
    label_y: str

    def x(self, value: float) -> float:
        """Where a value lies from the left."""
        return LEFT + (self.width - LEFT - RIGHT) * value / self.max_x

    def y(self, value: float) -> float:
        """Where a value lies from the top."""
        return self.height - BOTTOM - (self.height - TOP - BOTTOM) * value / self.max_y

    def path(
        self, points: Iterable[tuple[float, float]], kind: str, *, closed: bool = False
    ) -> str:
        """A line through values; a closed one is an area down to the axis."""
        found = [(self.x(x), self.y(y)) for x, y in points]
        if not found:
            return ""
        drawn = "M" + " L".join(f"{x:.1f},{y:.1f}" for x, y in found)
        if closed:
            floor = self.y(0.0)
            drawn += f" L{found[-1][0]:.1f},{floor:.1f} L{found[0][0]:.1f},{floor:.1f} Z"
        return f'<path class="{kind}" d="{drawn}"/>'

    def dot(self, x: float, y: float, kind: str, said: str) -> str:
        """A point that says something when pointed at."""
        return (
            f'<circle class="{kind}" cx="{self.x(x):.1f}" cy="{self.y(y):.1f}" r="4.5">'
            f"<title>{escape(said)}</title></circle>"
        )

    def text(self, x: float, y: float, said: str) -> str:
        """A word beside a value."""
        return text(self.x(x) + 8, self.y(y) + 15, said, "mark", "start")

    def bound(self, value: float, said: str, *, across: bool = False) -> str:
        """A dashed line at a bound: upright, or across the plot."""
        if not 0 <= value <= (self.max_y if across else self.max_x):
            return ""
        if across:
            at = self.y(value)
            line = (LEFT, at, self.width - RIGHT, at)
            place, anchor = (LEFT + 6, at + 14), "start"
        else:
            at = self.x(value)
            line = (at, TOP, at, self.height - BOTTOM)
            is_right = at > self.width * 0.6
            place = (at - 5 if is_right else at + 5, self.height - BOTTOM - 8)
            anchor = "end" if is_right else "start"
        x1, y1, x2, y2 = line
        return (
            f'<line class="bound" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'
            + text(place[0], place[1], said, "bound-text", anchor)
        )

    def svg(self, *marks: str) -> Markup:
        """The whole picture: grid and axes first, then the marks."""
        return svg(self.width, self.height, self._grid(), *marks)

    def _grid(self) -> str:
        parts = []
        for value in ticks(self.max_y, 4):
            at = self.y(value)
            parts.append(
                f'<line class="grid" x1="{LEFT}" y1="{at:.1f}" x2="{self.width - RIGHT}" '
                f'y2="{at:.1f}"/>' + text(LEFT - 7, at + 4, _number(value), "tick", "end")
            )
        for value in ticks(self.max_x, 6):
            at = self.x(value)
            parts.append(text(at, self.height - BOTTOM + 16, _number(value), "tick", "middle"))
        floor = self.height - BOTTOM
        parts.append(
            f'<line class="axis" x1="{LEFT}" y1="{floor}" x2="{self.width - RIGHT}" y2="{floor}"/>'
        )
        middle = (LEFT + self.width - RIGHT) / 2
        parts.append(text(middle, self.height - 5, self.label_x, "label", "middle"))
        across = (TOP + self.height - BOTTOM) / 2
        parts.append(
            f'<text class="label" text-anchor="middle" transform="translate(12 {across:.0f}) '
            f'rotate(-90)">{escape(self.label_y)}</text>'
        )
        return "".join(parts)


def svg(width: float, height: float, *marks: str) -> Markup:
    """A picture as wide as its place on the page."""
    head = f'<svg viewBox="0 0 {width:g} {height:g}" role="img" xmlns="http://www.w3.org/2000/svg">'
    return Markup(head + "".join(marks) + "</svg>")


def text(x: float, y: float, said: str, kind: str, anchor: str) -> str:
    """A word or two."""
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text class="{kind}" {place}>{escape(said)}</text>'


def bar(x: float, y: float, width: float, height: float, kind: str) -> str:
    """A rectangle; one too thin to see is left out."""
    if width < 0.05:
        return ""
    return (
        f'<rect class="{kind}" x="{x:.2f}" y="{y:.2f}" width="{width:.2f}" height="{height:.2f}"/>'
    )


def ticks(top: float, count: int) -> Sequence[float]:
    """Round values from 0 to `top`, about so many."""
    if not top > 0:
        return (0.0,)
    rough = top / count
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * one for one in (1, 2, 2.5, 5, 10) if unit * one >= rough * 0.999)
    return tuple(step * place for place in range(int(top / step * 1.0001) + 1))


def _number(value: float) -> str:
    return f"{value:.10g}" if value < 10_000 else f"{value / 1000:.10g}k"
