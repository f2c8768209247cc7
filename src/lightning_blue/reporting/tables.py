"""Tables for terminals and for markdown."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence

from lightning_blue.metrics import table
from lightning_blue.metrics.evaluation import Metrics
from lightning_blue.metrics.history import RunHistory
from lightning_blue.metrics.protocol_rows import TITLES
from lightning_blue.metrics.table import MetricSpec
from lightning_blue.reporting.views import metrics_at

WIDTH = 80  # characters of a line in a terminal
STAGES = {"pre": "unedited", "post": "edited", "test": "measured"}
NOT_FINITE = "not finite"
JUDGED = "_generation_judge"  # ends the names of what a judge says
SAME_QUESTIONS = {  # what is asked, and what the protocols call the score of it
    "own prompt": ("efficacy", "reliability"),
    "paraphrases": ("generalization",),
    "neighbours": ("specificity", "locality"),
    "portability": ("portability",),
}


def markdown_table(rows: Sequence[Sequence[str]], header: Sequence[str]) -> str:
    """Lay out a table that is valid markdown and aligned in a terminal; no newline at the end.

    The first column is aligned to the left, and so are others unless each of their cells starts
    with a digit or a sign.

    Raises:
        ValueError: if a row is not as long as the header.
    """
    if any(len(row) != len(header) for row in rows):
        raise ValueError(f"a row does not have the header's {len(header)} cells")
    lines = [[_cell(text) for text in row] for row in (header, *rows)]
    columns = list(zip(*lines, strict=True))
    widths = [max(3, *map(len, column)) for column in columns]
    right = [i > 0 and bool(rows) and _numeric(column[1:]) for i, column in enumerate(columns)]
    rule = ["-" * (width - r) + ":" * r for width, r in zip(widths, right, strict=True)]
    return "\n".join(
        "| " + " | ".join(_pad(*cell) for cell in zip(row, widths, right, strict=True)) + " |"
        for row in (lines[0], rule, *lines[1:])
    )


def score_table(history: RunHistory) -> str:
    """Return the tables that a run ends with: a group of metrics each, before and after.

    Below them stands what each number is and rests on. Metrics that were not measured are left
    out; without any, the text says so.
    """
    stages = {label: metrics_at(history, stage) for stage, label in STAGES.items()}
    specs = table.among(name for metrics in stages.values() for name in metrics)
    tables = [
        stages_table(stages, [spec for spec in specs if spec.group == group])
        for group in table.GROUPS
    ]
    if not any(tables):
        return "Nothing was measured."
    caption = [textwrap.fill(text, WIDTH) for text in (legend(stages), sample_sizes(stages))]
    return "\n\n".join([*filter(None, tables), "\n".join(caption)])


def stages_table(stages: Mapping[str, Metrics], specs: Iterable[MetricSpec]) -> str:
    """Return one row per metric measured at any stage and one column per stage with any of them.

    Without such a metric the text is empty. Three columns fit a terminal of 80 characters.
    """
    rows = [spec for spec in specs if any(spec.name in metrics for metrics in stages.values())]
    columns = {
        label: metrics
        for label, metrics in stages.items()
        if any(spec.name in metrics for spec in rows)
    }
    cells = [
        [spec.title, *(estimate_text(m.get(spec.name), spec.unit) for m in columns.values())]
        for spec in rows
    ]
    return markdown_table(cells, ["metric", *columns]) if rows else ""


def protocols_table(history: RunHistory) -> str:
    """Put the protocols of a run side by side: what asks the same, one row each, at the end.

    In brackets the unedited model. Empty where only one protocol was measured.
    """
    before, after = metrics_at(history, "pre"), metrics_at(history, "post")
    if history.of("test"):
        before, after = {}, metrics_at(history, "test")
    if not history.added:
        return ""
    main = next(name for name, main in table.MAIN.items() if main == history.protocol)
    columns = {name: f"_{name}" for name in table.PROTOCOLS if name in (main, *history.added)}
    columns[main] = ""
    if any(name.endswith(JUDGED) for name in after):
        columns["judge"] = JUDGED
    rows = [
        [row, *(_side_by_side(names, suffix, before, after) for suffix in columns.values())]
        for row, names in SAME_QUESTIONS.items()
    ]
    shown = [row for row in rows if set(row[1:]) != {"-"}]
    header = ["", *(TITLES.get(name, name) for name in columns)]
    return markdown_table(shown, header) if shown else ""


def _side_by_side(names: Sequence[str], suffix: str, before: Metrics, after: Metrics) -> str:
    """Write what was measured at the end under one of the names, and before any edit."""
    found = next((name + suffix for name in names if name + suffix in after), None)
    if found is None:
        return "-"
    was = f" ({_value(before[found])})" if found in before else ""
    return _value(after[found]) + was


def _value(estimate: Mapping[str, float]) -> str:
    return f"{estimate['value']:.1f}" if "value" in estimate else NOT_FINITE


def legend(stages: Mapping[str, Metrics]) -> str:
    """Say what the numbers of measured metrics are: units, and where higher is not better."""
    names = (name for metrics in stages.values() for name in metrics)
    specs = table.among(names, table.directions_in(stages.values()))
    others = [spec for spec in specs if spec.unit != table.PERCENT]
    text = "Value ± standard error"
    if len(others) < len(specs):
        text += ", in percent"
    if others:
        text += " except" if len(others) < len(specs) else ":"
        text += f" {', '.join(spec.label for spec in others)}"
    lower = [spec.title for spec in specs if spec.direction == "lower"]
    if lower:
        text += f". Lower is better: {', '.join(lower)}"
    neither = [spec.title for spec in specs if spec.direction == "neither"]
    if neither:
        text += f". Neither direction is better: {', '.join(neither)}"
    if any("value" not in estimate for m in stages.values() for estimate in m.values()):
        text += f". {NOT_FINITE.capitalize()}: infinite or undefined"
    return text + "."


def sample_sizes(stages: Mapping[str, Metrics]) -> str:
    """Say how many prompts, tokens or requests stand behind each metric; the last stage counts."""
    newest: Metrics = {}
    for metrics in stages.values():
        newest |= metrics
    groups: dict[str, list[str]] = {}
    for spec in table.among(newest):
        groups.setdefault(_count(newest[spec.name]), []).append(spec.title)
    parts = [f"{count}: {', '.join(titles)}" for count, titles in groups.items()]
    return f"Measured on {'; '.join(parts)}."


def estimate_text(estimate: Mapping[str, float] | None, unit: str) -> str:
    """Write an estimate as a cell: a number, that it is not finite, or ``-`` for none."""
    if estimate is None:
        return "-"
    if "value" not in estimate:
        return NOT_FINITE
    return value_and_error(estimate["value"], estimate.get("standard_error"), unit)


def value_and_error(value: float, error: float | None, unit: str) -> str:
    """Write a number with as many decimals as its standard error makes meaningful.

    Without one, or with an error of zero, it has one decimal; what has no unit, and may be a
    fraction, has three significant digits at least.

    >>> value_and_error(98.5123, 0.6213, table.PERCENT)
    '98.5 ± 0.6'
    >>> value_and_error(23.4567, 0.0312, "")
    '23.46 ± 0.03'
    >>> value_and_error(98.5123, None, table.PERCENT), value_and_error(0.26344, None, "")
    ('98.5', '0.263')
    """
    if abs(value) >= 1e5:
        return f"{value:.3g}" if error is None else f"{value:.3g} ± {error:.1g}"
    if error:
        decimals = min(3, max(1, -math.floor(math.log10(error))))
    elif unit or not value:
        decimals = 1
    else:
        decimals = max(1, 2 - math.floor(math.log10(abs(value))))
    number = f"{value:.{decimals}f}"
    return number if error is None else f"{number} ± {error:.{decimals}f}"


def _count(estimate: Mapping[str, float]) -> str:
    units = {
        "prompts": "prompts", "tokens": "tokens", "batches": "batches", "records": "records",
        "count": "requests",
    }  # fmt: skip
    unit = next((unit for unit in units if unit in estimate), None)
    return "an unknown number" if unit is None else f"{int(estimate[unit]):,} {units[unit]}"


def _cell(text: str) -> str:
    """Keep a cell from ending early: no line breaks, no bare bars."""
    return " ".join(text.split()).replace("|", "\\|")


def _numeric(cells: Iterable[str]) -> bool:
    return all(cell and (cell[0].isdigit() or cell[0] in "-+") for cell in cells)


def _pad(text: str, width: int, right: bool) -> str:
    return text.rjust(width) if right else text.ljust(width)
