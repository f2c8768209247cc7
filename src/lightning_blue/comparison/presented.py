"""From numbers to tables that are read: scores, improvement, differences, changed requests."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean

from lightning_blue.comparison.changes import Change
from lightning_blue.comparison.differences import Difference
from lightning_blue.comparison.grids import Cell, Grid
from lightning_blue.comparison.improvement import Improvement
from lightning_blue.comparison.labels import plan_title
from lightning_blue.comparison.rows import Row
from lightning_blue.comparison.runs import FinishedRun
from lightning_blue.comparison.scores import Column, Estimate, ScoreTable
from lightning_blue.metrics import table
from lightning_blue.metrics.table import Direction, MetricSpec
from lightning_blue.reporting.tables import NOT_FINITE, value_and_error

SHOWN = 20  # changed requests in a table; all are in the CSV file
REQUESTS = "requests"
UNITS = {  # what a standard error is over, by what is read
    table.ORDINARY_TEXT: "windows of text",
    table.CONTROL_FACTS: "control facts",
    table.RETENTION: "batches",
    table.HARNESS: "records",
}
TEXT = 60  # characters of a continuation in a table


def score_grid(scores: ScoreTable, group: str = "scores") -> Grid | None:
    """Return Table 2, 4 or 5: rows of methods and plans, columns of data sets and metrics."""
    columns = [column for column in scores.columns if column.spec.group == group]
    if not columns:
        return None
    rows = [
        [*map(Cell, (row.model, row.method, plan_title(row.plan)))]
        + [_score(scores, row, column) for column in columns]
        for row in scores.rows
    ]
    several = any(cell.replicate_error is not None for cell in scores.cells.values())
    counts = sorted({cell.runs for cell in scores.cells.values()})
    specs = list({column.metric: column.spec for column in columns}.values())
    caption = f"Value ± standard error over {_units(specs)}"
    if several:
        spelled = " to ".join(map(str, dict.fromkeys((counts[0], counts[-1]))))
        over = scores.replicated
        caption += f", means over {spelled} {over}; in brackets the standard error over {over}"
    caption += (
        ". Bold: best of the model's edited rows; ↑: better with BLUE than the same method with "
        "its classic plan. "
    )
    caption += _better({column.spec.title: scores.direction(column) for column in columns})
    suffix = "" if group == "scores" else f", {group}"
    return Grid(
        f"scores-{scores.setting.edits}-{scores.setting.batch_size}{suffix.replace(', ', '-')}",
        f"{scores.setting.title}{suffix}",
        caption,
        ["model", "method", "plan", *column_titles(columns)],
        rows,
        texts=3,
    )


def _better(directions: Mapping[str, Direction]) -> str:
    """Say which direction of which metric is better, by title."""
    named = {
        each: ", ".join(title for title, direction in directions.items() if direction == each)
        for each in ("lower", "neither", "higher")
    }
    parts = []
    if named["lower"]:
        parts.append(f"lower is better for {named['lower']}")
    if named["neither"]:
        parts.append(f"neither direction is better for {named['neither']}")
    if named["higher"]:
        parts.append("higher for all others" if parts else "higher is better")
    text = "; ".join(parts)
    return f"{text[0].upper()}{text[1:]}."


def _units(specs: Sequence[MetricSpec]) -> str:
    """Say over what the errors of metrics are; those that are over something else by name."""
    units = {
        spec.title: UNITS.get(spec.measure("counterfact").protocol, REQUESTS) for spec in specs
    }
    main = REQUESTS if REQUESTS in units.values() else next(iter(units.values()))
    others = [f"{title}: over {unit}" for title, unit in units.items() if unit != main]
    return f"{main} ({'; '.join(others)})" if others else main


def seconds_grid(scores: ScoreTable) -> Grid | None:
    """Return what an edit cost in each run's row: wall-clock seconds without measuring."""
    places = [place for place, runs in scores.runs.items() if seconds_of(runs)]
    if not places:
        return None
    data_names = list(dict.fromkeys(data for _, data in places))
    rows = [
        [
            *map(Cell, (row.model, row.method, plan_title(row.plan))),
            *(Cell(_mean_and_range(scores.runs.get((row, data), []))) for data in data_names),
        ]
        for row in scores.rows
        if any(row == place for place, _ in places)
    ]
    named = [f"{data}: seconds per edit" for data in data_names]
    return Grid(
        f"seconds-{scores.setting.edits}-{scores.setting.batch_size}",
        f"Seconds per edit, {scores.setting.title}",
        "Wall-clock seconds of the edit batches over the edits, without measuring: mean over runs, "
        "in brackets the least and the most. They compare only where the runs had the same machine "
        "to themselves. Batches whose targets another run had optimised are left out, and rows "
        "that had no others.",
        ["model", "method", "plan", *(named if len(named) > 1 else ["seconds per edit"])],
        rows,
        texts=3,
    )


