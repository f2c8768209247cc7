"""The pictures of a report, drawn on figures of their own: no global state of matplotlib."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from itertools import cycle, groupby
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from lightning_blue.metrics import table
from lightning_blue.metrics.evaluation import Metrics
from lightning_blue.metrics.history import LossCurve, RunHistory
from lightning_blue.metrics.table import PERCENT, MetricSpec
from lightning_blue.reporting.views import Points, finite, mean_losses, metrics_at, series

Style = dict[str, Any]

# Okabe and Ito's colours, which people with any colour vision tell apart
BLUE, VERMILLION, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#9A9A9A"
INK = "#333333"
SUCCESS_STYLES = (  # colour, marker of each metric of the panel, in turn
    (BLUE, "o"),
    (VERMILLION, "s"),
    (GREEN, "^"),
    ("#CC79A7", "D"),
    ("#E69F00", "v"),
    ("#56B4E9", "P"),
)
LAYERS_PER_ROW = 3
MARKERS_AT_MOST = 15  # on one line
LOG_FROM = 20  # ratio from which an axis is logarithmic
BELOW: Style = {"loc": "outside lower center", "frameon": False, "fontsize": 9}  # a legend


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
    return {name: _png(figure) for name, figure in figures.items() if figure is not None}


def metrics_figure(history: RunHistory) -> Figure | None:
    """Draw metrics over edits applied; None if nothing was measured after a batch."""
    if not (history.of("batch") or history.of("cumulative")):
        return None
    before = finite(metrics_at(history, "pre"))
    courses = [
        (spec, _course(history, spec)) for spec in table.METRICS if spec.panel == "side effects"
    ]
    shown = [(spec, course) for spec, course in courses if course]
    figure = _figure(11 if shown else 7.5, 4.9)
    columns = figure.add_gridspec(1, 2 if shown else 1, width_ratios=[1.7, 1][: 1 + bool(shown)])
    left = figure.add_subplot(columns[0])
    _draw_success(left, history, before)
    if shown:
        panels = columns[1].subgridspec(len(shown), 1)
        for row, (spec, course) in enumerate(shown):
            axis = figure.add_subplot(panels[row])
            _draw_side_effect(axis, spec, course, before.get(spec.name, {}).get("value"))
            axis.set_xlabel("edits applied" if row == len(shown) - 1 else "")
    for axis in figure.axes:
        axis.set_xlim(0, 1.04 * history.measurements[-1].edits)
        axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    return figure


def losses_figure(history: RunHistory) -> Figure | None:
    """Draw the mean loss over inner steps, one panel per target layer; None without curves."""
    curves = sorted(history.loss_curves, key=lambda curve: (curve.layer, curve.batch))
    panels = [(layer, list(part)) for layer, part in groupby(curves, lambda curve: curve.layer)]
    if not panels:
        return None
    rows = math.ceil(len(panels) / LAYERS_PER_ROW)
    columns = math.ceil(len(panels) / rows)
    figure = _figure(max(6.0, 4.4 * columns), 3.4 * rows + 0.8)
    grid = figure.subplots(rows, columns, sharey=True, squeeze=False)
    axes: list[Axes] = list(grid.flat)
    for axis, (layer, part) in zip(axes, panels, strict=False):
        _draw_losses(axis, part)
        axis.set_title(f"target layer {layer}", fontsize=10, color=INK)
        axis.set_xlabel("inner step")
    for unused in axes[len(panels) :]:
        unused.remove()
    for row in range(rows):
        axes[row * columns].set_ylabel("loss, mean over edits (nats)")
    figure.legend(handles=_loss_legend(panels[0][1]), **BELOW, ncols=5)
    return figure


def before_after_figure(history: RunHistory) -> Figure | None:
    """Draw bars of each metric before and after; None if nothing was measured at the end."""
    before, after = (finite(metrics_at(history, stage)) for stage in ("pre", "post"))
    specs = [spec for spec in table.of_group("scores") if spec.name in after]
    percent = [spec for spec in specs if spec.unit == PERCENT]
    others = [spec for spec in specs if spec.unit != PERCENT]
    if not specs:
        return None
    figure = _figure(1.0 + 1.25 * len(percent) + 1.7 * len(others), 4.2)
    widths = [1.25 * len(percent)] * bool(percent) + [1.1] * len(others)
    axes = list(figure.subplots(1, len(widths), width_ratios=widths, squeeze=False).flat)
    if percent:
        _draw_bars(axes[0], percent, before, after)
        axes[0].set_ylim(0, 112)
        axes[0].set_yticks(range(0, 101, 20))
        axes[0].set_ylabel("percent")
    for axis, spec in zip(axes[bool(percent) :], others, strict=True):
        _draw_bars(axis, [spec], before, after)
        axis.set_ylabel(spec.label)
        axis.set_xticks([])
        axis.margins(y=0.12)
        values = [
            metrics[spec.name]["value"] for metrics in (before, after) if spec.name in metrics
        ]
        if _spread(values):
            _logarithmic(axis, values)
    bars = [Line2D([], [], color=colour, linewidth=8) for colour in (GREY, BLUE)]
    figure.legend(bars, ["unedited", "edited (± standard error)"], **BELOW, ncols=2)
    return figure


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height))
    figure.set_layout_engine("constrained", w_pad=0.08, h_pad=0.08, wspace=0.03)
    return figure


def _png(figure: Figure) -> bytes:
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["left", "bottom"]].set_color(GREY)
        axis.tick_params(colors=INK, labelsize=9)
        axis.set_axisbelow(True)
        axis.grid(axis="y", color="#E6E6E6", linewidth=0.8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()


def _draw_success(axis: Axes, history: RunHistory, before: Metrics) -> None:
    """Draw the success of edits: batches right away, all edits so far, the unedited model."""
    handles: list[Line2D] = []
    specs = [spec for spec in table.METRICS if spec.panel == "success"]
    for spec, (colour, marker) in zip(specs, cycle(SUCCESS_STYLES), strict=False):
        name = spec.name
        style: Style = {"color": colour, "marker": marker}
        cumulative, batch = (series(history, [stage], name) for stage in ("cumulative", "batch"))
        hollow = {"markerfacecolor": "white", "markersize": 7.5}  # shows around a filled one
        _line(axis, batch, linestyle="--", linewidth=1, **hollow, **style)
        _line(axis, cumulative, linewidth=2, markersize=4.5, **style)
        if name in before:
            axis.axhline(before[name]["value"], color=colour, linestyle=":", linewidth=1.2)
        if cumulative or batch or name in before:
            handles.append(Line2D([], [], linewidth=2, label=spec.title, **style))
    lines: dict[str, Style] = {
        "all edits so far (a sample)": {"linewidth": 2, "marker": "o"},
        "the batch just applied": {"linestyle": "--", "marker": "o", "markerfacecolor": "white"},
        "unedited model": {"linestyle": ":"},
    }
    handles += [Line2D([], [], color=INK, label=text, **look) for text, look in lines.items()]
    axis.set_ylim(-2, 104)
    axis.set_ylabel("success (%)")
    axis.set_xlabel("edits applied")
    axis.figure.legend(handles=handles, **BELOW, ncols=6, columnspacing=1.4, handlelength=2.4)


def _course(history: RunHistory, spec: MetricSpec) -> Points:
    return series(history, ["pre", "batch", "cumulative", "post"], spec.name)


def _draw_side_effect(
    axis: Axes, spec: MetricSpec, course: Points, reference: float | None
) -> None:
    """Draw what editing should leave as it was, and where it was."""
    _line(axis, course, color=INK, linewidth=1.6, marker="o", markersize=4)
    if reference is not None:
        axis.axhline(reference, color=INK, linestyle=":", linewidth=1.2)
    axis.set_ylabel(spec.label, fontsize=9)
    values = [value for _, value in course]
    if spec.unit == PERCENT:
        axis.set_ylim(-2, 104)
    elif _spread(values):
        _logarithmic(axis, values)
    else:
        axis.set_ylim(0, 1.15 * max(values))


def _line(axis: Axes, points: Points, **style: Any) -> None:
    """Draw a line with at most so many markers, always one on its last point."""
    if not points:
        return
    stride = math.ceil(len(points) / MARKERS_AT_MOST)
    marked = list(range(len(points) - 1, -1, -stride))
    axis.plot(*zip(*points, strict=True), markevery=marked, **style)


def _draw_losses(axis: Axes, curves: Sequence[LossCurve]) -> None:
    """Draw total and nll of each batch; the first and the last stand out."""
    means = [mean_losses(curve).tolist() for curve in curves]
    for place, mean in enumerate(means):
        colour = _batch_colour(place, len(means))
        front = colour != GREY
        total, nll = [terms[0] for terms in mean], [terms[1] for terms in mean]
        axis.plot(
            total,
            color=colour,
            linewidth=2.2 if front else 0.7,
            alpha=1 if front else 0.6,
            zorder=3 if front else 2,
        )
        if front:
            axis.plot(nll, color=colour, linewidth=1.4, linestyle="--", zorder=3)
    values = [term for mean in means for terms in mean for term in terms[:2]]
    if min(values) > 0:
        _logarithmic(axis, values)
    axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))


def _batch_colour(place: int, n: int) -> str:
    return BLUE if place == 0 else VERMILLION if place == n - 1 else GREY


def _loss_legend(curves: Sequence[LossCurve]) -> list[Line2D]:
    """Name the lines; the numbers of batches count from 1, as people do."""
    first, last = curves[0].batch + 1, curves[-1].batch + 1
    handles = [Line2D([], [], color=BLUE, linewidth=2.2, label=f"batch {first}")]
    if len(curves) > 2:
        handles.append(Line2D([], [], color=GREY, linewidth=0.9, label="batches between"))
    if len(curves) > 1:
        handles.append(Line2D([], [], color=VERMILLION, linewidth=2.2, label=f"batch {last}"))
    return [
        *handles,
        Line2D([], [], color=INK, linewidth=2.2, label="total"),
        Line2D([], [], color=INK, linewidth=1.4, linestyle="--", label="nll of the new object"),
    ]


def _spread(values: Sequence[float]) -> bool:
    """Say whether numbers are too far apart for a linear axis, and fit for a logarithmic one."""
    return 0 < LOG_FROM * min(values) < max(values)


def _logarithmic(axis: Axes, values: Sequence[float]) -> None:
    axis.set_yscale("log")
    fine = max(values) < 1000 * min(values)
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if fine else (1,), numticks=8))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())


def _draw_bars(axis: Axes, specs: Sequence[MetricSpec], before: Metrics, after: Metrics) -> None:
    """Draw a pair of bars for each metric, with its value above."""
    for place, (metrics, colour) in enumerate(((before, GREY), (after, BLUE))):
        for x, spec in enumerate(specs):
            if spec.name in metrics:
                _draw_bar(axis, x + 0.4 * place - 0.2, metrics[spec.name], colour)
    axis.set_xticks(range(len(specs)), [spec.title.replace(" ", "\n") for spec in specs])
    axis.set_xlim(-0.5, len(specs) - 0.5)


def _draw_bar(axis: Axes, x: float, estimate: Mapping[str, float], colour: str) -> None:
    value, error = estimate["value"], estimate.get("standard_error", 0.0)
    axis.bar(x, value, 0.38, color=colour, yerr=error, ecolor=INK, capsize=3)
    axis.annotate(
        _short(value),
        (x, value + error),
        textcoords="offset points",
        xytext=(0, 3),
        ha="center",
        fontsize=9,
        color=INK,
    )


def _short(value: float) -> str:
    """Write a number in at most five characters."""
    if value < 100:
        return f"{value:.1f}"
    if value < 10_000:
        return f"{value:.0f}"
    return f"{value / 1000:.0f}k" if value < 1e6 else f"{value:.0e}"
