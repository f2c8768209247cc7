"""Heat maps and curves of causal tracing, and the two curves that layers are proposed from."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lightning_blue.locating.effects import Effects, Proposal
from lightning_blue.locating.facts import LAST_SUBJECT, TOKEN_CLASSES
from lightning_blue.locating.modules import KINDS, LABELS
from lightning_blue.locating.probe import LayerScore
from lightning_blue.reporting.plots import BAND, BELOW, INK, PALETTE, new_figure

COLOURS = {"hidden": "Purples", "ffn": "Greens", "attention": "Reds"}  # as in the paper
PROPOSED = "#F0E442"  # behind proposed layers


def heat_maps(effects: Effects, window: int) -> Figure:
    """Draw the mean effect by token class and layer, a map for each kind of output."""
    figure = new_figure(10.0, 2.6)
    for axis, kind in zip(figure.subplots(1, len(KINDS), sharey=True), KINDS, strict=True):
        values = 100 * effects.mean[KINDS.index(kind)]
        most = float(values[~values.isnan()].max())
        image = axis.imshow(
            values.numpy(),
            aspect="auto",
            cmap=COLOURS[kind],
            vmin=0,
            vmax=max(most, 1e-9),
            interpolation="nearest",
            zorder=1,  # over the grid
        )
        axis.set_title(_title(kind, window), fontsize=10, color=INK)
        axis.set_yticks(range(len(TOKEN_CLASSES)), TOKEN_CLASSES)
        axis.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        axis.set_xlabel("layer")
        bar = figure.colorbar(image, ax=axis, pad=0.02)
        bar.ax.tick_params(labelsize=8)
    figure.axes[-1].set_ylabel("indirect effect, percentage points", fontsize=8)
    return figure


def by_layer(effects: Effects, window: int) -> Figure:
    """Draw the mean effect over layers with its confidence band, a line for each token class."""
    figure = new_figure(10.0, 3.5)
    for axis, kind in zip(figure.subplots(1, len(KINDS), sharey=True), KINDS, strict=True):
        axis.axhline(0, color=INK, linewidth=0.8)
        for number, name in enumerate(TOKEN_CLASSES):
            if effects.facts[number]:
                _line(axis, effects, kind, number, name)
        axis.set_title(_title(kind, window), fontsize=10, color=INK)
        axis.set_xlabel("layer")
        axis.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    figure.axes[0].set_ylabel("average indirect effect,\npercentage points")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, **BELOW, ncols=6)
    return figure


def proposals(
    effects: Effects, tracing: Proposal, scores: Sequence[LayerScore], probe: Proposal | None
) -> Figure:
    """Draw what layers are proposed from: the FFN's effect, and below it the probe's score."""
    figure = new_figure(5.6, 4.4 if scores else 2.6)
    axes = list(figure.subplots(2 if scores else 1, 1, sharex=True, squeeze=False).flat)
    _shade(axes[0], tracing.layers)
    _line(axes[0], effects, "ffn", LAST_SUBJECT, "FFN, last subject token")
    axes[0].axhline(0, color=INK, linewidth=0.8)
    axes[0].set_ylabel("causal tracing:\nindirect effect, points")
    if scores:
        _shade(axes[1], [] if probe is None else probe.layers)
        axes[1].errorbar(
            [each.layer for each in scores],
            [100 * each.score.mean for each in scores],
            yerr=[0 if math.isnan(each.score.error) else 100 * each.score.error for each in scores],
            color=PALETTE[0],
            marker="o",
            linewidth=2,
            markersize=5,
            capsize=3,
        )
        axes[1].set_ylabel("edits in one layer:\nscore, % ± standard error")
    axes[-1].set_xlabel("layer (shaded: proposed)")
    axes[-1].set_xlim(-0.7, effects.n_layers - 0.3)
    axes[-1].xaxis.set_major_locator(MaxNLocator(10, integer=True))
    return figure


def _title(kind: str, window: int) -> str:
    together = "" if kind == "hidden" or window == 1 else f", {window} layers together"
    return f"{LABELS[kind]}{together}"


def _line(axis: Axes, effects: Effects, kind: str, number: int, label: str) -> None:
    place = KINDS.index(kind), number
    layers = range(effects.n_layers)
    mean, low, high = (
        100 * each[place].numpy() for each in (effects.mean, effects.low, effects.high)
    )
    colour = PALETTE[number % len(PALETTE)]
    axis.fill_between(layers, low, high, color=colour, alpha=BAND, linewidth=0)
    axis.plot(layers, mean, color=colour, linewidth=1.8, label=label)


def _shade(axis: Axes, layers: Sequence[int]) -> None:
    for layer in layers:
        axis.axvspan(layer - 0.5, layer + 0.5, color=PROPOSED, alpha=0.4, linewidth=0)
