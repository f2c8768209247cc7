"""Bars of each metric before and after."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from lightning_blue.metrics import table
from lightning_blue.metrics.history import RunHistory
from lightning_blue.metrics.table import PERCENT, MetricSpec
from lightning_blue.reporting.axes import spread, titled
from lightning_blue.reporting.tables import estimate_text
from lightning_blue.reporting.views import finite, metrics_at

LONGEST = 200.0  # pixels
STAGES = {"unedited": "pre", "edited": "post"}


@dataclass(frozen=True)
class Bar:
    """A bar: its length and error in pixels, and what it says; ``look`` is a CSS class."""

    label: str
    look: str
    length: float
    error: tuple[float, float]
    text: str


@dataclass(frozen=True)
class Bars:
    """The bars of one metric; ``logarithmic`` says that their lengths are."""

    title: str
    note: str
    bars: list[Bar]


def bars(history: RunHistory) -> list[Bars]:
    """Return the bars of each metric of the scores; none if nothing was measured at the end."""
    metrics = {label: finite(metrics_at(history, stage)) for label, stage in STAGES.items()}
    specs = [spec for spec in table.of_group("scores") if spec.name in metrics["edited"]]
    return [
        _bars(spec, {label: m[spec.name] for label, m in metrics.items() if spec.name in m})
        for spec in specs
    ]


def _bars(spec: MetricSpec, estimates: Mapping[str, Mapping[str, float]]) -> Bars:
    values = [estimate["value"] for estimate in estimates.values()]
    logarithmic = spec.unit != PERCENT and spread(values)
    title, _, note = titled(spec.label, [spec]).partition("\n")
    longest = 100.0 if spec.unit == PERCENT else max(map(_upper, estimates.values()))

    def length(value: float) -> float:
        if logarithmic:  # a tenth of the smallest value has no length
            least = math.log(min(values) / 10)
            share = (math.log(max(value, min(values) / 10)) - least) / (math.log(longest) - least)
        else:
            share = value / longest if longest > 0 else 0.0
        return LONGEST * min(1.0, max(0.0, share))

    return Bars(
        title,
        ", ".join(filter(None, [note, "logarithmic" if logarithmic else ""])),
        [
            Bar(
                label,
                STAGES[label],
                length(estimate["value"]),
                (length(2 * estimate["value"] - _upper(estimate)), length(_upper(estimate))),
                estimate_text(estimate, spec.unit),
            )
            for label, estimate in estimates.items()
        ],
    )


def _upper(estimate: Mapping[str, float]) -> float:
    return estimate["value"] + estimate.get("standard_error", 0.0)
