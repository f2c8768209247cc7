"""Which requests changed their outcome between two runs, with what the models say."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from lightning_blue.comparison.differences import measured_alike
from lightning_blue.comparison.runs import FinishedRun, Request
from lightning_blue.metrics import table
from lightning_blue.metrics.table import MetricSpec


@dataclass(frozen=True)
class Change:
    """A request whose outcome differs.

    Attributes:
        request: case id, prompt, new object.
        metrics: value in the first and in the second run, by metric, where they differ.
        probability: of the new object, in both; NaN where it is not finite.
        text: the greedy continuation, in both.
    """

    request: Request
    metrics: Mapping[str, tuple[float, float]]
    probability: tuple[float, float]
    text: tuple[str, str]

    @property
    def gain(self) -> float:
        """How much the metrics rose in sum; negative where they fell."""
        return sum(second - first for first, second in self.metrics.values())


def changes(first: FinishedRun, second: FinishedRun) -> list[Change]:
    """Return the shared requests that changed in a metric, what was lost first."""
    shared = [key for key in first.requests if key in second.requests]
    names = [spec.name for spec in compared_metrics(first, second)]
    found = []
    for key in shared:
        outcomes = [run.requests[key].get("after") for run in (first, second)]
        if outcomes[0] and outcomes[1]:
            change = _change(key, outcomes[0], outcomes[1], names)
            if change.metrics:
                found.append(change)
    return sorted(found, key=lambda change: change.gain)


def shared_requests(first: FinishedRun, second: FinishedRun) -> int:
    """Return how many requests both runs have."""
    return len(set(first.requests) & set(second.requests))


def compared_metrics(first: FinishedRun, second: FinishedRun) -> list[MetricSpec]:
    """Return the metrics per request that both runs have measured, and alike; none of top-1."""
    measured: list[set[str]] = []
    for run in (first, second):
        outcomes = [row.get("after") or {} for row in run.requests.values()]
        measured.append({name for each in outcomes for name, v in each.items() if v is not None})
    return [
        spec
        for spec in table.METRICS
        if spec.per_request
        and spec.group != "top-1"
        and spec.name in measured[0] & measured[1]
        and measured_alike(spec, {first.protocol, second.protocol})
    ]


def _change(
    request: Request,
    first: Mapping[str, Any],
    second: Mapping[str, Any],
    names: Iterable[str],
) -> Change:
    values = {
        name: (float(first[name]), float(second[name]))
        for name in names
        if first.get(name) is not None and second.get(name) is not None
    }
    return Change(
        request,
        {name: pair for name, pair in values.items() if pair[0] != pair[1]},
        (_finite_or_nan(first["probability_new"]), _finite_or_nan(second["probability_new"])),
        (str(first["continuation"]), str(second["continuation"])),
    )


def _finite_or_nan(number: float | None) -> float:
    """Read a number of a file in which null stands for what is not finite."""
    return math.nan if number is None else float(number)
