"""The cells of Tables 2, 4 and 5: metrics by method and plan, side by side for all data sets."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean, stdev
from typing import NamedTuple

from lightning_blue.comparison.labels import (
    BLUE,
    UNEDITED,
    classic_plan,
    method_place,
    plan_place,
    replicated,
)
from lightning_blue.comparison.rows import Row, placed
from lightning_blue.comparison.runs import FinishedRun
from lightning_blue.metrics import table
from lightning_blue.metrics.table import Direction, Directions, MetricSpec
from lightning_blue.support.text import counted


class Setting(NamedTuple):
    """How much was edited, in batches of what size."""

    edits: int
    batch_size: int

    @property
    def title(self) -> str:
        """As a heading."""
        if self.batch_size >= self.edits:
            return f"{counted(self.edits, 'edit')} in one batch"
        return f"{self.edits:,} edits, {self.batch_size:,} at a time"


class Column(NamedTuple):
    """A column of a table: a metric on a data set."""

    data: str
    metric: str

    @property
    def spec(self) -> MetricSpec:
        """The metric's row in the table of metrics; of a harness task runs say the direction."""
        return table.by_name(self.metric)


@dataclass(frozen=True)
class Estimate:
    """A metric of a row on a data set.

    Attributes:
        value: mean over the runs; NaN if it is not finite in one of them.
        standard_error: over requests, the mean of the runs'; NaN where there is none.
        replicate_error: standard error of the mean over the runs, which differ in seed or order;
            None for a single run.
        runs: how many.
        requests: behind each run's value.
    """

    value: float
    standard_error: float
    replicate_error: float | None
    runs: int
    requests: int


@dataclass(frozen=True)
class ScoreTable:
    """Estimates of one setting, by row and column; rows and columns in their order."""

    setting: Setting
    rows: list[Row]
    columns: list[Column]
    cells: Mapping[tuple[Row, Column], Estimate]
    runs: Mapping[tuple[Row, str], list[FinishedRun]]  # by row and data set

    @property
    def replicated(self) -> str:
        """In what runs of one row differ: ``seeds``, ``orders`` or ``seeds and orders``."""
        return replicated([[run.labels.replicate for run in runs] for runs in self.runs.values()])

    def protocol(self, data: str) -> str:
        """Return the protocol of a data set's runs."""
        return next(runs[0].protocol for (_, name), runs in self.runs.items() if name == data)

    @cached_property
    def _directions(self) -> Directions:
        runs = [run for group in self.runs.values() for run in group]
        return table.directions_in(said for run in runs for said in run.directions)

    def direction(self, column: Column) -> Direction:
        """Say which direction of a column is better, as its runs have recorded it."""
        return table.by_name(column.metric, self._directions).direction

    def best(self, row: Row, column: Column) -> bool:
        """Say whether no other edited row of the model is better; alone, none is the best."""
        mine = self.cells.get((row, column))
        if mine is None or row.method == UNEDITED or self.direction(column) == "neither":
            return False
        others = [
            self.cells[other, column].value
            for other in self.rows
            if other.model == row.model
            and other.method != UNEDITED
            and (other, column) in self.cells
        ]
        finite = [value for value in others if math.isfinite(value)]
        best = max if self.direction(column) == "higher" else min
        return len(finite) > 1 and mine.value == best(finite)

    def improved(self, row: Row, column: Column) -> bool:
        """Say whether a row with BLUE is better than the same method with its classic plan."""
        change = self.change(row, column)
        if change is None or math.isnan(change) or self.direction(column) == "neither":
            return False
        return change > 0 if self.direction(column) == "higher" else change < 0

    def change(self, row: Row, column: Column) -> float | None:
        """Return value with BLUE less value with the classic plan; None where there is no pair."""
        classic = self.classic(row)
        pair = [self.cells.get((each, column)) for each in (row, classic) if each is not None]
        if len(pair) < 2 or pair[0] is None or pair[1] is None:
            return None
        return pair[0].value - pair[1].value

    def classic(self, row: Row) -> Row | None:
        """Return the row of the same method without BLUE; None for a row without BLUE."""
        first, comma, rest = row.plan.partition(",")
        if first != BLUE:
            return None
        other = row._replace(plan=f"{classic_plan(row.method)}{comma}{rest}")
        return other if other in self.rows else None

    def pairs(self) -> list[tuple[Row, Row]]:
        """Return each row with BLUE after the row of the same method without."""
        pairs = [(self.classic(row), row) for row in self.rows]
        return [(classic, blue) for classic, blue in pairs if classic is not None]

    def against_first(self) -> list[tuple[Row, Row]]:
        """Return each method after the first one, with the same plan on the same model.

        Methods with their classic plans count as having the same one.
        """
        found: dict[tuple[str, str], list[Row]] = {}
        for row in self.rows:
            if row.method != UNEDITED:
                plan = "classic" if row.plan == classic_plan(row.method) else row.plan
                found.setdefault((row.model, plan), []).append(row)
        return [(rows[0], row) for rows in found.values() for row in rows[1:]]


