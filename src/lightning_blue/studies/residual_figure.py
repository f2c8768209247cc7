"""The picture of the study ``residuals``."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lightning_blue.reporting.plots import BELOW, BLUE, INK, VERMILLION
from lightning_blue.studies.pictures import COLOURS, by_layer, logarithmic, new_figure
from lightning_blue.studies.results import Estimate, Row


def residual_figure(
    norms: Sequence[Row],
    theorem: Sequence[Row],
    lemma: Sequence[Row],
    layers: Sequence[int],
    batch_size: int,
) -> Figure:
    """Draw norms by layer, bound and error by layer, and |Q| by batch size and batch.

    Args:
        norms: means over records, by layer.
        theorem: bounds by layer and batch size.
        lemma: bounds by layer and number of batches before.
        layers: critical layers.
        batch_size: of the sequential batches.
    """
    figure = new_figure(11, 7.4)
    apart, bound, sizes, batches = figure.subplots(2, 2).flat
    line = [Estimate(row["apart"], row["standard_error"]) for row in norms]
    by_layer(apart, layers, line, color=BLUE, marker="o")
    apart.set_ylabel("|R^l* - R^L|, mean over records")
    apart.set_ylim(bottom=0)
    _draw_bounds(bound, theorem, layers)
    _draw_norms(sizes, theorem, layers, "batch_size", "q_norm", "-")
    logarithmic(sizes, "x")
    sizes.set_xlabel("batch size, no earlier batches")
    _draw_norms(batches, lemma, layers, "past_keys", "q_norm", "-")
    _draw_norms(batches, lemma, layers, "past_keys", "q_norm_first_batch", "--")
    batches.set_xlabel(f"earlier edits, in batches of {batch_size}")
    for axis in (sizes, batches):
        axis.set_ylabel("|Q|")
        logarithmic(axis, "y")
    handles = [
        Line2D([], [], color=colour, marker=marker, label=f"|Q|, layer {layer}")
        for layer, (colour, marker) in zip(layers, cycle(COLOURS), strict=False)
    ]
    handles.append(
        Line2D([], [], color=INK, linestyle="--", label="the first batch's, after as many others")
    )
    figure.legend(handles=handles, **BELOW, ncols=min(6, len(handles)))
    return figure


def _draw_bounds(axis: Axes, theorem: Sequence[Row], layers: Sequence[int]) -> None:
    """Draw bound and error of the largest batch."""
    largest = max(row["batch_size"] for row in theorem)
    rows = [row for row in theorem if row["batch_size"] == largest]
    for name, colour, marker in (("bound", INK, "v"), ("error", VERMILLION, "o")):
        axis.plot(layers, [row[name] for row in rows], color=colour, marker=marker, label=name)
    axis.set_xticks(list(layers))
    axis.set_xlabel(f"layer, one batch of {largest}")
    axis.set_ylabel("|Δ* - Δ| and its bound")
    axis.set_ylim(bottom=0)
    axis.legend(frameon=False, fontsize=9)


def _draw_norms(
    axis: Axes, rows: Sequence[Row], layers: Sequence[int], over: str, name: str, dash: str
) -> None:
    for layer, (colour, marker) in zip(layers, cycle(COLOURS), strict=False):
        of_layer = [row for row in rows if row["layer"] == layer]
        x, y = [row[over] for row in of_layer], [row[name] for row in of_layer]
        axis.plot(x, y, color=colour, marker=marker, markersize=4, linestyle=dash, linewidth=1.4)
