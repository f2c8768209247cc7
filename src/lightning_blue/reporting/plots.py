"""The pictures of a report, drawn on figures of their own: no global state of matplotlib."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from lightning_blue.metrics import table
from lightning_blue.metrics.evaluation import Metrics
from lightning_blue.metrics.history import LossCurve, RunHistory
from lightning_blue.metrics.table import PERCENT, MetricSpec
from lightning_blue.reporting.axes import fitted, log_steps, short, spread, titled, widened
from lightning_blue.reporting.views import (
    Points,
    finite,
    loss_quantiles,
    measured,
    metrics_at,
    series,
)

Style = dict[str, Any]

# Okabe and Ito's colours, which people with any colour vision tell apart
BLUE, VERMILLION, GREY = "#0072B2", "#D55E00", "#9A9A9A"
PALETTE = (BLUE, VERMILLION, "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # of theirs too
INK = "#333333"
COLUMNS = 3  # of small multiples
MARKERS_AT_MOST = 15  # on one line
BAND = 0.2  # opacity
BELOW: Style = {"loc": "outside lower center", "frameon": False, "fontsize": 9}  # a legend

# the lines of a panel over edits applied: label, stages, style
SUCCESS = (
    ("the batch just applied", ("batch",), {"color": VERMILLION, "linestyle": "--", "marker": "s"}),
    ("all edits so far (a sample)", ("cumulative",), {"color": BLUE, "marker": "o"}),
)
SIDE_EFFECTS = (
    ("side effects", ("pre", "batch", "cumulative", "post"), {"color": INK, "marker": "D"}),
)
UNEDITED: Style = {"color": INK, "linestyle": ":", "linewidth": 1.3}
LOSSES: tuple[tuple[str, Style], ...] = (  # label and style, in the order of the losses' columns
    ("total", {"color": BLUE}),
    ("nll of the new object", {"color": VERMILLION, "linestyle": "--"}),
)
LOSS_BAND = (0.1, 0.9)  # quantiles of the total over edits
CAPTIONS = {
    "metrics": "Over edits applied: how well edits hold, and what the rest of the model lost. Axes "
    "are fitted to the data.",
    "before_after": "Before and after, over all requests.",
    "losses": "Optimisation of the targets, over all edits: a finished one counts with its last "
    "loss.",
}

Course = tuple[MetricSpec, list[tuple[str, Points, Style]]]


def plots(history: RunHistory) -> dict[str, bytes]:
    """Draw what there is to draw.

    Returns:
        PNG files by name: ``metrics`` over edits applied, ``losses`` of the target optimisation,
        ``before_after``. A picture without data is left out.
    """
    figures = {
        "metrics": metrics_figure(history),
        "losses": losses_figure(history),
        "before_after": before_after_figure(history),
    }
    return {name: png(figure) for name, figure in figures.items() if figure is not None}


def courses(history: RunHistory) -> list[Course]:
    """Return each metric that has a course over edits applied, with its lines: label, points, look.

    One that was measured after a single batch has none.
    """
    found: list[Course] = []
    for spec in measured(history):
        kinds = {"success": SUCCESS, "side effects": SIDE_EFFECTS}.get(spec.panel or "", ())
        lines = [(label, series(history, stages, spec.name), look) for label, stages, look in kinds]
        if len({point.edits for _, line, _ in lines for point in line} - {0}) > 1:
            found.append((spec, lines))
    return found


def curves_by_layer(history: RunHistory) -> dict[int, list[LossCurve]]:
    """Return the loss curves of all batches by target layer, the lowest first."""
    curves = sorted(history.loss_curves, key=lambda curve: curve.layer)
    return {layer: list(part) for layer, part in groupby(curves, lambda curve: curve.layer)}


def metrics_figure(history: RunHistory) -> Figure | None:
    """Draw each metric over edits applied, in a panel of its own; None without `courses`."""
    before = finite(metrics_at(history, "pre"))
    panels = courses(history)
    if not panels:
        return None
    figure, axes = _grid(len(panels), 3.6, 2.6)
    for axis, (spec, lines) in zip(axes, panels, strict=True):
        _draw_course(axis, spec, [(line, look) for _, line, look in lines], before.get(spec.name))
        axis.set_xlim(0, 1.04 * max(taken.edits for taken in history.measurements))
        axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    for axis in axes[-min(COLUMNS, len(axes)) :]:
        axis.set_xlabel("edits applied")
    drawn = {label: look for _, lines in panels for label, line, look in lines if line}
    drawn |= {"unedited model": UNEDITED} if before else {}
    handles = [Line2D([], [], label=label, **look) for label, look in drawn.items()]
    figure.legend(handles=[*handles, _band_handle("± standard error")], **BELOW, ncols=5)
    return figure


def losses_figure(history: RunHistory) -> Figure | None:
    """Draw the losses of all edits over inner steps, a panel per target layer.

    Of the total the median over edits and the band in which eight of ten lie, of its nll part the
    median. None without curves.
    """
    panels = curves_by_layer(history)
    if not panels:
        return None
    figure, axes = _grid(len(panels), 4.4, 3.2, sharey=True)
    for axis, (layer, part) in zip(axes, panels.items(), strict=True):
        low, median, high = loss_quantiles(part, (LOSS_BAND[0], 0.5, LOSS_BAND[1]))
        steps = range(1, len(median) + 1)
        axis.fill_between(steps, low[:, 0], high[:, 0], color=BLUE, alpha=BAND, linewidth=0)
        for column, (_, look) in enumerate(LOSSES):
            axis.plot(steps, median[:, column], linewidth=2, **look)
        values = [*low[:, 0].tolist(), *high[:, 0].tolist(), *median[:, :2].flatten().tolist()]
        if min(values) > 0:
            _logarithmic(axis, values)
        axis.set_title(f"target layer {layer}", fontsize=10, color=INK)
        axis.set_xlabel("inner step")
        axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    for axis in axes[::COLUMNS]:
        axis.set_ylabel("loss (nats)")
    handles = [Line2D([], [], label=f"{label}, median", **look) for label, look in LOSSES]
    figure.legend(handles=[*handles, _band_handle("total, 8 of 10 edits", BLUE)], **BELOW, ncols=3)
    return figure


def before_after_figure(history: RunHistory) -> Figure | None:
    """Draw bars of each metric before and after; None if nothing was measured at the end."""
    before, after = (finite(metrics_at(history, stage)) for stage in ("pre", "post"))
    specs = [spec for spec in table.of_group("scores") if spec.name in after]
    percent = [spec for spec in specs if spec.unit == PERCENT]
    others = [spec for spec in specs if spec.unit != PERCENT]
    if not specs:
        return None
    figure = new_figure(1.0 + 1.25 * len(percent) + 1.7 * len(others), 4.2)
    widths = [1.25 * len(percent)] * bool(percent) + [1.1] * len(others)
    axes = list(figure.subplots(1, len(widths), width_ratios=widths, squeeze=False).flat)
    if percent:
        _draw_bars(axes[0], percent, before, after)
        axes[0].set_ylim(0, 112)
        axes[0].set_yticks(range(0, 101, 20))
        axes[0].set_ylabel(titled("percent", percent))
    for axis, spec in zip(axes[bool(percent) :], others, strict=True):
        _draw_bars(axis, [spec], before, after)
        axis.set_ylabel(titled(spec.label, [spec]))
        axis.set_xticks([])
        axis.margins(y=0.12)
        values = [
            metrics[spec.name]["value"] for metrics in (before, after) if spec.name in metrics
        ]
        if spread(values):
            _logarithmic(axis, values)
    bars = [Patch(color=GREY, label="unedited"), Patch(color=BLUE, label="edited")]
    error = Line2D([], [], color=INK, marker="|", markersize=9, label="± standard error")
    error.set_linestyle("none")
    figure.legend(handles=[*bars, error], **BELOW, ncols=3)
    return figure


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure, its size in inches."""
    figure = Figure(figsize=(width, height))
    figure.set_layout_engine("constrained", w_pad=0.08, h_pad=0.08, wspace=0.03)
    return figure


