"""What happened in a run, gathered while it goes on and written when it ends."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from lightning_blue.data.requests import EditRequest, Rejected
from lightning_blue.metrics.evaluation import Metrics, RequestOutcome


class Measurement(NamedTuple):
    """Metrics of one protocol at one point of the run.

    Attributes:
        stage: ``pre`` (all requests, before any edit), ``batch`` (the batch just applied),
            ``cumulative`` (a sample of all edits applied until now), ``first_batch`` (the first
            batch, at the end) or ``post`` (all requests, at the end).
        edits: edits applied when it was taken.
        metrics: name -> value, standard_error, count, prompts.
    """

    stage: str
    edits: int
    metrics: Metrics


class LossCurve(NamedTuple):
    """The inner optimisation of one edit batch at one target layer.

    Attributes:
        batch: number of the edit batch, from 0.
        layer: target layer.
        losses: total, nll, kl, weight decay; NaN once an edit is done, ``(n, steps, 4)``.
    """

    batch: int
    layer: int
    losses: Tensor


@dataclass
class RunHistory:
    """Everything that the files of a run are made from.

    Attributes:
        settings: what the reader of a report wants to know, as plain values: ``model``, ``plan``,
            ``layers``, ``covariance_weight``, ``past_keys``, ``batch_size``, ``data``.
        protocol: ``counterfact`` or ``zsre``.
        requests: the requests of the run, in order.
        rejected: requests that could not be used.
        applied: how many requests were applied.
        rolled_back: places in ``requests`` of those whose batch was written and rolled back.
        guard_events: of the guard, see :class:`blue_callbacks.EditGuard`; None without one.
        measurements: in the order they were taken.
        loss_curves: in the order of the batches.
        before: outcome of each request on the unedited model.
        after: outcome of each request at the end.
        seconds: time spent by part: ``edit``, ``evaluate``, ``covariance``, ``total``.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    protocol: str = "counterfact"
    requests: list[EditRequest] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)
    applied: int = 0
    rolled_back: set[int] = field(default_factory=set)
    guard_events: list[dict[str, Any]] | None = None
    measurements: list[Measurement] = field(default_factory=list)
    loss_curves: list[LossCurve] = field(default_factory=list)
    before: list[RequestOutcome] = field(default_factory=list)
    after: list[RequestOutcome] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    def count(self, n: int, committed: bool) -> None:
        """Count the next n requests as applied, or as rolled back."""
        if committed:
            self.applied += n
        else:
            start = self.applied + len(self.rolled_back)
            self.rolled_back.update(range(start, start + n))

    @property
    def applied_places(self) -> list[int]:
        """The places in ``requests`` of those that were applied, in order."""
        reached = range(self.applied + len(self.rolled_back))
        return [place for place in reached if place not in self.rolled_back]

    @property
    def applied_requests(self) -> list[EditRequest]:
        """The requests that were applied, in order."""
        return [self.requests[place] for place in self.applied_places]

    def of(self, stage: str) -> list[Measurement]:
        """Return the measurements of one stage, in order."""
        return [one for one in self.measurements if one.stage == stage]
