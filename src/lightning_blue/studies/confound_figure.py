"""The picture of the study ``confound``: score against norm of the update."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from blue_callbacks.plans import PLANS
from lightning_blue.reporting.plots import BELOW, BLUE, GREEN, GREY, INK, VERMILLION, new_figure
from lightning_blue.studies.results import Row

COLOURS = {"first": "#CC79A7", "last": "#E69F00", "boundary": BLUE, "all": VERMILLION}  # written
MARKERS = {"full": "o", "even": "s", "square_root": "D", "as even": "v"}  # share


def confound_figure(rows: Sequence[Row]) -> Figure:
    """Draw each combination at its own norm and, without a name, at BLUE's.

    Colours tell which layers are written, markers the share, filling whose target.
    """
    figure = new_figure(10.5, 5.6)
    axes = figure.subplots(1, 2, sharey=True)
    for axis, control in zip(axes, ("own norm", "equal norm"), strict=True):
        for row in rows:
            blue = row["combination"] == "boundary"
            if row["written"] and (row["control"] == control or blue):
                _draw(axis, row)
        (unedited,) = [row for row in rows if row["combination"] == "unedited"]
        axis.axhline(unedited["score"], color=INK, linestyle=":", linewidth=1)
        axis.grid(axis="x", color="#E6E6E6", linewidth=0.8)
    axes[0].set_xscale("log")
    axes[0].set_xlabel("Frobenius norm of the whole update")
    axes[0].set_ylabel("score (%)")
    axes[0].set_ylim(-3, 104)
    _one_column(axes[1], rows)
    figure.legend(handles=_legend(), **BELOW, ncols=5)
    return figure


def _draw(axis: Any, row: Row) -> None:
    colour = COLOURS[row["written"]]
    axis.errorbar(
        row["norm"],
        row["score"],
        yerr=row["score_error"],
        color=colour,
        marker=MARKERS[row["share"]],
        markersize=8,
        markerfacecolor=colour if row["target"] == "own" else "white",
        capsize=2,
        linewidth=1,
    )
    if row["combination"] in PLANS:
        axis.annotate(
            row["combination"],
            (row["norm"], row["score"]),
            textcoords="offset points",
            xytext=(7, 4),
            fontsize=9,
            color=INK,
        )


def _one_column(axis: Any, rows: Sequence[Row]) -> None:
    """Spread the points of equal norm, in the order of their scores."""
    axis.clear()
    shown = [
        row for row in rows if row["control"] == "equal norm" or row["combination"] == "boundary"
    ]
    shown.sort(key=lambda row: row["score"])
    for place, row in enumerate(shown):
        _draw(axis, {**row, "norm": place})
    norm = next(row["norm"] for row in rows if row["combination"] == "boundary")
    axis.set_xticks([])
    axis.set_xlim(-0.8, len(shown) + 1.2)
    axis.set_xlabel(f"all at BLUE's norm, {norm:.3g}; in order of score")


def _legend() -> list[Line2D]:
    plain: dict[str, Any] = {"linestyle": "none", "markersize": 8}
    handles = [
        Line2D([], [], color=colour, marker="o", label=f"writes {written}", **plain)
        for written, colour in COLOURS.items()
    ]
    handles += [
        Line2D([], [], color=GREY, marker=marker, label=f"share {share}", **plain)
        for share, marker in MARKERS.items()
    ]
    hollow: dict[str, Any] = {"color": GREEN, "marker": "o", **plain}
    return [
        *handles,
        Line2D([], [], label="own target", **hollow),
        Line2D([], [], label="the last layer's target", markerfacecolor="white", **hollow),
    ]
