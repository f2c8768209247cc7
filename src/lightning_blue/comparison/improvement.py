"""Table 3: how much BLUE improves a method on average.

The mean, over the columns of a method's row, of the relative change in percent,
100 * (with BLUE - without) / without, each column counting alike. The columns are the paper's:
efficacy, generalization, specificity, fluency and consistency on CounterFact-like data, the first
three on data without true objects (zsRE). Recomputed from the paper's Table 2 that gives each of
the twelve numbers of its Table 3 to the second decimal, PRUNE on GPT-J without zsRE, and their
mean, 35.59.

Relative changes have no natural weight: a metric that starts near zero dominates the mean.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

from lightning_blue.comparison.rows import Row
from lightning_blue.comparison.scores import Column, ScoreTable

METRICS = ("efficacy", "generalization", "specificity", "fluency", "consistency")


@dataclass(frozen=True)
class Improvement:
    """What BLUE does to a method on a model.

    Attributes:
        row: with BLUE.
        percent: mean relative change; None where no column has one.
        columns: how many columns are in it.
        improved: in how many of them BLUE is better.
        undefined: columns that are zero, or not finite, without BLUE.
    """

    row: Row
    percent: float | None
    columns: int
    improved: int
    undefined: tuple[Column, ...]


def relative_change(without: float, with_blue: float) -> float | None:
    """Return the change in percent of what there was; None where that is zero or not finite.

    >>> round(relative_change(50.0, 75.0), 6)
    50.0
    """
    if without == 0 or not (math.isfinite(without) and math.isfinite(with_blue)):
        return None
    return 100 * (with_blue - without) / without


def mean_change(pairs: Iterable[tuple[float, float]]) -> float | None:
    """Average the relative changes that are defined; None if none is.

    Args:
        pairs: value without and with BLUE, by column.
    """
    changes = [relative_change(*pair) for pair in pairs]
    known = [change for change in changes if change is not None]
    return fmean(known) if known else None


def improvements(scores: ScoreTable) -> list[Improvement]:
    """Return the mean improvement of each method that was run with and without BLUE."""
    return [_improvement(scores, classic, blue) for classic, blue in scores.pairs()]


def _improvement(scores: ScoreTable, classic: Row, blue: Row) -> Improvement:
    columns = [
        column
        for column in scores.columns
        if column.metric in METRICS
        and (classic, column) in scores.cells
        and (blue, column) in scores.cells
    ]
    pairs = {
        column: (scores.cells[classic, column].value, scores.cells[blue, column].value)
        for column in columns
    }
    undefined: Sequence[Column] = [
        column for column, pair in pairs.items() if relative_change(*pair) is None
    ]
    return Improvement(
        row=blue,
        percent=mean_change(pairs.values()),
        columns=len(columns) - len(undefined),
        improved=sum(scores.improved(blue, column) for column in columns),
        undefined=tuple(undefined),
    )
