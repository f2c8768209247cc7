"""The rows of the table of edits, as the page's script reads them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lightning_blue.data.requests import EditRequest
from lightning_blue.metrics import table
from lightning_blue.metrics.evaluation import RequestOutcome
from lightning_blue.metrics.history import RunHistory
from lightning_blue.metrics.table import PERCENT, MetricSpec
from lightning_blue.reporting.page.differences import differences
from lightning_blue.reporting.views import failed, final_losses, outcome_pairs

RESULTS = {  # of a request, in the order they are offered to filter by
    "failed": "efficacy not reached on its own prompt",
    "succeeded": "efficacy reached on its own prompt",
    "superseded": "a later request on the same prompt took its place",
    "not measured": "applied, and not measured at the end",
    "never applied": "in no batch",
}


def edits_data(history: RunHistory) -> dict[str, Any]:
    """Return everything that the table shows, as plain values for JSON.

    Returns:
        ``metrics``: name, title and whether it is a fraction to show as percent, of each metric
        that requests have values of; ``results`` and ``batches`` and ``relations`` that occur;
        ``edits``: a list for each request, see `_row`.
    """
    specs = _specs(history)
    batches = {place: number for number, places in history.batches.items() for place in places}
    in_force = set(history.in_force)
    ends = final_losses(history)
    measured_only = bool(history.of("test"))
    rows, results = [], set()
    for place, (request, before, after) in enumerate(outcome_pairs(history)):
        batch = batches.get(place)
        result = _result(after, batch is not None or measured_only, place in in_force)
        results.add(result)
        losses = [[layer, *map(_number, end)] for layer, end in ends.get(place, {}).items()]
        rows.append([*_request(request), batch, result, *_texts(before, after, specs), losses])
    return {
        "metrics": [[spec.title, spec.unit == PERCENT, spec.direction] for spec in specs],
        "results": [[name, said] for name, said in RESULTS.items() if name in results],
        "batches": sorted(history.batches),
        "relations": sorted({request.relation for request in history.requests} - {""}),
        "measured_only": measured_only,
        "edits": rows,
    }


def _specs(history: RunHistory) -> list[MetricSpec]:
    """Return the metrics that any request has a value of."""
    outcomes = [*history.before, *history.after.values()]
    names = {name for outcome in outcomes for name in outcome.values}
    return [spec for spec in table.METRICS if spec.per_request and spec.name in names]


def _result(after: RequestOutcome | None, applied: bool, in_force: bool) -> str:
    if after is not None:
        return "failed" if failed(after) else "succeeded"
    if not applied:
        return "never applied"
    return "not measured" if in_force else "superseded"


def _request(request: EditRequest) -> list[str | None]:
    """Return case id, prompt before the subject, subject, prompt behind it, objects, relation."""
    shown = request.shown
    start = shown.find(request.subject) if request.question else request.prompt.find("{}")
    end = start + len(request.subject)
    prompt = [shown, "", ""] if start < 0 else [shown[:start], shown[start:end], shown[end:]]
    return [request.case_id, *prompt, request.target_new, request.target_true, request.relation]


def _texts(
    before: RequestOutcome | None, after: RequestOutcome | None, specs: list[MetricSpec]
) -> list[list[Any] | None]:
    """Return both outcomes, their texts with the differences apart."""
    if before is None or after is None:
        pieces = [[one.continuation] if one else [] for one in (before, after)]
    else:
        pieces = [*differences(before.continuation, after.continuation)]
    return [
        None if one is None else [text, *_numbers(one, specs)]
        for one, text in zip((before, after), pieces, strict=True)
    ]


def _numbers(outcome: RequestOutcome, specs: list[MetricSpec]) -> list[Any]:
    """Return the probabilities of the new and of the true object, and the values of metrics."""
    values: Mapping[str, float] = outcome.values
    probabilities = outcome.probability_new, outcome.probability_true
    return [*map(_number, probabilities), [_number(values.get(spec.name)) for spec in specs]]


def _number(value: float | None) -> float | None:
    """Return a number in four digits; null where there is none, and where JSON has none."""
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.4g}") if isinstance(value, float) else value
