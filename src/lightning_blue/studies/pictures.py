"""Pictures that several studies share, in the style of a run's report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from lightning_blue.reporting.plots import BELOW, BLUE, INK, VERMILLION, new_figure
from lightning_blue.studies.results import Estimate

__all__ = [
    "COLOURS",
    "GREEN",
    "KINDS",
    "by_layer",
    "lines_over_layers",
    "logarithmic",
    "new_figure",
]

GREEN = "#009E73"
COLOURS = (  # colour and marker of each of several lines; Okabe and Ito's, as in a run's report
    (BLUE, "o"),
    (VERMILLION, "s"),
    (GREEN, "^"),
    ("#CC79A7", "D"),
    ("#E69F00", "v"),
    ("#56B4E9", "P"),
)
KINDS: dict[str, dict[str, Any]] = {  # how each way to get a layer's residual is drawn
    "computed": {"color": BLUE, "marker": "o"},
    "distributed": {"color": VERMILLION, "marker": "s"},
    "literal": {"color": GREEN, "marker": "^", "linestyle": "--"},
}


def by_layer(
    axis: Axes, layers: Sequence[int], estimates: Sequence[Estimate], **style: Any
) -> None:
    """Draw estimates with their standard errors over layers."""
    axis.errorbar(
        layers,
        [each.mean for each in estimates],
        yerr=[each.error for each in estimates],
        linewidth=2,
        markersize=5,
        capsize=3,
        **style,
    )
    axis.set_xticks(list(layers))
    axis.set_xlabel("layer")


def logarithmic(axis: Axes, which: Literal["x", "y"]) -> None:
    """Make an axis logarithmic, with plain numbers at 1, 2 and 5 times the powers of ten."""
    getattr(axis, f"set_{which}scale")("log")
    ticks = getattr(axis, f"{which}axis")
    ticks.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=8))
    ticks.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ticks.set_minor_formatter(NullFormatter())


def lines_over_layers(
    lines: Mapping[str, Sequence[Estimate]],
    layers: Sequence[int],
    styles: Mapping[str, dict[str, Any]],
    label: str,
) -> Figure:
    """Draw one line for each kind, named in a legend below.

    Args:
        lines: name -> estimates by layer.
        layers: critical layers.
        styles: of each line, by name.
        label: of the vertical axis.
    """
    figure = new_figure(6.4, 4.2)
    axis = figure.subplots()
    axis.axhline(0, color=INK, linewidth=0.8)
    for name, estimates in lines.items():
        by_layer(axis, layers, estimates, label=name, **styles[name])
    axis.set_ylabel(label)
    figure.legend(**BELOW, ncols=len(lines))
    return figure
