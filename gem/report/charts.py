"""The page's drawings as SVG: lines over the steps of a run, intervals, a ROC curve, a reliability diagram.

Colours, dashes and type are page.css's, by class. What page.js reads out under the pointer stands in `Lines.points`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from xml.etree import ElementTree

from markupsafe import Markup

WIDTH, HEIGHT = 360, 202
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 28, 24
SQUARE, MARGIN = 236, 34
NAME_WIDTH = 6.5  # at most, of a letter of a stage's name
MOST_MARKED = 40  # points of a line that are drawn as shapes too


@dataclass(frozen=True)
class Series:
    """One line: (x, value, low, high) at each point; low and high are None where there is no interval."""

    name: str
    points: list[tuple[int, float, float | None, float | None]]


@dataclass(frozen=True)
class Axis:
    """Steps of a run: its stages as (name, first, last), and the guards that fired as (step, words)."""

    stages: list[tuple[str, int, int]] = field(default_factory=list)
    guards: list[tuple[int, str]] = field(default_factory=list)

    def words(self, x: int) -> str:
        """A step in the words of its stage."""
        for name, first, last in self.stages:
            if first <= x <= last:
                return f"{name} step {x - first + 1}"
        return "start" if x == 0 else f"step {x}"


@dataclass(frozen=True)
class Lines:
    """A drawn chart; points: for the read-out, each {"x": in the drawing, "at": step in words, "values": texts}."""

    title: str
    unit: str
    names: list[str]
    svg: Markup
    summary: str
    points: list[dict[str, Any]]


def lines(title: str, unit: str, series: Sequence[Series], axis: Axis) -> Lines:
    """Values over optimizer steps, stages parted by thin lines, guards as dashed ones with a triangle."""
    values = [v for s in series for point in s.points for v in point[1:] if v is not None]
    ticks = nice_ticks(min(values), max(values))
    low, high = min(ticks[0], *values), max(ticks[-1], *values)
    first = min(point[0] for s in series for point in s.points)
    last = max(point[0] for s in series for point in s.points)

    def across(x: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * ((x - first) / max(1, last - first))

    def up(y: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * ((y - low) / (high - low))

    svg = _svg(WIDTH, HEIGHT, "lines")
    for tick in ticks:
        _line(svg, LEFT, up(tick), WIDTH - RIGHT, up(tick), "grid")
        _words(svg, LEFT - 6, up(tick) + 3.5, f"{tick:g}".replace("-", "−"), "tick end")
    for name, start, end in axis.stages:
        if end < first or start > last:
            continue
        if start > first:
            _line(svg, across(start - 0.5), TOP - 24, across(start - 0.5), HEIGHT - BOTTOM, "stage")
        begin = across(max(start - 0.5, first)) + 4
        if begin + NAME_WIDTH * len(name) <= WIDTH:
            _words(svg, begin, TOP - 18, name, "stage-name")
        else:  # before its line, as there is no room behind it
            _words(svg, begin - 8, TOP - 18, name, "stage-name end")
    for step in sorted({first, (first + last) // 2, last}):
        _words(svg, across(step), HEIGHT - 8, str(step), "tick middle")
    for step, _ in axis.guards:
        if first <= step <= last:
            x = across(step)
            _line(svg, x, TOP - 4, x, HEIGHT - BOTTOM, "guard")
            _add(svg, "path", d=f"M{x - 4.5:.1f} {TOP - 12}h9l-4.5 7z", **{"class": "guard-mark"})
    for k, one in enumerate(series):
        _draw_series(svg, one, k, across, up, 3.0 * (k - (len(series) - 1) / 2))
    at = [{point[0]: point for point in s.points} for s in series]
    guards: dict[int, list[str]] = {}
    for step, words in axis.guards:
        if first <= step <= last:
            guards.setdefault(step, []).append(words)
    points = [
        {
            "x": round(across(x), 1),
            "at": axis.words(x),
            "values": [_shown(values.get(x)) for values in at],
            "guards": guards.get(x, []),
        }
        for x in sorted(set().union(*at, guards))
    ]
    _line(svg, 0, TOP, 0, HEIGHT - BOTTOM, "cursor")
    summary = "; ".join(f"{s.name} from {number(s.points[0][1])} to {number(s.points[-1][1])}" for s in series)
    return Lines(title, unit, [s.name for s in series], _markup(svg), f"{title}, {unit}: {summary}", points)


def key(k: int) -> Markup:
    """A short piece of line number k, with its shape."""
    svg = _svg(26, 12, "key")
    _line(svg, 1, 6, 25, 6, f"line s{k % 4}")
    _shape(svg, 13, 6, k)
    return _markup(svg)


def interval(value: float, low: float | None, high: float | None, span: tuple[float, float], mark: float) -> Markup:
    """A dot with its interval as a bar, over `span`; a line at `mark`, the value that says nothing."""
    svg = _svg(160, 18, "interval")

    def across(x: float) -> float:
        return 5 + 150 * (min(max(x, span[0]), span[1]) - span[0]) / (span[1] - span[0])

    _line(svg, across(mark), 0, across(mark), 18, "zero")
    if low is not None and high is not None:
        _line(svg, across(low), 9, across(high), 9, "bar")
        for x in (low, high):
            _line(svg, across(x), 5, across(x), 13, "bar")
    _add(svg, "circle", cx=f"{across(value):.1f}", cy=9, r=4, **{"class": "dot"})
    return _markup(svg)


def roc(false_positive: Sequence[float], true_positive: Sequence[float]) -> Markup:
    """The ROC curve through its points, over the diagonal of a score that knows nothing."""
    svg, place = _square("false positive rate", "true positive rate", "ROC curve")
    points = " ".join("{:.1f},{:.1f}".format(*place(x, y)) for x, y in zip(false_positive, true_positive))
    _add(svg, "polyline", points=points, **{"class": "line s0"})
    return _markup(svg)


def reliability(bins: Sequence[tuple[float, float, float]]) -> Markup:
    """Bins of (count, mean confidence, share right) as discs, their area the count; on the diagonal is calibrated."""
    svg, place = _square("confidence", "share right", "Reliability diagram")
    most = max(count for count, _, _ in bins)
    ordered = sorted(bins, key=lambda b: b[1])
    points = " ".join("{:.1f},{:.1f}".format(*place(x, y)) for _, x, y in ordered)
    _add(svg, "polyline", points=points, **{"class": "line thin s0"})
    for count, confidence, right in ordered:
        x, y = place(confidence, right)
        disc = _add(svg, "circle", cx=f"{x:.1f}", cy=f"{y:.1f}", r=f"{3 + 7 * math.sqrt(count / most):.1f}")
        disc.set("class", "disc")
        _add(disc, "title").text = f"{count:g} at {confidence:.3f}: {right:.3f} right"
    return _markup(svg)


def nice_ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers from at most `low` to at least `high`, a step of 1, 2 or 5 times a power of ten apart."""
    if not high - low > 1e-12 * max(abs(low), abs(high)):
        pad = abs(low) / 2 or 0.5
        low, high = low - pad, high + pad
    raw = (high - low) / (most - 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next((k * power for k in (1, 2, 5) if k * power >= raw * 0.999), 10 * power)
    start, end = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{k * step:.12g}") for k in range(start, end + 1)]


def number(value: float | None, signed: bool = False) -> str:
    """Three decimals where they say something, else three digits; a whole number as it is; a true minus sign."""
    if value is None:
        return "–"
    sign, size = "+" if signed and value > 0 else "", abs(value)
    if value == int(value) and size < 1e9:
        text = f"{value:.0f}"
    elif 0.01 <= size < 100:
        text = f"{value:.3f}"
    elif 100 <= size < 1e5:
        text = f"{value:.1f}"
    else:
        text = f"{value:.3g}"
    return sign + text.replace("-", "−")


def _shown(point: tuple[int, float, float | None, float | None] | None) -> str:
    if point is None:
        return "–"
    _, value, low, high = point
    return number(value) if low is None or high is None else f"{number(value)} [{number(low)}, {number(high)}]"


def _draw_series(svg: ElementTree.Element, series: Series, k: int, across, up, aside: float) -> None:
    """aside: how far intervals stand from their step, so that those of several lines do not cover each other."""
    whiskers = any(low is not None for _, _, low, _ in series.points)
    places = [(across(x) + aside * whiskers, up(y)) for x, y, _, _ in series.points]
    if len(places) > 1:
        _add(svg, "polyline", points=" ".join(f"{x:.1f},{y:.1f}" for x, y in places), **{"class": f"line s{k % 4}"})
    for (x, _), (_, _, low, high) in zip(places, series.points):
        if low is not None and high is not None:
            _line(svg, x, up(low), x, up(high), f"whisker s{k % 4}")
    if len(places) <= MOST_MARKED:
        for x, y in places:
            _shape(svg, x, y, k)


def _shape(svg: ElementTree.Element, x: float, y: float, k: int) -> None:
    """Circle, square, triangle, diamond: lines differ by more than colour."""
    paths = (
        f"M{x - 2.6:.1f} {y:.1f}a2.6 2.6 0 1 0 5.2 0a2.6 2.6 0 1 0 -5.2 0z",
        f"M{x - 2.5:.1f} {y - 2.5:.1f}h5v5h-5z",
        f"M{x:.1f} {y - 3.3:.1f}l3.1 5.6h-6.2z",
        f"M{x:.1f} {y - 3.5:.1f}l3.5 3.5l-3.5 3.5l-3.5 -3.5z",
    )
    _add(svg, "path", d=paths[k % 4], **{"class": f"shape s{k % 4}"})


def _square(across: str, up: str, title: str):
    """An empty unit square with its diagonal; (drawing, place of a point in it)."""
    svg = _svg(SQUARE, SQUARE, "square", title)
    size = SQUARE - MARGIN - 14

    def place(x: float, y: float) -> tuple[float, float]:
        return MARGIN + 4 + size * x, SQUARE - MARGIN - size * y

    for tick in (0.0, 0.5, 1.0):
        _line(svg, *place(tick, 0), *place(tick, 1), "grid")
        _line(svg, *place(0, tick), *place(1, tick), "grid")
        x, y = place(tick, 0)
        _words(svg, x, y + 14, f"{tick:g}", "tick middle")
        x, y = place(0, tick)
        _words(svg, x - 6, y + 3.5, f"{tick:g}", "tick end")
    _line(svg, *place(0, 0), *place(1, 1), "zero")
    _words(svg, *[place(0.5, 0)[0], SQUARE - 6], across, "label middle")
    label = _words(svg, 0, 0, up, "label middle")
    label.set("transform", f"translate(10 {place(0, 0.5)[1]:.1f}) rotate(-90)")
    return svg, place


def _svg(width: int, height: int, kind: str, title: str | None = None) -> ElementTree.Element:
    said = {"role": "img", "aria-label": title} if title else {"aria-hidden": "true"}
    box = {"viewBox": f"0 0 {width} {height}", "width": str(width), "height": str(height)}
    return ElementTree.Element("svg", {**box, "class": f"chart {kind}", **said})


def _add(parent: ElementTree.Element, name: str, **attributes: Any) -> ElementTree.Element:
    return ElementTree.SubElement(parent, name, {key: str(value) for key, value in attributes.items()})


def _line(svg: ElementTree.Element, x1: float, y1: float, x2: float, y2: float, kind: str) -> None:
    _add(svg, "line", x1=f"{x1:.1f}", y1=f"{y1:.1f}", x2=f"{x2:.1f}", y2=f"{y2:.1f}", **{"class": kind})


def _words(svg: ElementTree.Element, x: float, y: float, text: str, kind: str) -> ElementTree.Element:
    made = _add(svg, "text", x=f"{x:.1f}", y=f"{y:.1f}", **{"class": kind})
    made.text = text
    return made


def _markup(svg: ElementTree.Element) -> Markup:
    return Markup(ElementTree.tostring(svg, encoding="unicode"))
