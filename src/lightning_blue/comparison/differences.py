"""Paired differences between two rows: the same requests were edited, by runs that may pair too.

Over requests, a metric that is 0 or 1 for each request is tested by McNemar's exact test (a
binomial test on the requests that changed), any other by a permutation test of the mean difference
with flipped signs. Values are averaged over replicates first: runs with another seed or order of
the edits repeat requests, they add none. Over replicates, paired by seed and order, the means of
the runs are tested by the paired t-test. p-values of one table are adjusted by Benjamini and
Hochberg's procedure.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import stats

from lightning_blue.comparison.labels import Replicate, replicated
from lightning_blue.comparison.rows import Row
from lightning_blue.comparison.runs import FinishedRun, Request
from lightning_blue.comparison.scores import ScoreTable, error_of_mean
from lightning_blue.metrics import table
from lightning_blue.metrics.table import PERCENT, MetricSpec

RESAMPLES = 9_999  # of the permutation test, unless fewer are possible
SEED = 0
SAME = 1e-9  # relative spread below which changes are rounded copies of one number


@dataclass(frozen=True)
class Difference:
    """How a metric differs between two rows, over the requests that both have edited.

    Attributes:
        data, metric: the column.
        first, second: the rows.
        value: mean of second less first, in the metric's unit (percent as points).
        standard_error: of it, over requests.
        requests: that both have a value of.
        better, worse: requests whose value is higher and lower in the second row.
        test: ``McNemar`` or ``permutation``.
        p: two-sided, over requests.
        adjusted: p with all tests of the table in mind.
        replicates: seeds and orders that both rows have run with.
        replicated: in what these differ: ``seeds``, ``orders`` or ``seeds and orders``.
        replicate_value: mean difference over them; None where the rows share none.
        replicate_error: standard error over replicates of that; None for less than two.
        replicate_p: two-sided, over replicates; None for less than two, NaN where it is undefined.
    """

    data: str
    metric: str
    first: Row
    second: Row
    value: float
    standard_error: float
    requests: int
    better: int
    worse: int
    test: str
    p: float
    adjusted: float
    replicates: int
    replicated: str
    replicate_value: float | None
    replicate_error: float | None
    replicate_p: float | None


def differences(scores: ScoreTable, pairs: Sequence[tuple[Row, Row]]) -> list[Difference]:
    """Test pairs of rows, on all data sets that both have runs on.

    Args:
        scores: the table of the rows.
        pairs: first and second row of each difference.
    """
    found: list[Difference] = []
    for first, second in pairs:
        for data in dict.fromkeys(column.data for column in scores.columns):
            runs = scores.runs.get((first, data)), scores.runs.get((second, data))
            if runs[0] and runs[1]:
                found += _of_metrics(data, first, second, runs[0], runs[1])
    return _adjusted(found)


def _of_metrics(
    data: str,
    first: Row,
    second: Row,
    before: Sequence[FinishedRun],
    after: Sequence[FinishedRun],
) -> list[Difference]:
    found = []
    protocols = {run.protocol for run in (*before, *after)}
    for spec in table.METRICS:
        if spec.per_request and measured_alike(spec, protocols):
            tested = _test(spec, data, (first, second), before, after)
            found += [] if tested is None else [tested]
    return found


def measured_alike(spec: MetricSpec, protocols: Collection[str]) -> bool:
    """Say whether a metric is the same under all of the protocols."""
    return len({spec.measure(protocol) for protocol in protocols}) == 1


def _test(
    spec: MetricSpec,
    data: str,
    rows: tuple[Row, Row],
    before: Sequence[FinishedRun],
    after: Sequence[FinishedRun],
) -> Difference | None:
    """Test one metric; None where no request has a value of it in all runs."""
    values = {run.folder: _values(run, spec.name) for run in (*before, *after)}
    shared = sorted(set.intersection(*map(set, values.values())))
    if not shared:
        return None
    scale = 100.0 if spec.unit == PERCENT else 1.0
    first, second = (
        scale * np.array([[values[run.folder][key] for key in shared] for run in runs])
        for runs in (before, after)
    )  # (runs, requests) each
    changes = mean_difference(first, second, axis=0)
    binary = len(before) == len(after) == 1 and bool(np.isin([first, second], (0, scale)).all())
    paired = _paired(before, first, after, second)
    over = np.array(list(paired.values()))
    several = len(over) > 1
    n = len(changes)
    return Difference(
        data=data,
        metric=spec.name,
        first=rows[0],
        second=rows[1],
        value=float(changes.mean()),
        standard_error=float(changes.std(ddof=1) / math.sqrt(n)) if n > 1 else math.nan,
        requests=n,
        better=int((changes > 0).sum()),
        worse=int((changes < 0).sum()),
        test="McNemar" if binary else "permutation",
        p=mcnemar(changes) if binary else sign_flips(changes),
        adjusted=math.nan,
        replicates=len(over),
        replicated=replicated([paired]),
        replicate_value=float(over.mean()) if len(over) else None,
        replicate_error=error_of_mean(over.tolist()) if several else None,
        replicate_p=paired_t(over) if several else None,
    )


def _paired(
    before: Sequence[FinishedRun],
    first: np.ndarray,
    after: Sequence[FinishedRun],
    second: np.ndarray,
) -> dict[Replicate, float]:
    """Return the difference of the means over requests for each replicate that both rows have."""
    earlier, later = (
        {run.labels.replicate: row for run, row in zip(runs, rows, strict=True)}
        for runs, rows in ((before, first), (after, second))
    )
    return {
        each: float(mean_difference(earlier[each], later[each], axis=0))
        for each in earlier
        if each in later
    }


def mean_difference(first: np.ndarray, second: np.ndarray, axis: int) -> np.ndarray:
    """Return the mean of second less that of first; zero where no more than rounding is left.

    The mean of n numbers up to m is off by n * eps * m at most, in whatever order they are summed.
    """
    terms = max(first.shape[axis], second.shape[axis])
    size = np.maximum(np.abs(first).max(axis=axis), np.abs(second).max(axis=axis))
    changes = second.mean(axis=axis) - first.mean(axis=axis)
    noise = 4 * terms * np.finfo(changes.dtype).eps * size
    return np.where(np.abs(changes) <= noise, 0.0, changes)


def mcnemar(changes: np.ndarray) -> float:
    """Return the exact two-sided p of as many gains against losses; 1 where nothing changed.

    Args:
        changes: of a metric that is 0 or 1, ``(requests,)``.
    """
    gained, lost = int((changes > 0).sum()), int((changes < 0).sum())
    return float(stats.binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0


def sign_flips(changes: np.ndarray) -> float:
    """Return the two-sided p of a permutation test of the mean; 1 where nothing changed.

    Under the null hypothesis a request's change is as likely with the other sign. Requests that
    did not change contribute nothing to the mean, flipped or not, and are left out.

    Args:
        changes: ``(requests,)``.
    """
    changed = changes[changes != 0]
    if not len(changed):
        return 1.0
    if len(changed) == 1:
        return 1.0  # both signs are as far from zero
    result = stats.permutation_test(
        (changed,),
        lambda sample, axis: np.mean(sample, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=1000,
        rng=np.random.default_rng(SEED),
    )
    return float(result.pvalue)


def paired_t(changes: np.ndarray) -> float:
    """Return the two-sided p of the t-test that the mean change over replicates is zero.

    It is 1 where nothing changed, and NaN where all changed by the same: without a variance there
    is no test.
    """
    if np.ptp(changes) <= SAME * np.abs(changes).max():
        return math.nan if changes.any() else 1.0
    return float(stats.ttest_1samp(changes, 0).pvalue)


def _values(run: FinishedRun, metric: str) -> dict[Request, float]:
    """Return the value of each request after editing; those without one are left out."""
    outcomes = {key: row.get("after") or {} for key, row in run.requests.items()}
    return {
        key: float(outcome[metric])
        for key, outcome in outcomes.items()
        if outcome.get(metric) is not None
    }


def _adjusted(found: Sequence[Difference]) -> list[Difference]:
    """Adjust the p-values of a table for their number."""
    if not found:
        return []
    adjusted = stats.false_discovery_control([each.p for each in found])
    return [replace(each, adjusted=float(p)) for each, p in zip(found, adjusted, strict=True)]


def between_runs(first: FinishedRun, second: FinishedRun) -> list[Difference]:
    """Test one run against another, whatever they are; runs of one row are told apart by name."""
    rows = [Row(run.labels.model, run.labels.method, run.labels.plan) for run in (first, second)]
    if rows[0] == rows[1]:
        rows = [
            row._replace(plan=f"{row.plan}, {run.folder.name}")
            for row, run in zip(rows, (first, second), strict=True)
        ]
    return _adjusted(_of_metrics(first.labels.data, rows[0], rows[1], [first], [second]))
