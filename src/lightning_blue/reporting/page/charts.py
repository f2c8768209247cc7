"""What the page draws over edits and over inner steps: lines with their values, not yet pixels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_blue.metrics.history import LossCurve, RunHistory
from lightning_blue.metrics.table import PERCENT, MetricSpec
from lightning_blue.reporting.axes import fitted, short, spread, titled, widened
from lightning_blue.reporting.plots import LOSS_BAND, LOSSES, Course, courses, curves_by_layer
from lightning_blue.reporting.tables import value_and_error
from lightning_blue.reporting.views import Point, finite, loss_quantiles, metrics_at

COLOURS = ("second", "first")  # of a panel's two lines, as CSS classes
SINGLE = "third"


@dataclass(frozen=True)
class Mark:
    """A value over ``x``, the band around it, and how it is told."""

    x: float
    value: float
    low: float
    high: float
    text: str


@dataclass(frozen=True)
class Line:
    """A line of a chart; ``look`` is a CSS class."""

    label: str
    look: str
    marks: list[Mark]


@dataclass(frozen=True)
class Chart:
    """A panel.

    Attributes:
        title: what is shown, with its unit.
        note: which direction is better; may be empty.
        x_label: what the x axis counts.
        place: how a place on it is told, with ``{}`` for the number.
        lines: in the order of the legend.
        limits: of the y axis.
        x_limits: of the x axis.
        logarithmic: whether the y axis is.
        unedited: value of the unedited model, if it is inside the limits.
        aside: what is said of that value otherwise; may be empty.
    """

    title: str
    note: str
    x_label: str
    place: str
    lines: list[Line]
    limits: tuple[float, float]
    x_limits: tuple[float, float]
    logarithmic: bool = False
    unedited: float | None = None
    aside: str = ""

    @property
    def summary(self) -> str:
        """What the chart shows, for people who do not see it: where each line begins and ends."""
        ends = [
            f"{line.label}: from {line.marks[0].text} to {line.marks[-1].text}"
            for line in self.lines
        ]
        return f"{self.title} over {self.x_label}. {'; '.join(ends)}. {self.aside}".strip()


def legend(charts: Sequence[Chart], band: tuple[str, str]) -> list[tuple[str, str]]:
    """Return label and look of what charts of one kind show, ``band`` for their bands."""
    lines = {line.label: line.look for chart in charts for line in chart.lines}
    if any(chart.unedited is not None for chart in charts):
        lines["unedited model"] = "unedited"
    return [*lines.items(), band]


def course_charts(history: RunHistory) -> list[Chart]:
    """Return a chart for each metric that has a course over edits applied."""
    before = finite(metrics_at(history, "pre"))
    last = max((taken.edits for taken in history.measurements), default=0)
    return [
        _course(course, before.get(course[0].name, {}).get("value"), last)
        for course in courses(history)
    ]


def _course(course: Course, unedited: float | None, last: int) -> Chart:
    spec, drawn = course
    looks = COLOURS if len(drawn) > 1 else (SINGLE,)
    lines = [
        Line(label, look, [_mark(spec, point) for point in points])
        for look, (label, points, _) in zip(looks, drawn, strict=True)
        if points
    ]
    logarithmic = spread([mark.value for line in lines for mark in line.marks])
    values = [value for line in lines for mark in line.marks for value in (mark.low, mark.high)]
    limits = _positive(lines) if logarithmic else fitted(spec, values)
    shown = limits if unedited is None else widened(limits, unedited, logarithmic)
    aside = ""
    if unedited is not None and shown is None:
        aside = f"unedited: {short(unedited, spec.unit)} {'↓' if unedited < limits[0] else '↑'}"
    title, _, note = titled(spec.label, [spec]).partition("\n")
    return Chart(
        title=title,
        note=note,
        x_label="edits applied",
        place="after {} edits",
        lines=lines,
        limits=shown or limits,
        x_limits=(0, 1.04 * last),
        logarithmic=logarithmic,
        unedited=unedited if shown else None,
        aside=aside,
    )


def _mark(spec: MetricSpec, point: Point) -> Mark:
    low, high = point.span
    if spec.unit == PERCENT:
        low, high = max(0.0, low), min(100.0, high)
    text = value_and_error(point.value, point.error or None, spec.unit)
    return Mark(point.edits, point.value, low, high, text)


def _positive(lines: Sequence[Line]) -> tuple[float, float]:
    """Return limits for a logarithmic axis; what reaches below zero is cut off."""
    values = [mark.value for line in lines for mark in line.marks]
    highest = max(mark.high for line in lines for mark in line.marks)
    return min(values) / 1.3, highest * 1.3


def loss_charts(history: RunHistory) -> list[Chart]:
    """Return a chart of the target optimisation for each target layer, on one scale."""
    panels = {layer: _losses(part) for layer, part in curves_by_layer(history).items()}
    values = [
        value
        for lines in panels.values()
        for line in lines
        for mark in line.marks
        for value in (mark.low, mark.high)
    ]
    if not values:
        return []
    logarithmic = min(values) > 0
    pad = 0.05 * (max(values) - min(values)) or 1.0
    limits = min(values) - pad, max(values) + pad
    if logarithmic:
        limits = min(values) / 1.15, max(values) * 1.15
    return [
        Chart(
            title=f"target layer {layer}, loss (nats)",
            note="lower is better",
            x_label="inner step",
            place="step {}",
            lines=lines,
            limits=limits,
            x_limits=(0.5, max(mark.x for line in lines for mark in line.marks) + 0.5),
            logarithmic=logarithmic,
        )
        for layer, lines in panels.items()
        if lines
    ]


def _losses(curves: Sequence[LossCurve]) -> list[Line]:
    """Return median and band of the total loss, and the median of its nll part."""
    low, median, high = loss_quantiles(curves, (LOSS_BAND[0], 0.5, LOSS_BAND[1]))
    lines = []
    for column, (look, (label, _)) in enumerate(zip(reversed(COLOURS), LOSSES, strict=True)):
        marks = []
        for step, value in enumerate(median[:, column].tolist()):
            below, above = (
                (float(low[step, 0]), float(high[step, 0])) if column == 0 else (value, value)
            )
            if not math.isfinite(value + below + above):
                continue
            text = f"{value:.3g}"
            if column == 0:
                text += f" (8 of 10 edits: {below:.3g} to {above:.3g})"
            marks.append(Mark(step + 1, value, below, above, text))
        lines.append(Line(f"{label}, median", look, marks))
    return [line for line in lines if line.marks]