def improvement_grid(scores: ScoreTable, found: Sequence[Improvement]) -> Grid | None:
    """Return Table 3 for runs."""
    if not found:
        return None
    rows = [
        [
            Cell(each.row.model),
            Cell(", ".join([each.row.method, *each.row.settings])),
            Cell("-" if each.percent is None else f"{each.percent:.2f}"),
            Cell(f"{each.improved} of {each.columns + len(each.undefined)}"),
            Cell(", ".join(column_titles(each.undefined)) or "-"),
        ]
        for each in found
    ]
    return Grid(
        f"improvement-{scores.setting.edits}-{scores.setting.batch_size}",
        f"Average improvement by BLUE, {scores.setting.title}",
        "Mean over efficacy, generalization, specificity, fluency and consistency (those that were "
        "measured; the first three on data without true objects) of 100 (with BLUE - without) / "
        "without, in percent. A column that is zero without BLUE has no relative change and is "
        "left out.",
        ["model", "method", "improvement (%)", "columns improved", "left out"],
        rows,
        texts=2,
    )


def difference_grid(name: str, title: str, found: Sequence[Difference]) -> Grid | None:
    """Return paired tests as a table."""
    if not found:
        return None
    several = [each for each in found if each.replicate_error is not None]
    kinds = {each.replicated for each in several}
    over = kinds.pop() if len(kinds) == 1 else "seeds and orders"
    header = ["model", "method", "data", "metric", "difference", "requests", "better", "worse"]
    header += ["test", "p", "adjusted p"]
    header += [over, f"over {over}", f"p over {over}"] if several else []
    rows = []
    for each in found:
        method = each.second.method
        if each.first.method != method or each.first.plan == each.second.plan:
            method = _less(each.second, each.first)
        texts = [each.second.model, method, each.data, table.by_name(each.metric).label]
        unit = table.by_name(each.metric).unit
        texts += [_signed(each.value, each.standard_error, unit), f"{each.requests}"]
        texts += [f"{each.better}", f"{each.worse}", each.test, _p(each.p), _p(each.adjusted)]
        texts += _over_replicates(each) if several else []
        rows.append([*map(Cell, texts)])
    caption = (
        "Difference ± standard error over the requests that both have edited, paired; better and "
        "worse count them. McNemar: exact test of a metric that is 0 or 1; permutation: flipped "
        "signs of the differences, of the mean over runs where there are several. Adjusted: "
        "Benjamini and Hochberg, over this table."
    )
    if several:
        caption += (
            f" Over {over}: mean difference ± standard error over the {over} that both rows have, "
            "paired, and its t-test (-: all changed by the same)."
        )
    return Grid(name, title, caption, header, rows, texts=4)


def _over_replicates(each: Difference) -> list[str]:
    """Return the cells of a difference over seeds and orders: how many, difference, p."""
    if each.replicate_value is None or each.replicate_error is None or each.replicate_p is None:
        return [f"{each.replicates}", "-", "-"]
    difference = _signed(
        each.replicate_value, each.replicate_error, table.by_name(each.metric).unit
    )
    return [f"{each.replicates}", difference, _p(each.replicate_p)]


