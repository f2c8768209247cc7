"""Tables of what was measured here beside the paper's published numbers."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_blue.comparison import paper
from lightning_blue.comparison.grids import Cell, Grid
from lightning_blue.comparison.improvement import improvements
from lightning_blue.comparison.labels import plan_title
from lightning_blue.comparison.presented import estimate_text
from lightning_blue.comparison.scores import Estimate, ScoreTable
from lightning_blue.metrics import table

PROTOCOLS = {paper.COUNTERFACT: "counterfact", paper.ZSRE: "zsre"}  # of the paper's data sets
Key = tuple[str, str, str]  # method, plan, column


def paper_grids(name: str, scores: Sequence[ScoreTable]) -> list[Grid]:
    """Put ours and the paper's side by side.

    Args:
        name: ``table3``, of which there is one, or ``table2``, ``table4``, ``table5``: a table for
            each metric and data set.
        scores: ours.
    """
    if name == "table3":
        return [_table3(scores)]
    numbers = paper.of_table(name)
    grids = []
    for part in paper.TABLES[name]:
        published = [number for number in numbers if number.table == part]
        for data in PROTOCOLS:
            for metric in dict.fromkeys(n.metric for n in published if n.data == data):
                cells = {
                    (n.row.method, n.row.plan, n.row.model): n
                    for n in published
                    if (n.data, n.metric) == (data, metric)
                }
                grids.append(_of_metric(part, data, metric, cells, scores))
    return grids


def _table3(scores: Sequence[ScoreTable]) -> Grid:
    """Put our average improvements beside the paper's, recomputed from its Table 2."""
    theirs = paper.table3()
    models = list(dict.fromkeys(model for model, _ in theirs))
    ours: dict[tuple[str, str], float | None] = {}
    for each in scores:
        setting = [each.setting.title] if len(scores) > 1 else []
        for found in improvements(each):
            where = ", ".join([found.row.model, *setting, *found.row.settings])
            ours[where, found.row.method] = found.percent
    mine = list(dict.fromkeys(where for where, _ in ours))
    methods = list(dict.fromkeys(method for _, method in [*theirs, *ours]))
    rows = [
        [Cell(method)]
        + [_percent(ours.get((where, method))) for where in mine]
        + [_percent(theirs.get((model, method))) for model in models]
        for method in methods
    ]
    return Grid(
        "paper-table3",
        "Average improvement by BLUE in percent, and the paper's Table 3",
        "The paper's numbers are recomputed from its Table 2, with PRUNE on GPT-J without zsRE, "
        "and agree with its Table 3 to the second decimal.",
        ["method", *(f"{where} (here)" for where in mine), *(f"{m} (paper)" for m in models)],
        rows,
    )


def _of_metric(
    part: str,
    data: str,
    metric: str,
    published: dict[Key, paper.Published],
    scores: Sequence[ScoreTable],
) -> Grid:
    """Ours and theirs for one metric: a row for each method and plan, a column for each model."""
    ours = _ours(data, metric, scores)
    places = list(dict.fromkeys(place for *_, place in ours))
    theirs = list(dict.fromkeys(model for *_, model in published))
    rows, spec = [], table.by_name(metric)
    for method, plan in dict.fromkeys((m, p) for m, p, _ in [*published, *ours]):
        cells = [Cell(method), Cell(plan_title(plan))]
        found = [ours.get((method, plan, place)) for place in places]
        cells += [Cell(estimate_text(each, spec.unit)) for each in found]
        for model in theirs:
            number = published.get((method, plan, model))
            text = "-" if number is None else f"{number.value:.2f} ± {number.error:.2f}"
            cells.append(Cell(text))
        rows.append(cells)
    return Grid(
        f"paper-{part}-{data.lower()}-{metric}",
        f"{spec.label}, {data}: here, and in the paper's Table {part.replace('-', ', ')}",
        f"{paper.REMARKS[part]} Models and data here need not be the paper's.".strip(),
        ["method", "plan", *(f"{p} (here)" for p in places), *(f"{m} (paper)" for m in theirs)],
        rows,
        texts=2,
    )


def _ours(data: str, metric: str, scores: Sequence[ScoreTable]) -> dict[Key, Estimate]:
    """Return our estimates on such data, by model; where there are several, by data and setting."""
    found = [
        (each, row, column, estimate)
        for each in scores
        for (row, column), estimate in each.cells.items()
        if column.metric == metric and each.protocol(column.data) == PROTOCOLS[data]
    ]
    names = {column.data for _, _, column, _ in found}
    ours = {}
    for each, row, column, estimate in found:
        parts = [row.model]
        parts += [column.data] if len(names) > 1 else []
        parts += [each.setting.title] if len(scores) > 1 else []
        ours[row.method, row.plan, ", ".join(parts)] = estimate
    return ours


def _percent(value: float | None) -> Cell:
    return Cell("-" if value is None else f"{value:.2f}")