def score_tables(runs: Sequence[FinishedRun]) -> list[ScoreTable]:
    """Make a table for each setting; the smallest first."""
    by_setting: dict[Setting, list[FinishedRun]] = {}
    for run in runs:
        edits = int(run.summary["edits/applied"])
        by_setting.setdefault(Setting(edits, run.config["data/batch_size"]), []).append(run)
    return [_table(setting, group) for setting, group in sorted(by_setting.items())]


def _table(setting: Setting, runs: Sequence[FinishedRun]) -> ScoreTable:
    cells: dict[tuple[Row, Column], Estimate] = {}
    grouped: dict[tuple[Row, str], list[FinishedRun]] = {}
    unedited: dict[tuple[Row, str], Row] = {}
    for each in placed(runs):
        grouped.setdefault((each.row, each.data), []).append(each.run)
        unedited[each.row, each.data] = each.unedited
    for (row, data), group in grouped.items():
        for place, stage in ((row, "post"), (unedited[row, data], "pre")):
            for spec in table.among(name for run in group for name in run.measured(stage)):
                estimate = _estimate(group, stage, spec.name)
                if estimate is not None:
                    cells.setdefault((place, Column(data, spec.name)), estimate)
    rows = sorted({row for row, _ in cells}, key=_place)
    there = {column for _, column in cells}
    columns = [
        Column(data, spec.name)
        for data in dict.fromkeys(data for _, data in grouped)
        for spec in table.among(column.metric for _, column in cells)
        if Column(data, spec.name) in there
    ]
    return ScoreTable(setting, rows, columns, cells, grouped)


def _place(row: Row) -> tuple[object, ...]:
    return row.model, row.method != UNEDITED, method_place(row.method), plan_place(row.plan)


def _estimate(runs: Sequence[FinishedRun], stage: str, metric: str) -> Estimate | None:
    """Average over runs; None unless each of them has measured it."""
    values = [run.value(stage, metric) for run in runs]
    known = [value for value in values if value is not None]
    if len(known) < len(values) or not known:
        return None
    errors = [run.value(stage, metric, "standard_error") for run in runs]
    counts = [run.value(stage, metric, "count") for run in runs]
    return Estimate(
        value=fmean(known),
        standard_error=fmean(math.nan if error is None else error for error in errors),
        replicate_error=error_of_mean(known) if len(known) > 1 else None,
        runs=len(known),
        requests=int(min(count if count and math.isfinite(count) else 0 for count in counts)),
    )


def error_of_mean(values: Sequence[float]) -> float:
    """Return the standard error of the mean of two or more values; NaN unless all are finite."""
    if not all(map(math.isfinite, values)):
        return math.nan
    return stdev(values) / math.sqrt(len(values))
