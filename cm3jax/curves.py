"""Training curves as small inline SVG, in the colours of the page that they stand in."""

import dataclasses
import math

from markupsafe import Markup

WIDTH, HEIGHT = 400, 220
"""Size of a chart in its own units; a page shows it at 320 to 440 pixels, so that a label stays readable."""
LEFT, RIGHT, TOP, BOTTOM = 42, 392, 12, 190
POINTS = 300
"""Points of a line at most; more would only make the file larger."""
SETTLED = 0.02
"""Share of the steps whose values do not stretch the vertical axis: untrained weights would flatten the rest."""

Number = int | float
Point = tuple[Number, Number]


@dataclasses.dataclass(frozen=True)
class Line:
    """One curve: the class that the page's style sheet colours, and its (step, value) points, step ascending."""

    style: str
    points: list[Point]


def series(lines: list[dict], name: str) -> list[Point]:
    """Return the (step, value) of one name in a metrics.jsonl's objects, without values that are not finite."""
    found = [(line["step"], line[name]) for line in lines if name in line]
    return [(step, value) for step, value in found if math.isfinite(value)]


def thin(points: list[Point], most: int = POINTS) -> list[Point]:
    """Return at most `most` points, each the mean of a run of neighbours."""
    size = -(-len(points) // most)
    runs = [points[i : i + size] for i in range(0, len(points), size)] if points else []
    return [(sum(x for x, _ in run) / len(run), sum(y for _, y in run) / len(run)) for run in runs]


def ticks(low: Number, high: Number, most: int = 5) -> list[Number]:
    """Return round numbers from low to high, at most `most` + 1, in steps of 1, 2 or 5 times a power of ten."""
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(s * power for s in (1, 2, 5, 10) if s * power >= raw * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def label(value: Number) -> str:
    """Return 120000.0 as "120k", 0.30000000000000004 as "0.3"."""
    if abs(value) >= 1e6:
        return f"{value / 1e6:.4g}M"
    return f"{value / 1e3:.4g}k" if abs(value) >= 1e4 else f"{value:.4g}"


def limits(lines: list[Line], low: Number | None = None, high: Number | None = None) -> tuple[Number, Number]:
    """Return the range of the vertical axis: of what is seen once training has settled, with a little room."""
    end = max(x for line in lines for x, _ in line.points)
    values = [y for line in lines for x, y in line.points if x >= SETTLED * end]
    bottom, top = min(values) if low is None else low, max(values) if high is None else high
    room = 0.05 * (top - bottom) or 0.05 * abs(top) or 1.0
    return (bottom - room if low is None else low), (top + room if high is None else high)


def svg(title: str, lines: list[Line], low: Number | None = None, high: Number | None = None) -> Markup:
    """Return a chart of value over step.

    Args:
      title: Read aloud to those who do not see it.
      lines: At least one, with at least one point.
      low, high: Ends of the vertical axis, where they are known.
    """
    lines = [Line(line.style, thin(line.points)) for line in lines if line.points]
    bottom, top = limits(lines, low, high)
    end = max(x for line in lines for x, _ in line.points) or 1

    def x(step: Number) -> Number:
        return LEFT + (RIGHT - LEFT) * step / end

    def y(value: Number) -> float:
        return BOTTOM - (BOTTOM - TOP) * (value - bottom) / (top - bottom)

    grid = "".join(
        f'<path class="grid" d="M{LEFT} {y(v):.1f}H{RIGHT}"/><text x="{LEFT - 6}" y="{y(v) + 4:.1f}" '
        f'text-anchor="end">{label(v)}</text>'
        for v in ticks(bottom, top)
    )
    steps = "".join(
        f'<text x="{x(v):.1f}" y="{BOTTOM + 18}" text-anchor="{"end" if x(v) > RIGHT - 12 else "middle"}">'
        f"{label(v)}</text>"
        for v in ticks(0, end)
    )
    drawn = "".join(
        curve(line.style, [(x(a), min(max(y(b), TOP - 4), HEIGHT)) for a, b in line.points]) for line in lines
    )
    head = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img"><title>{Markup.escape(title)}</title>'
    return Markup(f"{head}{grid}{steps}{drawn}</svg>")


def curve(style: str, points: list[Point]) -> str:
    """Return a line through points; few points are marked, since one alone draws no line."""
    path = "L".join(f"{a:.1f} {b:.1f}" for a, b in points)
    dots = "".join(f'<circle cx="{a:.1f}" cy="{b:.1f}" r="2.5"/>' for a, b in points) if len(points) <= 40 else ""
    return f'<g class="{style}"><path d="M{path}"/>{dots}</g>'


# ----------------------------------------------------------------------------------------------------------- figures

COLOURS = ("#1f77b4", "#d95f02", "#1b9e77", "#7570b3", "#e7298a", "#666666")
"""Of a figure's lines, in order; readable on white."""


@dataclasses.dataclass(frozen=True)
class Spread:
    """One line of a figure: its name, and per point x, mean and the least and greatest of what the mean is of.

    Attributes:
      hollow: The same quantity as the line before it, another way: its colour, and rings in place of dots.
    """

    name: str
    points: list[tuple[Number, Number, Number, Number]]
    hollow: bool = False


def figure(title: str, across: str, up: str, lines: list[Spread], doublings: bool = False) -> Markup:
    """Return a chart that stands alone, as an SVG file does, with a whisker from least to greatest at each point.

    Args:
      across, up: What the two axes are of.
      lines: At least one, with at least one point.
      doublings: The same way across from each x to its double; all must be above 0.
    """
    along = math.log2 if doublings else float
    xs = sorted({x for line in lines for x, *_ in line.points})
    ends = [y for line in lines for _, _, *both in line.points for y in both]
    first, last = along(xs[0]), along(xs[-1] if len(xs) > 1 else xs[0] + 1)
    room = 0.05 * (max(ends) - min(ends)) or 0.05 * abs(max(ends)) or 1.0
    bottom, top = min(ends) - room, max(ends) + room
    place = lambda x: LEFT + 14 + (RIGHT - LEFT - 28) * (along(x) - first) / (last - first)  # noqa: E731
    height = lambda y: BOTTOM - (BOTTOM - TOP) * (y - bottom) / (top - bottom)  # noqa: E731
    parts = [
        f'<path d="M{LEFT} {height(v):.1f}H{RIGHT}" stroke="#ddd"/><text x="{LEFT - 6}" y="{height(v) + 4:.1f}"'
        f' text-anchor="end">{label(v)}</text>'
        for v in ticks(bottom, top)
    ]
    parts += [f'<text x="{place(x):.1f}" y="{BOTTOM + 16}" text-anchor="middle">{label(x)}</text>' for x in xs]
    parts.append(
        f'<text x="{(LEFT + RIGHT) / 2}" y="{BOTTOM + 32}" text-anchor="middle">{Markup.escape(across)}</text>'
    )
    for i, line in enumerate(lines):
        filled = sum(not before.hollow for before in lines[: i + 1])
        colour, points = COLOURS[max(0, filled - 1) % len(COLOURS)], sorted(line.points)
        inside = "white" if line.hollow else colour
        path = "L".join(f"{place(x):.1f} {height(y):.1f}" for x, y, _, _ in points)
        parts.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for x, y, low, high in points:
            parts.append(
                f'<path d="M{place(x):.1f} {height(low):.1f}V{height(high):.1f}" stroke="{colour}"/>'
                f'<circle cx="{place(x):.1f}" cy="{height(y):.1f}" r="3" fill="{inside}" stroke="{colour}"/>'
            )
        y = HEIGHT + 30 + 16 * i
        parts.append(f'<rect x="{LEFT}" y="{y - 9}" width="10" height="10" fill="{inside}" stroke="{colour}"/>')
        parts.append(f'<text x="{LEFT + 16}" y="{y}">{Markup.escape(line.name)}</text>')
    size = f"0 -28 {WIDTH} {HEIGHT + 44 + 16 * len(lines)}"
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{size}" font-family="sans-serif" font-size="11" fill="#222">'
        f'<rect x="0" y="-28" width="100%" height="100%" fill="white"/>'
        f'<text x="{LEFT}" y="-12" font-size="13">{Markup.escape(title)}</text>'
        f'<text x="4" y="4">{Markup.escape(up)}</text>'
    )
    return Markup(f"{head}{''.join(parts)}</svg>\n")