def changes_grid(
    found: Sequence[Change],
    shared: int,
    metrics: Sequence[MetricSpec],
    names: tuple[str, str],
) -> Grid:
    """Return the requests that changed most, with texts."""
    half = SHOWN // 2
    named = ", ".join(spec.title for spec in metrics) or "none"
    shown = found if len(found) <= SHOWN else [*found[:half], *found[-half:]]
    rows = [
        [
            Cell(change.request[0]),
            Cell(_cut(change.request[1])),
            Cell(_cut(change.request[2])),
            Cell(", ".join(f"{n} {a:.2g} → {b:.2g}" for n, (a, b) in change.metrics.items())),
            Cell(" → ".join(map(_probability, change.probability))),
            *(Cell(_cut(text)) for text in change.text),
        ]
        for change in shown
    ]
    caption = (
        f"{len(found)} of {shared} shared requests changed in one of the metrics of single "
        f"requests that both runs have measured alike ({named}); what was lost comes first."
    )
    if len(shown) < len(found):
        caption += f" Shown are the {half} greatest losses and gains; all are in changed.csv."
    first, second = names
    header = ["request", "prompt", "new object", "metrics", "p(new)", f"A: {first}", f"B: {second}"]
    return Grid("changed", f"Requests that changed from {first} to {second}", caption, header, rows)


def seconds_of(runs: Sequence[FinishedRun]) -> list[float]:
    """Return each run's seconds per edit; nothing of one that did not note them."""
    return [float(run.summary["seconds/edit"]) for run in runs if "seconds/edit" in run.summary]


def _mean_and_range(runs: Sequence[FinishedRun]) -> str:
    seconds = seconds_of(runs)
    if not seconds:
        return "-"
    mean = f"{fmean(seconds):.3g}"
    return mean if len(seconds) == 1 else f"{mean} ({min(seconds):.3g} to {max(seconds):.3g})"


def _score(scores: ScoreTable, row: Row, column: Column) -> Cell:
    estimate = scores.cells.get((row, column))
    text = estimate_text(estimate, column.spec.unit)
    return Cell(text, scores.best(row, column), scores.improved(row, column))


def estimate_text(estimate: Estimate | None, unit: str) -> str:
    """Write an estimate with its errors; that over runs, in brackets, to one more decimal.

    >>> estimate_text(Estimate(97.0123, 1.2, 0.7312, 3, 200), table.PERCENT)
    '97.0 ± 1.2 (0.73)'
    >>> estimate_text(Estimate(2.7702, 0.05, 5.3e-10, 3, 200), "")
    '2.77 ± 0.05 (0)'
    """
    if estimate is None:
        return "-"
    if not math.isfinite(estimate.value):
        return NOT_FINITE
    error = estimate.standard_error
    text = value_and_error(estimate.value, error if math.isfinite(error) else None, unit)
    if estimate.replicate_error is not None:
        decimals = len(text.partition(" ")[0].partition(".")[2])
        text += f" ({round(estimate.replicate_error, decimals + 1):.2g})"
    return text


def column_titles(columns: Sequence[Column]) -> list[str]:
    """Name columns; by data set too where there are several."""
    several = len({column.data for column in columns}) > 1
    return [
        f"{column.data}: {column.spec.label}" if several else column.spec.label
        for column in columns
    ]


def _less(second: Row, first: Row) -> str:
    """Name a difference of rows; a plan that both have is said once."""
    plans = [plan_title(row.plan) for row in (second, first)]
    if second.method == first.method:
        return f"{second.method}, {plans[0]} less {plans[1]}"
    if plans[0] == plans[1]:
        return f"{second.method} less {first.method}, {plans[0]}"
    return f"{second.method}, {plans[0]} less {first.method}, {plans[1]}"


def _signed(value: float, error: float | None, unit: str) -> str:
    known = error if error is not None and math.isfinite(error) else None
    text = value_and_error(value, known, unit)
    return text if value < 0 else f"+{text}"


def _p(value: float) -> str:
    if math.isnan(value):
        return "-"
    return f"{value:.3f}" if value >= 0.001 else f"{value:.0e}"


def _probability(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else NOT_FINITE


def _cut(text: str) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= TEXT else flat[: TEXT - 1] + "…"
