"""Charts as SVG text, for a page that needs no script and no network: bars, lines, points, a ring.

Every function takes plain numbers and names and gives one ``<svg>`` element that scales with its container. Colours
are CSS classes ``c0`` ... ``c7`` (series) and ``mark`` (what is pointed out), so that the page decides on them; each
shape carries a ``<title>`` that a browser shows on hover.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

_WIDTH = 440  # units: about the pixels of a phone, so that text of 12 stays legible there
_ROW = 18
_LINE = 13  # of text, from one to the next
_LETTER = 7.0  # width of one, on the safe side
_SERIES = 8
_NOTHING = 1e-12  # below it a value has no length

Points = Sequence[tuple[float, float]]


def bars(
    rows: Sequence[tuple[str, Sequence[float]]],
    series: Sequence[str],
    *,
    marked: Mapping[str, str] | None = None,
    unit: str = "",
    logarithmic: bool = False,
) -> str:
    """Horizontal bars, one group a row, from top to bottom.

    Args:
        rows: a name, and a value for each of ``series``; NaN draws nothing.
        marked: rows to be pointed out, with why.
        unit: behind the values.
        logarithmic: lengths by the logarithm, from a tenth of the smallest value on.
    """
    marked = marked or {}
    values = [v for _, group in rows for v in group if math.isfinite(v) and v > _NOTHING]
    top = max(values, default=1.0)
    least = max(min(values, default=1.0) / 10, top * _NOTHING)
    label, figure = min(max((len(name) for name, _ in rows), default=0) * _LETTER + 10, 210), 62
    room = _WIDTH - label - figure
    thick = _ROW if len(series) == 1 else 11
    parts, y = [], 4.0
    for name, group in rows:
        height = thick * len(group)
        style = "t mark" if name in marked else "t"
        fitting = name if len(name) * _LETTER + 10 <= label else "…" + name[-int((label - 10) / _LETTER) + 1 :]
        parts.append(_text(label - 6, y + height / 2 + 4, fitting, style, "end"))
        for index, value in enumerate(group):
            if not math.isfinite(value):
                continue
            share = math.log(max(value, least) / least) / math.log(top / least) if logarithmic else value / top
            colour = "mark" if name in marked else f"c{index % _SERIES}"
            why = f" – {marked[name]}" if name in marked else ""
            title = f"{name}: {series[index]} {_number(value)}{unit}{why}"
            parts.append(_rect(label, y + index * thick, max(room * share, 1), thick - 2, colour, title))
            at = y + index * thick + thick / 2 + 3.5
            parts.append(_text(label + max(room * share, 1) + 4, at, f"{_number(value)}{unit}", "t s"))
        y += height + 5
    legend = _legend(series, label, y + 8) if len(series) > 1 else ""
    return _svg(_WIDTH, y + (24 if legend else 4), "".join(parts) + legend)


def lines(
    series: Mapping[str, Points],
    *,
    across: str,
    up: str,
    bold: Sequence[str] = (),
    logarithmic: bool = False,
) -> str:
    """Curves over a common axis.

    Args:
        series: points (x, y) of each, in the order of x.
        across, up: what the axes show.
        bold: curves with a colour and a place in the legend; the rest is drawn thin and grey behind them.
    """
    frame = _Frame([p for points in series.values() for p in points], across, up, logarithmic)
    parts = [frame.axes()]
    ordered = [name for name in series if name not in bold] + [name for name in series if name in bold]
    for name in ordered:
        index = list(bold).index(name) if name in bold else None
        colour = "thin" if index is None else f"l{index % _SERIES}"
        path = " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in series[name])
        last = f" {_number(series[name][-1][1])}" if series[name] else ""
        parts.append(f'<polyline class="{colour}" points="{path}"><title>{escape(name)}{last}</title></polyline>')
    return _svg(_WIDTH, frame.height + 30, "".join(parts) + _legend(bold, frame.left, frame.height + 18))


def points(named: Mapping[str, tuple[float, float]], *, across: str, up: str, marked: str | None = None) -> str:
    """A named dot for each (x, y), ``marked`` in its own colour and over the others; names do not overlap, and a line
    leads to one that had to move."""
    frame = _Frame(list(named.values()), across, up, False)
    dots = {name: (frame.x(x), frame.y(y)) for name, (x, y) in named.items()}
    parts = [frame.axes()]
    for name in sorted(dots, key=lambda name: name == marked):
        x, y = dots[name]
        title = escape(f"{name}: {_number(named[name][0])}, {_number(named[name][1])}")
        colour = "mark" if name == marked else "c0"
        parts.append(f'<circle class="{colour}" cx="{x:.1f}" cy="{y:.1f}" r="5"><title>{title}</title></circle>')
    to_the_left = {name for name, (x, _) in dots.items() if x > _WIDTH * 0.6}
    ends = {x - 9 - len(name) * _LETTER for name, (x, _) in dots.items() if name in to_the_left}
    begins = {x + 9 + len(name) * _LETTER for name, (x, _) in dots.items() if name not in to_the_left}
    groups = [to_the_left, dots.keys() - to_the_left]
    if max(begins, default=-math.inf) > min(ends, default=math.inf):
        groups = [set(dots)]  # names from both sides meet in the middle
    for group in groups:
        heights = {name: dots[name][1] for name in dots if name in group}
        for name, height in _apart(heights, _LINE, frame.height - frame.bottom - 4).items():
            x, y = dots[name]
            beside, anchor = (x - 9, "end") if name in to_the_left else (x + 9, "start")
            if abs(height - y) > _LINE / 2:
                parts.append(f'<line class="lead" x1="{x:.1f}" y1="{y:.1f}" x2="{beside:.1f}" y2="{height:.1f}"/>')
            parts.append(_text(beside, height + 4, name, "t s mark" if name == marked else "t s", anchor))
    return _svg(_WIDTH, frame.height + 8, "".join(parts))


def _apart(heights: Mapping[str, float], gap: float, lowest: float) -> dict[str, float]:
    """The same heights, downwards, moved so that none is nearer than ``gap`` to the one above it; where that leads
    below ``lowest``, they move up together, and closer where there are too many."""
    names, moved = sorted(heights, key=heights.__getitem__), {}
    gap, above = min(gap, lowest / max(len(names), 1)), -math.inf
    for name in names:
        moved[name] = above = max(heights[name], above + gap)
    below = lowest + gap
    for name in reversed(names):
        moved[name] = below = min(moved[name], below - gap)
    return moved


def ring(shares: Mapping[str, float], unit: str = "") -> str:
    """A pie with a hole: the seven largest parts, and the rest together."""
    ordered = sorted(shares.items(), key=lambda item: -item[1])
    shown = [*ordered[: _SERIES - 1]]
    if rest := ordered[_SERIES - 1 :]:
        shown.append((f"{len(rest)} others", sum(value for _, value in rest)))
    total = sum(value for _, value in shown) or 1.0
    middle, radius, parts, turn = 110, 90, [], 0.0
    for index, (name, value) in enumerate(shown):
        share = value / total
        title = escape(f"{name}: {_number(value)}{unit}, {share:.1%}")
        circumference = 2 * math.pi * radius
        parts.append(
            f'<circle class="s{index % _SERIES}" cx="{middle}" cy="{middle}" r="{radius}" fill="none" '
            f'stroke-width="36" stroke-dasharray="{share * circumference:.2f} {circumference:.2f}" '
            f'transform="rotate({360 * turn - 90:.2f} {middle} {middle})"><title>{title}</title></circle>'
        )
        parts.append(_rect(228, 14 + 26 * index, 14, 14, f"c{index % _SERIES}", name))
        parts.append(_text(248, 26 + 26 * index, f"{name}: {share:.1%}", "t"))
        turn += share
    return _svg(_WIDTH, 224, "".join(parts))


class _Frame:
    """Axes with a few round ticks around a set of points."""

    height, left, right, top, bottom = 240, 56, 14, 12, 40

    def __init__(self, around: Sequence[tuple[float, float]], across: str, up: str, logarithmic: bool):
        finite = [(x, y) for x, y in around if math.isfinite(x) and math.isfinite(y)] or [(0.0, 1.0)]
        self.across, self.up, self.logarithmic = across, up, logarithmic
        self.low_x, self.high_x = _spread(min(x for x, _ in finite), max(x for x, _ in finite))
        heights = [math.log10(max(y, _NOTHING)) for _, y in finite] if logarithmic else [y for _, y in finite]
        self.low_y, self.high_y = _spread(min(heights), max(heights))

    def x(self, value: float) -> float:
        room = _WIDTH - self.left - self.right
        return self.left + room * (value - self.low_x) / (self.high_x - self.low_x)

    def y(self, value: float) -> float:
        value = math.log10(max(value, _NOTHING)) if self.logarithmic else value
        room = self.height - self.top - self.bottom
        return self.height - self.bottom - room * (value - self.low_y) / (self.high_y - self.low_y)

    def axes(self) -> str:
        parts = []
        for tick in _ticks(self.low_y, self.high_y):
            value = 10**tick if self.logarithmic else tick
            at = self.y(value)
            parts.append(
                f'<line class="grid" x1="{self.left}" x2="{_WIDTH - self.right}" y1="{at:.1f}" y2="{at:.1f}"/>'
            )
            parts.append(_text(self.left - 6, at + 4, _number(value), "t s", "end"))
        for tick in _ticks(self.low_x, self.high_x):
            parts.append(_text(self.x(tick), self.height - self.bottom + 16, _number(tick), "t s", "middle"))
        parts.append(_text((self.left + _WIDTH) / 2, self.height - 6, self.across, "t s", "middle"))
        middle = (self.height - self.bottom) / 2
        parts.append(
            f'<text class="t s" text-anchor="middle" transform="translate(12 {middle:.0f}) rotate(-90)">'
            f"{escape(self.up)}</text>"
        )
        return "".join(parts)


def _spread(low: float, high: float) -> tuple[float, float]:
    margin = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    return low - margin, high + margin


def _ticks(low: float, high: float, most: int = 5) -> list[float]:
    """At most about ``most`` round numbers between two others."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough)
    return [step * i for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _number(value: float) -> str:
    """Four digits, thousands as k, M, G."""
    if not math.isfinite(value):
        return "∞"
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if letter == 'k' else size):.4g}{letter}"
    return f"{value:.4g}"


def _legend(names: Sequence[str], x: float, y: float) -> str:
    parts = []
    for index, name in enumerate(names):
        parts.append(_rect(x, y - 9, 10, 10, f"c{index % _SERIES}", name))
        parts.append(_text(x + 14, y, name, "t s"))
        x += 24 + 6 * len(name)
    return "".join(parts)


def _rect(x: float, y: float, width: float, height: float, colour: str, title: str) -> str:
    box = f'x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"'
    return f'<rect class="{colour}" {box}><title>{escape(title)}</title></rect>'


def _text(x: float, y: float, text: str, style: str, anchor: str = "start") -> str:
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _svg(width: float, height: float, content: str) -> str:
    return f'<svg viewBox="0 0 {width:.0f} {height:.0f}" role="img" xmlns="http://www.w3.org/2000/svg">{content}</svg>'
