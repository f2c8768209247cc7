"""Tables for terminals and for markdown."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence

from lightning_blue.metrics.evaluation import Metrics
from lightning_blue.metrics.history import RunHistory
from lightning_blue.reporting.views import metrics_at

SCORES = (
    "efficacy",
    "generalization",
    "specificity",
    "score",
    "fluency",
    "consistency",
    "perplexity",
    "recall",
)
TOP1 = ("efficacy_top1", "generalization_top1", "specificity_top1")
LEGEND = (
    "Value ± standard error; percent, but fluency, consistency (x 100) and perplexity (lower is "
    "better). recall: known facts that were not edited."
)
CAPTION_WIDTH = 110
ROWS = {"pre": "unedited", "post": "edited"}


def markdown_table(rows: Sequence[Sequence[str]], header: Sequence[str]) -> str:
    """Lay out a table that is valid markdown and aligned in a terminal; no newline at the end.

    The first column is aligned to the left, and so are others unless each of their cells starts
    with a digit or a sign.

    Raises:
        ValueError: if a row is not as long as the header.
    """
    if any(len(row) != len(header) for row in rows):
        raise ValueError(f"a row does not have the header's {len(header)} cells")
    table = [[_cell(text) for text in row] for row in (header, *rows)]
    columns = list(zip(*table, strict=True))
    widths = [max(3, *map(len, column)) for column in columns]
    right = [i > 0 and bool(rows) and _numeric(column[1:]) for i, column in enumerate(columns)]
    rule = ["-" * (width - r) + ":" * r for width, r in zip(widths, right, strict=True)]
    return "\n".join(
        "| " + " | ".join(_pad(*cell) for cell in zip(row, widths, right, strict=True)) + " |"
        for row in (table[0], rule, *table[1:])
    )


def score_table(history: RunHistory) -> str:
    """Return the tables that a run ends with: metrics and their top-1 variants, before and after.

    Below them stands what each number rests on. Metrics that were not measured are left out;
    without any, the text says so.
    """
    stages = {label: metrics_at(history, stage) for stage, label in ROWS.items()}
    parts = [stages_table(stages, SCORES), stages_table(stages, TOP1)]
    tables = [part for part in parts if part]
    if not tables:
        return "Nothing was measured."
    caption = (textwrap.fill(text, CAPTION_WIDTH) for text in (LEGEND, basis(stages.values())))
    return "\n\n".join([*tables, "\n".join(caption)])


def stages_table(stages: Mapping[str, Metrics], names: Iterable[str]) -> str:
    """Return one row per stage and one column per metric measured in any; empty without one."""
    columns = [name for name in names if any(name in metrics for metrics in stages.values())]
    rows = [
        [label, *(_estimate(metrics.get(name, {})) for name in columns)]
        for label, metrics in stages.items()
        if any(name in metrics for name in columns)
    ]
    return markdown_table(rows, ["", *map(_label, columns)]) if columns else ""


def basis(stages: Iterable[Metrics]) -> str:
    """Say how many prompts, tokens or requests stand behind each metric; the last stage counts."""
    newest: Metrics = {}
    for metrics in stages:
        newest |= metrics
    groups: dict[str, list[str]] = {}
    for name in (*SCORES, *TOP1):
        if name in newest:
            groups.setdefault(_count(newest[name]), []).append(_label(name))
    parts = [f"{count}: {', '.join(names)}" for count, names in groups.items()]
    return f"Measured on {'; '.join(parts)}."


def value_and_error(value: float, error: float | None) -> str:
    """Write a number with as many decimals as its standard error makes meaningful.

    >>> value_and_error(98.5123, 0.6213)
    '98.5 ± 0.6'
    >>> value_and_error(23.4567, 0.0312)
    '23.46 ± 0.03'
    >>> value_and_error(98.5123, None)
    '98.5'
    """
    if abs(value) >= 1e5:
        return f"{value:.3g}" if error is None else f"{value:.3g} ± {error:.1g}"
    decimals = min(3, max(1, -math.floor(math.log10(error)))) if error else 1
    number = f"{value:.{decimals}f}"
    return number if error is None else f"{number} ± {error:.{decimals}f}"


def _label(name: str) -> str:
    return name.replace("_top1", " (top-1)")


def _estimate(estimate: Mapping[str, float]) -> str:
    if not estimate:
        return "-"
    return value_and_error(estimate["value"], estimate.get("standard_error"))


def _count(estimate: Mapping[str, float]) -> str:
    units = {"prompts": "prompts", "tokens": "tokens", "count": "requests"}
    unit = next((unit for unit in units if unit in estimate), None)
    return "an unknown number" if unit is None else f"{int(estimate[unit]):,} {units[unit]}"


def _cell(text: str) -> str:
    """Keep a cell from ending early: no line breaks, no bare bars."""
    return " ".join(text.split()).replace("|", "\\|")


def _numeric(cells: Iterable[str]) -> bool:
    return all(cell and (cell[0].isdigit() or cell[0] in "-+") for cell in cells)


def _pad(text: str, width: int, right: bool) -> str:
    return text.rjust(width) if right else text.ljust(width)
