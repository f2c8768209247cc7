"""What the files of a run read out of its history."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_blue.data.requests import EditRequest
from lightning_blue.metrics.evaluation import Metrics, RequestOutcome
from lightning_blue.metrics.history import LossCurve, RunHistory

Points = list[tuple[int, float]]  # edits applied, value


class FinalLoss(NamedTuple):
    """How the target optimisation of one edit ended: total loss in nats, and forward passes."""

    loss: float
    steps: int


def metrics_at(history: RunHistory, stage: str) -> Metrics:
    """Return all metrics of a stage, the newest value of each; undefined values are left out."""
    merged: Metrics = {}
    for measurement in history.of(stage):
        merged |= measurement.metrics
    return {
        name: {field: number for field, number in estimate.items() if math.isfinite(number)}
        for name, estimate in merged.items()
        if math.isfinite(estimate.get("value", math.nan))
    }


def series(history: RunHistory, stages: Sequence[str], metric: str) -> Points:
    """Return a metric over edits applied, as measured at any of the stages; the newest counts."""
    values = {
        taken.edits: taken.metrics[metric]["value"]
        for taken in history.measurements
        if taken.stage in stages and metric in taken.metrics
    }
    return sorted((edits, value) for edits, value in values.items() if math.isfinite(value))


def batch_of(history: RunHistory, index: int) -> int | None:
    """Return the number of the batch that a request was applied in, from 0; None if in none."""
    size = history.settings.get("batch_size")
    reached = index < history.applied + len(history.rolled_back)
    return index // size if size and reached and index not in history.rolled_back else None


def batches(history: RunHistory) -> int | None:
    """Return how many batches were applied, where the size of a batch is known."""
    size = history.settings.get("batch_size")
    return len({place // size for place in history.applied_places}) if size else None


def outcome_pairs(
    history: RunHistory,
) -> list[tuple[EditRequest, RequestOutcome | None, RequestOutcome | None]]:
    """Return each request with its outcome before and after; None where there is none."""
    n = len(history.requests)
    padded = [(*side, *[None] * n)[:n] for side in (history.before, history.after)]
    return list(zip(history.requests, *padded, strict=True))


def failed(outcome: RequestOutcome | None) -> bool:
    """Say whether an edit missed its own prompt: not all that efficacy asks for was reached."""
    if outcome is None:
        return False
    share = outcome.efficacy_top1 if outcome.efficacy is None else outcome.efficacy
    return share is not None and share < 1


def mean_losses(curve: LossCurve) -> Tensor:
    """Average a loss curve over all its edits; a finished edit keeps its last losses.

    Returns:
        Total, nll, kl and weight decay by inner step, ``(steps, 4)``; NaN only where an edit has
        no losses at all.
    """
    losses = curve.losses.double()
    n, steps, _ = losses.shape
    taken = torch.arange(steps).expand(n, steps).where(~losses[:, :, 0].isnan(), 0)
    newest = taken.cummax(dim=1).values  # step whose losses hold at each step, (n, steps)
    return losses.gather(1, newest[:, :, None].expand_as(losses)).mean(dim=0)


def final_losses(history: RunHistory) -> dict[int, dict[int, FinalLoss]]:
    """Return, by request and target layer, how each target optimisation ended."""
    size = history.settings.get("batch_size")
    ends: dict[int, dict[int, FinalLoss]] = {}
    for curve in history.loss_curves:
        if not size and curve.batch:
            continue  # which request a row belongs to is not known
        for row, losses in enumerate(curve.losses[:, :, 0].tolist()):
            taken = [loss for loss in losses if not math.isnan(loss)]
            if taken:
                index = curve.batch * (size or 0) + row
                ends.setdefault(index, {})[curve.layer] = FinalLoss(taken[-1], len(taken))
    return ends
