"""The picture of tuning: the soft score, which has no ties, of each trial over each setting."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lightning_blue.reporting.plots import BELOW, BLUE, INK, UNEDITED, VERMILLION, new_figure
from lightning_blue.tuning.halving import Trial
from lightning_blue.tuning.results import Tuned, spell_layers

SHADES = ("#B9D7EA", "#5BA3CF", BLUE)  # of the rounds, the last one darkest
APART = 0.16  # of the rounds beside each other
MARKER = 6.0
TITLES = {
    "layers": "critical layers",
    "first_step": "first step, in |h|",
    "clamp": "clamp, in |h|",
    "weight": "weight of the covariance,\nin key dimensions",
}


def figure_of(tuned: Tuned) -> Figure:
    """Draw the soft score of each trial over layers, first step, clamp and covariance weight."""
    figure = new_figure(9.6, 6.4)
    axes = figure.subplots(2, 2, sharey=True)
    for axis, name in zip(axes.flat, TITLES, strict=True):
        _panel(axis, tuned, name)
    for axis in axes[:, 0]:
        axis.set_ylabel("soft score")
    axes.flat[0].set_ylim(-4, 104)
    figure.legend(handles=_handles(tuned), **BELOW, ncols=3)
    return figure


def _panel(axis: Axes, tuned: Tuned, name: str) -> None:
    """Draw the trials over the values of one setting, rounds beside each other."""
    values = sorted({getattr(trial.choice, name) for trial in tuned.trials}, key=_order)
    last = max(trial.round for trial in tuned.trials)
    axis.axhline(tuned.unedited.soft_score, **UNEDITED)
    for trial in tuned.trials:
        x = values.index(getattr(trial.choice, name)) + APART * (trial.round - last / 2)
        axis.plot(x, trial.measured.soft_score, **_look(trial, tuned, last))
    axis.set_xticks(range(len(values)), [_spelled(value) for value in values])
    axis.set_xlim(-0.6, len(values) - 0.4)
    axis.set_xlabel(TITLES[name])
    if name == "layers" and len(values) > 4:
        axis.tick_params(axis="x", labelrotation=30)


def _look(trial: Trial, tuned: Tuned, last: int) -> dict[str, Any]:
    """Return how a trial is drawn: the tuned settings and the untuned ones stand out."""
    look = {"linestyle": "none", "marker": "o", "markersize": MARKER, "color": _shade(trial, last)}
    look["alpha"] = 0.8
    if trial.choice == tuned.trials[0].choice:
        look |= {
            "marker": "D",
            "alpha": 1,
            "markerfacecolor": "white",
            "zorder": 3,
            "markeredgewidth": 1.6,
        }
    if trial == tuned.best:
        look |= {"marker": "*", "markersize": 15, "color": VERMILLION, "zorder": 4}
        look |= {"markerfacecolor": VERMILLION, "alpha": 1}
    return look


def _shade(trial: Trial, last: int) -> str:
    return SHADES[len(SHADES) - 1 - (last - trial.round)]


def _handles(tuned: Tuned) -> list[Line2D]:
    last = max(trial.round for trial in tuned.trials)
    facts = {trial.round: trial.facts for trial in tuned.trials}
    dot: dict[str, Any] = {"linestyle": "none", "marker": "o", "markersize": MARKER}
    rounds = [
        Line2D([], [], color=SHADES[len(SHADES) - 1 - (last - n)], label=f"on {count} facts", **dot)
        for n, count in facts.items()
    ]
    hollow = {**dot, "marker": "D", "markerfacecolor": "white", "color": INK}
    star = {**dot, "marker": "*", "markersize": 13, "color": VERMILLION}
    return [
        *rounds,
        Line2D([], [], label="decided without tuning", **hollow),
        Line2D([], [], label="tuned", **star),
        Line2D([], [], label="unedited model", **UNEDITED),
    ]


def _order(value: Any) -> tuple[Any, ...]:
    return (-1.0,) if value is None else value if isinstance(value, tuple) else (value,)


def _spelled(value: Sequence[int] | float | None) -> str:
    if value is None:
        return "given"
    return f"{value:g}" if isinstance(value, float | int) else spell_layers(value)
