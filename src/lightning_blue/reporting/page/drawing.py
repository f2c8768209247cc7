"""From charts to pixels: what the SVG of a chart is made of."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

from lightning_blue.reporting.axes import ticks
from lightning_blue.reporting.page.charts import Chart, Line

WIDTH, HEIGHT = 360, 200
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 10, 36  # margins
DOTS_AT_MOST = 15  # on one line, where nothing is pointed at


@dataclass(frozen=True)
class Column:
    """All values over one place of the x axis, and the area that they are shown for."""

    x: float
    left: float
    width: float
    dots: list[tuple[float, str, bool]]  # y, look, whether it is always drawn
    tip: str


@dataclass(frozen=True)
class Drawing:
    """Pixels of a chart: ``lines`` and ``bands`` are points of SVG, with their looks."""

    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    lines: list[tuple[str, str]]
    bands: list[tuple[str, str]]
    columns: list[Column]
    unedited: float | None
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    top: int = TOP
    bottom: int = HEIGHT - BOTTOM


def draw(chart: Chart) -> Drawing:
    """Lay out a chart."""
    y_values = ticks(*chart.limits, logarithmic=chart.logarithmic)
    x_values = ticks(*chart.x_limits, whole=True)
    return Drawing(
        x_ticks=[(_x(chart, value), f"{value:,.0f}") for value in x_values],
        y_ticks=[(_y(chart, value), f"{value:g}") for value in y_values],
        lines=[(_points(chart, line), line.look) for line in chart.lines],
        bands=[(_band(chart, line), line.look) for line in chart.lines if _has_band(line)],
        columns=_columns(chart),
        unedited=None if chart.unedited is None else _y(chart, chart.unedited),
    )


def _x(chart: Chart, value: float) -> float:
    low, high = chart.x_limits
    return LEFT + (WIDTH - LEFT - RIGHT) * (value - low) / ((high - low) or 1)


def _y(chart: Chart, value: float) -> float:
    """Return a height, of what lies outside the chart that of its edge."""
    low, high = chart.limits
    if chart.logarithmic:
        low, high, value = math.log(low), math.log(high), math.log(max(value, low))
    share = min(1.0, max(0.0, (value - low) / ((high - low) or 1)))
    return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * share


def _points(chart: Chart, line: Line) -> str:
    return " ".join(_pair(_x(chart, mark.x), _y(chart, mark.value)) for mark in line.marks)


def _band(chart: Chart, line: Line) -> str:
    upper = [_pair(_x(chart, mark.x), _y(chart, mark.high)) for mark in line.marks]
    lower = [_pair(_x(chart, mark.x), _y(chart, mark.low)) for mark in line.marks]
    return " ".join([*upper, *reversed(lower)])


def _has_band(line: Line) -> bool:
    return any(mark.low < mark.high for mark in line.marks)


def _pair(x: float, y: float) -> str:
    return f"{x:.1f},{y:.1f}"


def _columns(chart: Chart) -> list[Column]:
    """Divide the chart among the places that have values, each as wide as it is the nearest."""
    places = sorted({mark.x for line in chart.lines for mark in line.marks})
    middles = [_x(chart, (one + other) / 2) for one, other in pairwise(places)]
    edges = [float(LEFT), *middles, float(WIDTH - RIGHT)]
    columns = []
    for number, place in enumerate(places):
        dots, told = [], [chart.place.format(f"{place:,.0f}")]
        for line in chart.lines:
            stride = math.ceil(len(line.marks) / DOTS_AT_MOST)
            for back, mark in enumerate(reversed(line.marks)):
                if mark.x == place:
                    dots.append((_y(chart, mark.value), line.look, back % stride == 0))
                    told.append(f"{line.label}: {mark.text}")
        left, right = edges[number], edges[number + 1]
        columns.append(Column(_x(chart, place), left, right - left, dots, "\n".join(told)))
    return columns
