"""Every number of a comparison as a line of a CSV file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning_blue.comparison.changes import Change
from lightning_blue.comparison.curves import Curves
from lightning_blue.comparison.differences import Difference
from lightning_blue.comparison.improvement import Improvement
from lightning_blue.comparison.presented import column_titles, seconds_of
from lightning_blue.comparison.scores import ScoreTable


def score_records(scores: Sequence[ScoreTable]) -> list[dict[str, Any]]:
    """Return every estimate as one line of a CSV file."""
    return [
        {
            "edits": each.setting.edits,
            "batch_size": each.setting.batch_size,
            **row._asdict(),
            **column._asdict(),
            **vars(each.cells[row, column]),
            "best": each.best(row, column),
            "improved_by_blue": each.improved(row, column) if each.classic(row) else None,
        }
        for each in scores
        for row in each.rows
        for column in each.columns
        if (row, column) in each.cells
    ]


def seconds_records(scores: Sequence[ScoreTable]) -> list[dict[str, Any]]:
    """Return the seconds per edit of every run as one line of a CSV file."""
    return [
        {
            "edits": each.setting.edits,
            "batch_size": each.setting.batch_size,
            **row._asdict(),
            "data": data,
            "run": run.folder.name,
            "seconds_per_edit": seconds,
        }
        for each in scores
        for (row, data), runs in each.runs.items()
        for run in runs
        for seconds in seconds_of([run])
    ]


def difference_records(found: Sequence[Difference]) -> list[dict[str, Any]]:
    """Return every test as one line of a CSV file."""
    return [
        {
            **{f"first_{key}": value for key, value in each.first._asdict().items()},
            **{f"second_{key}": value for key, value in each.second._asdict().items()},
            **{k: v for k, v in vars(each).items() if k not in ("first", "second")},
        }
        for each in found
    ]


def improvement_records(found: Sequence[Improvement]) -> list[dict[str, Any]]:
    """Return every average improvement as one line of a CSV file."""
    return [
        {
            **each.row._asdict(),
            "percent": each.percent,
            "columns": each.columns,
            "improved": each.improved,
            "undefined": "; ".join(column_titles(each.undefined)),
        }
        for each in found
    ]


def curve_records(found: Curves) -> list[dict[str, Any]]:
    """Return every point of the curves as one line of a CSV file."""
    return [
        {**row._asdict(), "data": data, "metric": metric, **point._asdict()}
        for (data, metric, row), points in found.items()
        for point in points
    ]


def change_records(found: Sequence[Change]) -> list[dict[str, Any]]:
    """Return every request that changed as one line of a CSV file."""
    return [
        {
            **dict(zip(("case_id", "prompt", "target_new"), change.request, strict=True)),
            **{
                f"{name}_{run}": value
                for name, pair in change.metrics.items()
                for run, value in zip("ab", pair, strict=True)
            },
            **dict(zip(("probability_a", "probability_b"), change.probability, strict=True)),
            **dict(zip(("text_a", "text_b"), change.text, strict=True)),
        }
        for change in found
    ]
