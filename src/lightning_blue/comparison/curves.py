"""Metrics over edits applied, with bands: as the paper's Figure 6, for what runs have measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from statistics import fmean
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lightning_blue.comparison.labels import BLUE, UNEDITED, plan_title
from lightning_blue.comparison.rows import Row
from lightning_blue.comparison.scores import ScoreTable, error_of_mean
from lightning_blue.metrics import table
from lightning_blue.metrics.table import PERCENT, MetricSpec
from lightning_blue.reporting.plots import INK, PALETTE, png

Line = str | tuple[int, tuple[int, ...]]  # of matplotlib
Style = tuple[str, Line]  # colour and line

PER_ROW = 3  # panels
STYLES: dict[str, Line] = {BLUE: "-"}  # of a plan's line; others are dashed


class Point(NamedTuple):
    """A metric after so many edits: mean over runs, half of the band, how many runs."""

    edits: int
    value: float
    error: float
    runs: int


Curves = dict[tuple[str, str, Row], list[Point]]  # by data, metric and row


def curves(scores: ScoreTable) -> Curves:
    """Return what was measured over edits, at the points that all runs of a row have.

    The band is one standard error: over runs (seeds, orders) where there are several, else over
    requests.
    """
    found: Curves = {}
    in_order = sorted(scores.runs.items(), key=lambda item: scores.rows.index(item[0][0]))
    for (row, data), runs in in_order:
        for spec in table.among(name for run in runs for name in run.measured("post")):
            courses = [{edits: point for edits, *point in run.curve(spec.name)} for run in runs]
            points = [
                _point(edits, [course[edits] for course in courses])
                for edits in sorted(set.intersection(*map(set, courses)))
            ]
            if len(points) > 1:
                found[data, spec.name, row] = points
    return found


def figures(found: Curves, scores: ScoreTable) -> dict[str, bytes]:
    """Draw a picture for each data set and model; PNG by name."""
    shown = {spec.name for spec in _shown(found)}
    subjects = sorted({(data, row.model) for data, metric, row in found if metric in shown})
    pictures = {}
    for place in subjects:
        data, model = place
        pictures[f"{data}-{model}"] = png(_figure(found, data, model, _unedited(scores, *place)))
    return pictures


def _unedited(scores: ScoreTable, data: str, model: str) -> dict[str, float]:
    """Return the unedited model's value of each metric that all runs have measured alike."""
    values: dict[str, set[float]] = {}
    for (row, column), estimate in scores.cells.items():
        if (row.model, row.method, column.data) == (model, UNEDITED, data):
            values.setdefault(column.metric, set()).add(estimate.value)
    return {metric: each.pop() for metric, each in values.items() if len(each) == 1}


def _shown(found: Curves) -> list[MetricSpec]:
    """Return the metrics that have a panel."""
    specs = table.among(metric for _, metric, _ in found)
    return [spec for spec in specs if spec.group in ("scores", "ability")]


def _point(edits: int, measured: Sequence[Sequence[float]]) -> Point:
    values = [value for value, _ in measured]
    error = fmean(error for _, error in measured)
    if len(values) > 1:
        error = error_of_mean(values)
    return Point(edits, fmean(values), error, len(values))


def _figure(found: Curves, data: str, model: str, unedited: Mapping[str, float]) -> Figure:
    ours = {
        (metric, row): points
        for (name, metric, row), points in found.items()
        if name == data and row.model == model
    }
    metrics = [spec for spec in _shown(found) if any(metric == spec.name for metric, _ in ours)]
    rows = list(dict.fromkeys(row for _, row in ours))
    height = math.ceil(len(metrics) / PER_ROW)
    width = min(PER_ROW, len(metrics))
    figure = Figure(figsize=(4.2 * width, 3.1 * height + 0.3 * len(rows) / 2 + 0.4))
    figure.set_layout_engine("constrained")
    axes: list[Axes] = list(figure.subplots(height, width, squeeze=False).flat)
    styles = _styles(rows)
    for axis, spec in zip(axes, metrics, strict=False):
        for row in rows:
            if (spec.name, row) in ours:
                _draw(axis, ours[spec.name, row], styles[row])
        if math.isfinite(unedited.get(spec.name, math.nan)):
            axis.axhline(unedited[spec.name], color=INK, linestyle=":", linewidth=1.2)
        axis.set_ylabel(spec.label, color=INK)
        axis.set_xlabel("edits applied", color=INK)
        axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        if spec.unit == PERCENT:
            axis.set_ylim(-2, 104)
    for unused in axes[len(metrics) :]:
        unused.remove()
    _legend(figure, axes[0], rows, styles)
    figure.suptitle(f"{model}, {data}: all edits so far (a sample)", fontsize=11, color=INK)
    return figure


def _legend(figure: Figure, axis: Axes, rows: Sequence[Row], styles: Mapping[Row, Style]) -> None:
    """Name the lines below the panels."""
    lines = [
        axis.plot([], [], color=colour, linestyle=line)[0]
        for colour, line in (styles[row] for row in rows)
    ]
    lines.append(axis.plot([], [], color=INK, linestyle=":", linewidth=1.2)[0])
    labels = [f"{row.method}, {plan_title(row.plan)}" for row in rows]
    labels.append("unedited model, all requests")
    figure.legend(lines, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=9)


def _styles(rows: Sequence[Row]) -> dict[Row, Style]:
    """Give each method a colour, and BLUE the full line."""
    colours = cycle(PALETTE)
    methods = {method: next(colours) for method in dict.fromkeys(row.method for row in rows)}
    others: cycle[Line] = cycle(("--", "-.", (0, (1, 1)), (0, (6, 2, 1, 2, 1, 2))))
    plans = dict.fromkeys(row.plan for row in rows)
    lines: dict[str, Line] = {plan: STYLES.get(plan) or next(others) for plan in plans}
    return {row: (methods[row.method], lines[row.plan]) for row in rows}


def _draw(axis: Axes, points: Sequence[Point], style: Style) -> None:
    colour, line = style
    edits = [point.edits for point in points]
    low = [point.value - point.error for point in points]
    high = [point.value + point.error for point in points]
    axis.fill_between(edits, low, high, color=colour, alpha=0.15, linewidth=0)
    axis.plot(edits, [point.value for point in points], color=colour, linestyle=line)
