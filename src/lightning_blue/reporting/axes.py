"""Ranges, ticks and titles of axes, the same in pictures and on the page."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.ticker import LogLocator, MaxNLocator

from lightning_blue.metrics.table import PERCENT, MetricSpec

LOG_FROM = 20  # ratio from which an axis is logarithmic
NEAR = 0.6  # of an axis: how far off a value may be that it is widened for


def fitted(spec: MetricSpec, values: Sequence[float]) -> tuple[float, float]:
    """Return an axis that its data fill, yet do not turn into noise where it hardly moves."""
    low, high = min(values), max(values)
    if spec.unit == PERCENT:
        low, high = max(0.0, low), min(100.0, high)
    middle, least = (low + high) / 2, 4.0 if spec.unit == PERCENT else 0.05 * abs(low + high) or 0.1
    half = max(high - low, least) / 2
    low, high = middle - 1.1 * half, middle + 1.1 * half
    if spec.unit == PERCENT and high > 100.5:  # percent that are not there
        low, high = low - (high - 100.5), 100.5
    if spec.unit == PERCENT and low < -0.5:
        low, high = -0.5, high - (low + 0.5)
    return low, high


def widened(
    limits: tuple[float, float], value: float, logarithmic: bool = False
) -> tuple[float, float] | None:
    """Return an axis that shows a value too; None where the value is too far off for that.

    >>> widened((90.0, 100.0), 95.0), widened((90.0, 100.0), 86.0), widened((90.0, 100.0), 4.5)
    ((90.0, 100.0), (85.5, 100.0), None)
    """
    low, high = limits
    if logarithmic:
        return (min(low, value / 1.1), max(high, value * 1.1)) if value > 0 else None
    if not low - NEAR * (high - low) <= value <= high + NEAR * (high - low):
        return None
    pad = 0.05 * (high - low)
    return (
        low if value >= low else value - pad,
        high if value <= high else value + pad,
    )


def spread(values: Sequence[float]) -> bool:
    """Say whether numbers are too far apart for a linear axis, and fit for a logarithmic one."""
    return 0 < LOG_FROM * min(values) < max(values)


def titled(label: str, specs: Sequence[MetricSpec]) -> str:
    """Return a label and which direction is better, of each metric where they differ."""
    directions = {spec.direction for spec in specs}
    if directions == {"neither"}:
        return label
    if len(directions) == 1:
        return f"{label}\n{directions.pop()} is better"
    others = [
        f"{direction} of {', '.join(spec.title for spec in specs if spec.direction == direction)}"
        for direction in ("lower", "neither")
        if direction in directions
    ]
    return f"{label}\nhigher is better, {', '.join(others)}"


def short(value: float, unit: str) -> str:
    """Write a number in at most five characters.

    >>> short(0.2634, ""), short(0.2634, PERCENT)
    ('0.263', '0.3')
    """
    if not unit and 0 < value < 1:
        return f"{value:.3f}"
    if value < 100:
        return f"{value:.1f}"
    if value < 10_000:
        return f"{value:.0f}"
    return f"{value / 1000:.0f}k" if value < 1e6 else f"{value:.0e}"


def ticks(
    low: float, high: float, *, logarithmic: bool = False, whole: bool = False
) -> list[float]:
    """Return round numbers from ``low`` to ``high``, about five; ``whole``: without fractions.

    >>> ticks(0.0, 104.0, whole=True)
    [0.0, 25.0, 50.0, 75.0, 100.0]
    >>> ticks(2.0, 3000.0, logarithmic=True)
    [10.0, 100.0, 1000.0]
    """
    if logarithmic:
        locator = LogLocator(subs=log_steps(low, high), numticks=8)
        found = locator.tick_values(low, high)
    else:
        found = MaxNLocator(5, steps=[1, 2, 2.5, 5, 10], integer=whole).tick_values(low, high)
    return [float(value) for value in found if low <= value <= high]


def log_steps(low: float, high: float) -> tuple[int, ...]:
    """Return the multiples of powers of ten that a logarithmic axis marks."""
    return (1, 2, 5) if high < 1000 * low else (1,)