def _grid(n: int, width: float, height: float, **shared: Any) -> tuple[Figure, list[Axes]]:
    """Return a figure with n panels of a size in inches, row by row."""
    rows = math.ceil(n / COLUMNS)
    columns = min(n, COLUMNS)
    figure = new_figure(max(6.0, width * columns), height * rows + 0.5)
    axes: list[Axes] = list(figure.subplots(rows, columns, squeeze=False, **shared).flat)
    for unused in axes[n:]:
        unused.remove()
    return figure, axes[:n]


def png(figure: Figure) -> bytes:
    """Draw a figure in the style that all pictures here share."""
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["left", "bottom"]].set_color(GREY)
        axis.tick_params(colors=INK, labelsize=9)
        axis.set_axisbelow(True)
        axis.grid(axis="y", color="#E6E6E6", linewidth=0.8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()


def _draw_course(
    axis: Axes,
    spec: MetricSpec,
    lines: Sequence[tuple[Points, Style]],
    unedited: Mapping[str, float] | None,
) -> None:
    """Draw a metric over edits applied with its standard errors, and where it was before."""
    for line, look in lines:
        _line(axis, spec, line, look)
    values = [value for line, _ in lines for point in line for value in point.span]
    if spread([point.value for line, _ in lines for point in line]):
        _logarithmic(axis, values)
    else:
        axis.set_ylim(*fitted(spec, values))
    if unedited is not None:
        _draw_unedited(axis, unedited["value"], spec.unit)
    axis.set_title(titled(spec.label, [spec]), fontsize=10, color=INK)


def _line(axis: Axes, spec: MetricSpec, points: Points, look: Style) -> None:
    """Draw a line with its band and at most so many markers, always one on its last point."""
    if not points:
        return
    edits = [point.edits for point in points]
    low, high = [point.span[0] for point in points], [point.span[1] for point in points]
    if spec.unit == PERCENT:
        low, high = [max(0.0, v) for v in low], [min(100.0, v) for v in high]
    axis.fill_between(edits, low, high, color=look["color"], alpha=BAND, linewidth=0)
    stride = math.ceil(len(points) / MARKERS_AT_MOST)
    marked = list(range(len(points) - 1, -1, -stride))
    values = [point.value for point in points]
    axis.plot(edits, values, markevery=marked, markersize=4, linewidth=1.6, **look)


def _draw_unedited(axis: Axes, value: float, unit: str) -> None:
    """Draw the unedited value as a line; where it is far off, say where it is instead."""
    logarithmic = axis.get_yscale() == "log"
    limits = widened(axis.get_ylim(), value, logarithmic)
    if limits is not None:
        axis.axhline(value, **UNEDITED)
        axis.set_ylim(*limits)
        return
    below = value < axis.get_ylim()[0]
    axis.annotate(
        f"unedited: {short(value, unit)} {'↓' if below else '↑'}",
        (0.02, 0.03 if below else 0.97),
        xycoords="axes fraction",
        va="bottom" if below else "top",
        fontsize=9,
        color=INK,
    )


def _band_handle(label: str, colour: str = GREY) -> Patch:
    return Patch(color=colour, alpha=BAND if colour != GREY else 0.4, linewidth=0, label=label)


def _logarithmic(axis: Axes, values: Sequence[float]) -> None:
    axis.set_yscale("log")
    positive = [value for value in values if value > 0]
    steps = log_steps(min(positive), max(positive))
    axis.yaxis.set_major_locator(LogLocator(subs=steps, numticks=8))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())


def _draw_bars(axis: Axes, specs: Sequence[MetricSpec], before: Metrics, after: Metrics) -> None:
    """Draw a pair of bars for each metric, with its value above."""
    for place, (metrics, colour) in enumerate(((before, GREY), (after, BLUE))):
        for x, spec in enumerate(specs):
            if spec.name in metrics:
                _draw_bar(axis, x + 0.4 * place - 0.2, metrics[spec.name], spec.unit, colour)
    axis.set_xticks(range(len(specs)), [spec.title.replace(" ", "\n") for spec in specs])
    axis.set_xlim(-0.5, len(specs) - 0.5)


def _draw_bar(axis: Axes, x: float, estimate: Mapping[str, float], unit: str, colour: str) -> None:
    value, error = estimate["value"], estimate.get("standard_error", 0.0)
    axis.bar(x, value, 0.38, color=colour, yerr=error, ecolor=INK, capsize=3)
    axis.annotate(
        short(value, unit),
        (x, value + error),
        textcoords="offset points",
        xytext=(0, 3),
        ha="center",
        fontsize=9,
        color=INK,
    )
