"""The retention matrix of continual learning, and the three numbers that sum it up.

``R[b, t]`` is the score of edit batch b after batch t, on a sample of the batch that is fixed at
the start: the matrix of Lopez-Paz and Ranzato (2017, "Gradient Episodic Memory for Continual
Learning"), with edit batches for tasks. Its diagonal is the immediate score, its last column the
final one. Mean retention is their average accuracy, mean forgetting their backward transfer with
the other sign: the mean over all batches but the last of ``R[b, b] - R[b, end]``. (Chaudhry et al.
2018 take the highest score since batch b for ``R[b, b]``; the highest of many scores of a small
sample lies above the true one, so that nothing but noise would count as forgetting.)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import NamedTuple

import torch
from torchmetrics import Metric

from lightning_blue.metrics import numbers, table
from lightning_blue.metrics.history import RunHistory
from lightning_blue.metrics.retention import Values

UNEDITED, END = "unedited", "end"  # the first and the last column
FOLLOWED = "efficacy"  # the metric whose three numbers are rows of the table of metrics


class RetentionMatrix(NamedTuple):
    """A metric of each followed batch, over the run.

    Attributes:
        batches: the followed batches that were applied, by their places in the data from 0: rows.
        columns: ``unedited``, the batches after which was measured, and ``end``: after whatever a
            run does to the weights at its end.
        values: by row and column, the value of each request that has one, in the metric's unit.
    """

    batches: list[int]
    columns: list[int | str]
    values: list[list[list[float]]]

    @property
    def scores(self) -> list[list[float]]:
        """Mean over requests, by row and column; NaN where nothing was measured."""
        return [[fmean(cell) if cell else math.nan for cell in row] for row in self.values]

    @property
    def immediate(self) -> list[float]:
        """Score of each batch right after it was applied: the diagonal."""
        places = map(self.columns.index, self.batches)
        return [row[place] for row, place in zip(self.scores, places, strict=True)]

    @property
    def final(self) -> list[float]:
        """Score of each batch at the end of the run: the last column."""
        return [row[-1] for row in self.scores]


def retention_matrix(history: RunHistory, metric: str) -> RetentionMatrix:
    """Sort what was measured of the followed requests by batch and by when.

    Args:
        history: of a run; empty rows where it has followed nothing.
        metric: by its name in the table of metrics.
    """
    scale = 100.0 if table.by_name(metric).unit == table.PERCENT else 1.0
    retention = history.retention
    after = sorted(retention.after.items())
    batches = [batch for batch in retention.sample if batch in retention.after]
    before = {place: outcome.values for place, outcome in enumerate(history.before)}
    end = {place: outcome.values for place, outcome in history.after.items()}
    columns: list[Mapping[int, Values]] = [before, *(values for _, values in after), end]
    return RetentionMatrix(
        batches,
        [UNEDITED, *(batch for batch, _ in after), END],
        [
            [_values(column, retention.sample[batch], metric, scale) for column in columns]
            for batch in batches
        ],
    )


def three_numbers(matrix: RetentionMatrix) -> dict[str, dict[str, float]]:
    """Sum a matrix up.

    Returns:
        Estimates by the names of their rows in the table of metrics: ``retention_mean`` (mean of
        the last column), ``retention_first_batch`` (its first row) and ``forgetting``, see the head
        of this module. What nothing was measured for is absent.
    """
    rows = list(zip(matrix.immediate, matrix.final, strict=True))
    inputs: dict[str, Sequence[float]] = {
        "retention_mean": matrix.final,
        "retention_first_batch": matrix.values[0][-1] if matrix.values else [],
        "forgetting": [then - now for then, now in rows[:-1]],
    }
    return {name: found for name, of in inputs.items() if (found := _estimate(name, of))}


def _estimate(name: str, values: Sequence[float]) -> dict[str, float]:
    """Fill the metric of a row; empty where there is nothing to fill it with."""
    there = [value for value in values if not math.isnan(value)]
    metric: Metric = table.by_name(name).measure("counterfact").metric(sync_on_compute=False)
    metric.update(torch.tensor(there, dtype=torch.float64), torch.arange(len(there)))
    return numbers(metric.compute()) if there else {}


def _values(
    column: Mapping[int, Values], places: Sequence[int], metric: str, scale: float
) -> list[float]:
    found = [column[place] for place in places if place in column]
    return [scale * values[metric] for values in found if metric in values]
