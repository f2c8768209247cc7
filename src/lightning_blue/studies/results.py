"""What a study gives: rows for a CSV file, a picture, and a sentence; and the folder they fill."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from torch import Tensor

from lightning_blue.metrics.evaluation import Metrics
from lightning_blue.reporting.plots import png
from lightning_blue.support.errors import InputError
from lightning_blue.support.storage import write_atomic

Row = dict[str, Any]


class Result(NamedTuple):
    """What a study found.

    Attributes:
        rows: one dictionary a line of the CSV file, all with the same keys.
        finding: what was found, in a few sentences of markdown.
        figure: the picture.
        files: further CSV files by name.
    """

    rows: list[Row]
    finding: str
    figure: Figure
    files: Mapping[str, list[Row]] = {}


class Estimate(NamedTuple):
    """A mean over records and its standard error (NaN for a single record)."""

    mean: float
    error: float

    def __str__(self) -> str:
        """Spell both with two decimals more than a unit."""
        return f"{self.mean:.2f} ± {self.error:.2f}"


def estimate(values: Tensor) -> Estimate:
    """Average over records, ``(n,)``.

    >>> estimate(Tensor([1.0, 3.0]))
    Estimate(mean=2.0, error=1.0)
    """
    exact = values.detach().double().cpu()
    n = len(exact)
    error = float(exact.std() / math.sqrt(n)) if n > 1 else math.nan
    return Estimate(float(exact.mean()), error)


def csv_text(rows: Sequence[Row]) -> str:
    """Spell rows as CSV; what is not finite is left empty."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: _cell(value) for key, value in row.items()} for row in rows)
    return buffer.getvalue()


class Described(NamedTuple):
    """What a report says of a study beside its result.

    Attributes:
        name: of which the files' names are made.
        title: a heading.
        claim: what the paper says.
        setting: what it was made on, a sentence.
        key: a hash of all that the result depends on.
    """

    name: str
    title: str
    claim: str
    setting: str
    key: str


def write_result(folder: Path, study: Described, result: Result) -> None:
    """Write a study's files; the one that says that it is finished comes last.

    Args:
        folder: of the analysis.
        study: which.
        result: what was found.

    Raises:
        NotWritten: if the disk is full or may not be written.
    """
    name = study.name
    for file, rows in {name: result.rows, **result.files}.items():
        write_atomic(folder / f"{file}.csv", csv_text(rows))
    write_atomic(folder / f"{name}.png", png(result.figure))
    tables = ", ".join(f"[{file}.csv]({file}.csv)" for file in (name, *result.files))
    section = "\n\n".join(
        [
            f"## {study.title}",
            f"The paper: {study.claim}",
            f"Here: {result.finding}",
            f"![{study.title}]({name}.png)",
            f"{study.setting} All numbers: {tables}.",
        ]
    )
    status = {"study": name, "key": study.key, "section": section}
    write_atomic(folder / f"{name}.json", json.dumps(status, indent=2) + "\n")


def read_section(folder: Path, study: str, key: str | None = None) -> str | None:
    """Return the report's section of a finished study; None where there is none.

    Args:
        folder: of the analysis.
        study: its name.
        key: if given, only a result of the same key counts.
    """
    try:
        status = json.loads((folder / f"{study}.json").read_text(encoding="utf-8"))
        found = status["key"], str(status["section"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found[1] if key in (None, found[0]) else None


def write_report(folder: Path, studies: Sequence[str]) -> Path:
    """Put the sections of all finished studies into one report, in order; return its path.

    Args:
        folder: of the analysis.
        studies: names of all studies.
    """
    sections = [section for study in studies if (section := read_section(folder, study))]
    write_atomic(folder / "report.md", "\n\n".join(["# Analysis", *sections]) + "\n")
    return folder / "report.md"


def _cell(value: Any) -> Any:
    if isinstance(value, float):
        return f"{value:.6g}" if math.isfinite(value) else ""
    return value


def of_metric(metrics: Metrics, name: str) -> Estimate:
    """Return a metric's estimate; NaN where it was not measured or is not finite."""
    found = metrics.get(name, {})
    return Estimate(found.get("value", math.nan), found.get("standard_error", math.nan))


def measured_of(names: Sequence[str], metrics: Metrics) -> list[str]:
    """Return those of the names that were measured.

    Raises:
        InputError: if there is none.
    """
    found = [name for name in names if name in metrics]
    if not found:
        raise InputError(
            f"the requests offer nothing that could be compared: none of {', '.join(names)}",
            where="the data",
            hint="give requests with target_true, paraphrases and neighborhood_prompts",
        )
    return found


def metric_rows(metrics: Metrics, columns: Row) -> list[Row]:
    """Spell measurements as rows, behind columns that say of what."""
    return [
        {**columns, "metric": name, "value": found.mean, "standard_error": found.error}
        for name in metrics
        for found in [of_metric(metrics, name)]
    ]
