"""What the files of a run read out of its history."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_blue.data.requests import EditRequest
from lightning_blue.metrics import table
from lightning_blue.metrics.evaluation import Metrics, RequestOutcome
from lightning_blue.metrics.history import READ, LossCurve, RunHistory
from lightning_blue.metrics.table import MetricSpec


class Point(NamedTuple):
    """A metric as it was measured after some edits; ``error`` is 0 where none is known."""

    edits: int
    value: float
    error: float = 0.0

    @property
    def span(self) -> tuple[float, float]:
        """One standard error below the value and above it."""
        return self.value - self.error, self.value + self.error


Points = list[Point]


class FinalLoss(NamedTuple):
    """How the target optimisation of one edit ended: total loss in nats, and forward passes."""

    loss: float
    steps: int


def metrics_at(history: RunHistory, stage: str) -> Metrics:
    """Return all metrics of a stage, the newest of each, see `cleaned`."""
    merged: Metrics = {}
    for measurement in history.of(stage):
        merged |= measurement.metrics
    return cleaned(merged)


def cleaned(metrics: Metrics) -> Metrics:
    """Leave out metrics that rest on nothing, and of the others numbers that are not finite.

    An estimate without ``value`` was measured and is infinite or undefined, as perplexity is after
    an update that destroyed the model.
    """
    return {
        name: {field: number for field, number in estimate.items() if math.isfinite(number)}
        for name, estimate in metrics.items()
        if estimate.get("count", 1) > 0
    }


def finite(metrics: Metrics) -> Metrics:
    """Return the metrics that have a value, which is what can be drawn."""
    return {name: estimate for name, estimate in metrics.items() if "value" in estimate}


def measured(history: RunHistory) -> list[MetricSpec]:
    """Return the rows of the metrics that a run measured at any stage, in the table's order."""
    stages = [metrics_at(history, stage) for stage in history.stages()]
    names = (name for metrics in stages for name in metrics)
    return table.among(names, table.directions_in(stages))


def series(history: RunHistory, stages: Sequence[str], metric: str) -> Points:
    """Return a metric over edits applied, as measured at any of the stages; the newest counts.

    What is not finite has no point.
    """
    taken = {
        measurement.edits: cleaned({metric: measurement.metrics[metric]}).get(metric, {})
        for measurement in history.measurements
        if measurement.stage in stages and metric in measurement.metrics
    }
    return [
        Point(edits, estimate["value"], estimate.get("standard_error", 0.0))
        for edits, estimate in sorted(taken.items())
        if "value" in estimate
    ]


def batch_of(history: RunHistory, index: int) -> int | None:
    """Return the number of the batch that a request was applied in, from 0; None if in none."""
    numbers = (number for number, places in history.batches.items() if index in places)
    return next(numbers, None)


def outcome_pairs(
    history: RunHistory,
) -> list[tuple[EditRequest, RequestOutcome | None, RequestOutcome | None]]:
    """Return each request with its outcome before and after; None where there is none."""
    before = dict(enumerate(history.before))
    return [
        (request, before.get(place), history.after.get(place))
        for place, request in enumerate(history.requests)
    ]


def seconds_per_edit(history: RunHistory) -> float | None:
    """Return how long an edit took, from targets to weights; None where none was timed.

    Batches are left out some of whose targets were read, from where another run has kept them.
    """
    total, edits = (
        history.seconds.get("editing"),
        history.applied - edits_with_targets_read(history),
    )
    if total is None or not edits:
        return None
    return (total - history.seconds.get(READ, 0.0)) / edits


def edits_with_targets_read(history: RunHistory) -> int:
    """Return how many edits were applied in batches some of whose targets were read."""
    return sum(len(history.batches[number]) for number in history.targets_read)


def failed(outcome: RequestOutcome | None) -> bool:
    """Say whether an edit missed its own prompt: not all that efficacy asks for was reached."""
    if outcome is None:
        return False
    success = outcome.values.get("efficacy", outcome.values.get("efficacy_top1", 1.0))
    return success < 1


def mean_losses(curve: LossCurve) -> Tensor:
    """Average a loss curve over all its edits; a finished edit keeps its last losses.

    Returns:
        Total, nll, kl and weight decay by inner step, ``(steps, 4)``; NaN only where an edit has
        no losses at all.
    """
    return _carried(curve, curve.losses.shape[1]).mean(dim=0)


def loss_quantiles(curves: Sequence[LossCurve], shares: Sequence[float]) -> Tensor:
    """Return quantiles of the losses over the edits of all curves; edits without any are left out.

    Args:
        curves: of one target layer; a finished edit keeps its last losses.
        shares: from 0 to 1.

    Returns:
        Total, nll, kl and weight decay by inner step, ``(len(shares), steps, 4)``.
    """
    steps = max(curve.losses.shape[1] for curve in curves)
    losses = torch.cat([_carried(curve, steps) for curve in curves])
    return losses.nanquantile(torch.tensor(shares, dtype=losses.dtype), dim=0)


def _carried(curve: LossCurve, steps: int) -> Tensor:
    """Return losses in which a finished edit keeps its last ones, ``(n, steps, 4)``."""
    losses = curve.losses.double()
    n, taken, terms = losses.shape
    rows = torch.arange(taken).expand(n, taken).where(~losses[:, :, 0].isnan(), 0)
    newest = rows.cummax(dim=1).values  # step whose losses hold at each step, (n, taken)
    newest = torch.cat([newest, newest[:, -1:].expand(n, steps - taken)], dim=1)
    return losses.gather(1, newest[:, :, None].expand(n, steps, terms))


def final_losses(history: RunHistory) -> dict[int, dict[int, FinalLoss]]:
    """Return, by request and target layer, how each target optimisation ended."""
    ends: dict[int, dict[int, FinalLoss]] = {}
    for curve in history.loss_curves:
        rows = curve.losses[:, :, 0].tolist()
        for place, losses in zip(history.batches.get(curve.batch, []), rows, strict=False):
            taken = [loss for loss in losses if not math.isnan(loss)]
            if taken:
                ends.setdefault(place, {})[curve.layer] = FinalLoss(taken[-1], len(taken))
    return ends
