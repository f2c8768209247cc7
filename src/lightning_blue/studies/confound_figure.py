"""The picture of the study ``confound``: score against norm of the update."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from blue_callbacks.plans import PLANS
from lightning_blue.reporting.plots import BELOW, BLUE, GREY, INK, VERMILLION
from lightning_blue.studies.pictures import GREEN, new_figure
from lightning_blue.studies.results import Row

WRITTEN = {"first": "#CC79A7", "last": "#E69F00", "boundary": BLUE, "all": VERMILLION}  # written
MARKERS = {"full": "o", "even": "s", "square_root": "D", "as even": "v"}  # share


def confound_figure(rows: Sequence[Row], shown: str, norm: float) -> Figure:
    """Draw each combination at its own norm, and once more at BLUE's.

    Colours tell which layers are written, markers the share, filling whose target.

    Args:
        rows: of the study.
        shown: the metric on the vertical axis.
        norm: of BLUE's update.
    """
    figure = new_figure(10.5, 5.6)
    axes = figure.subplots(1, 2, sharey=True)
    for row in rows:
        if row["written"] and row["control"] == "own norm":
            _draw(axes[0], row, shown)
    axes[0].grid(axis="x", color="#E6E6E6", linewidth=0.8)
    axes[0].set_xlim(0, 1.15 * max(row["norm"] for row in rows))
    axes[0].set_xlabel("Frobenius norm of the whole update")
    axes[0].set_ylabel(f"{shown} (%)")
    axes[0].set_ylim(-3, 104)
    _in_order(axes[1], rows, shown, norm)
    (unedited,) = [row for row in rows if row["combination"] == "unedited"]
    for axis in axes:
        axis.axhline(unedited[shown], color=INK, linestyle=":", linewidth=1)
    figure.legend(handles=_legend(), **BELOW, ncols=5)
    return figure


def is_norm(found: float, norm: float) -> bool:
    """Return whether a norm is another one, but for rounding."""
    return math.isclose(found, norm, rel_tol=1e-6)


def _draw(axis: Any, row: Row, shown: str) -> None:
    colour = WRITTEN[row["written"]]
    axis.errorbar(
        row["norm"],
        row[shown],
        yerr=row[f"{shown}_error"],
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
            (row["norm"], row[shown]),
            textcoords="offset points",
            xytext=(7, 4),
            fontsize=9,
            color=INK,
        )


def _in_order(axis: Any, rows: Sequence[Row], shown: str, norm: float) -> None:
    """Spread the points of BLUE's norm, its own among them, in the order of their scores."""
    alike = [row for row in rows if row["written"] and is_norm(row["norm"], norm)]
    alike.sort(key=lambda row: row[shown])
    for place, row in enumerate(alike):
        _draw(axis, {**row, "norm": place}, shown)
    axis.set_xticks([])
    axis.set_xlim(-0.8, len(alike) + 1.2)
    axis.set_xlabel(f"all at BLUE's norm, {norm:.3g}; in order of {shown}")


def _legend() -> list[Line2D]:
    plain: dict[str, Any] = {"linestyle": "none", "markersize": 8}
    handles = [
        Line2D([], [], color=colour, marker="o", label=f"writes {written}", **plain)
        for written, colour in WRITTEN.items()
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
