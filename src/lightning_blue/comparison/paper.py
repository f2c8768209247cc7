"""The paper's published numbers, to be put beside what was measured here.

Source: Tables 2, 4 and 5 of Li et al., *Rethinking Residual Distribution in Locate-then-Edit Model
Editing*, as data in ``docs/paper_tables.csv``.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from lightning_blue.comparison.improvement import METRICS, mean_change
from lightning_blue.comparison.labels import BLUE, UNEDITED, classic_plan
from lightning_blue.comparison.rows import Row
from lightning_blue.support.errors import InputError

FILE = "paper_tables.csv"
TABLES = {"table2": ("2",), "table4": ("4",), "table5": ("5-sequential", "5-batch")}
COUNTERFACT, ZSRE = "CounterFact", "zsRE"
LEFT_OUT = {("GPT-J", "PRUNE", ZSRE)}  # by the paper, from its Table 3, as abnormal
REMARKS = {
    "2": "The unedited models were measured on other samples than in Table 4: of GPT2-XL's zsRE "
    "generalization without edits, 31.30 here and 21.28 there, one looks wrong. The text counts 86 "
    "of 96 results as improved by BLUE; these numbers make it 84.",
    "4": "The unedited models were measured on other samples than in Table 2: of GPT2-XL's zsRE "
    "generalization without edits, 21.28 here and 31.30 there, one looks wrong.",
    "5-sequential": "PMET with BLUE on Llama-3 has the five CounterFact values of MEMIT with BLUE "
    "in Table 2 (99.57, 94.13, 83.77, 626.26, 32.29): one of the two is a copy.",
    "5-batch": "",
}


@dataclass(frozen=True)
class Published:
    """A number of the paper: value and its error."""

    table: str
    row: Row
    data: str
    metric: str
    value: float
    error: float


@cache
def published() -> tuple[Published, ...]:
    """Return every number of the file.

    Raises:
        InputError: if it is missing.
    """
    with _path().open(encoding="utf-8", newline="") as file:
        return tuple(number for line in csv.DictReader(file) for number in _numbers(line))


def of_table(name: str) -> list[Published]:
    """Return the numbers of ``table2``, ``table4`` or ``table5``."""
    return [number for number in published() if number.table in TABLES[name]]


def table3() -> dict[tuple[str, str], float]:
    """Recompute Table 3 from Table 2: mean improvement in percent by model and method."""
    found = {}
    numbers = {(n.row, n.data, n.metric): n.value for n in of_table("table2")}
    for row in dict.fromkeys(row for row, _, _ in numbers if row.plan == BLUE):
        classic = row._replace(plan=classic_plan(row.method))
        pairs = [
            (numbers[classic, data, metric], value)
            for (other, data, metric), value in numbers.items()
            if other == row and (row.model, row.method, data) not in LEFT_OUT
        ]
        change = mean_change(pairs)
        if change is not None:
            found[row.model, row.method] = change
    return found


def _numbers(line: Mapping[str, str]) -> Iterator[Published]:
    plans = {"blue": BLUE, "classic": classic_plan(line["method"]), "unedited": UNEDITED}
    row = Row(line["model"], line["method"], plans[line["plan"]])
    for metric in METRICS:
        yield Published(
            line["table"],
            row,
            COUNTERFACT,
            metric,
            float(line[metric]),
            float(line[f"{metric}_error"]),
        )
    for metric in METRICS[:3]:
        key = f"zsre_{metric}"
        yield Published(
            line["table"], row, ZSRE, metric, float(line[key]), float(line[f"{key}_error"])
        )


def _path() -> Path:
    """Find the file in the repository, or in the installed package."""
    package = Path(__file__).parents[1]
    places = (package / FILE, package.parents[1] / "docs" / FILE)
    for place in places:
        if place.is_file():
            return place
    raise InputError(
        "the paper's numbers are not there",
        where=str(places[-1]),
        hint="install the package again, or leave --paper out",
    )
