"""What people see of the retention matrix: a picture, a table of three numbers, a CSV file."""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from lightning_blue.metrics import table
from lightning_blue.metrics.history import RunHistory
from lightning_blue.metrics.retention_matrix import (
    RetentionMatrix,
    retention_matrix,
    three_numbers,
)
from lightning_blue.metrics.table import PERCENT, MetricSpec
from lightning_blue.reporting.plots import COLUMNS, INK, new_figure
from lightning_blue.reporting.tables import estimate_text, markdown_table
from lightning_blue.support.storage import write_atomic

NUMBERS_AT_MOST = 12  # rows of a picture whose cells show their numbers
TICKS_AT_MOST = 15
FIELDS = ("metric", "batch", "after", "value", "requests")  # of the CSV file

Matrices = dict[str, RetentionMatrix]  # by metric


def matrices(history: RunHistory) -> Matrices:
    """Return the retention matrix of each metric that requests have values of.

    Negation probes have none: they are measured of each batch, and not again after later ones.
    """
    values = [v for column in history.retention.after.values() for v in column.values()]
    specs = table.among(name for each in values for name in each)
    return {
        spec.name: retention_matrix(history, spec.name)
        for spec in specs
        if table.NEGATED not in spec.needs
    }


def write_retention(path: Path, history: RunHistory) -> None:
    """Write ``retention.csv``, one line a cell of each matrix, if there is any.

    ``batch`` counts the batches of the data from 1; ``after`` is ``unedited``, a batch, or ``end``;
    ``value`` is in the metric's unit, percent for instance, ``requests`` how many stand behind it.

    Raises:
        NotWritten: if the file cannot be written.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(FIELDS)
    found = matrices(history)
    for name, matrix in found.items():
        for batch, row, scores in zip(matrix.batches, matrix.values, matrix.scores, strict=True):
            for column, cell, score in zip(matrix.columns, row, scores, strict=True):
                if cell:
                    writer.writerow([name, batch + 1, _label(column), score, len(cell)])
    if found:
        write_atomic(path, text.getvalue())


def retention_section(history: RunHistory) -> str:
    """Return the report's table of what was retained, by metric; empty without a matrix."""
    rows = []
    for name, matrix in _shown(matrices(history)).items():
        found = three_numbers(matrix)
        names = ("retention_mean", "retention_first_batch", "forgetting")
        cells = [estimate_text(found.get(n), PERCENT) for n in names]
        rows.append([table.by_name(name).title, *cells])
    if not rows:
        return ""
    header = ["metric", "mean over batches", "first batch", "mean forgetting"]
    return (
        f"{markdown_table(rows, header)}\n\n"
        "At the end of the run, on a sample of each batch; forgetting is the score right after a "
        "batch less that at\nthe end. All numbers of the matrix are in `retention.csv`."
    )


def retention_figure(history: RunHistory) -> Figure | None:
    """Draw a heat map for each metric of success: batches by when they were measured.

    None without a matrix of at least two batches.
    """
    found = _shown(matrices(history))
    sizes = [len(matrix.batches) for matrix in found.values()]
    if not sizes or max(sizes) < 2:
        return None
    side = min(5.0, 2.4 + 0.22 * max(sizes))
    columns, rows = min(len(found), COLUMNS), math.ceil(len(found) / COLUMNS)
    figure = new_figure(side * columns + 1.0, side * rows + 0.5)
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
    axes: list[Axes] = list(grid.flat)[: len(found)]
    for unused in list(grid.flat)[len(found) :]:
        unused.remove()
    for axis, (name, matrix) in zip(axes, found.items(), strict=True):
        image = _draw(axis, table.by_name(name), matrix)
    for axis in axes[::COLUMNS]:
        axis.set_ylabel("edit batch")
    bar = figure.colorbar(image, ax=axes, fraction=0.04)
    bar.ax.set_title("%", fontsize=9, color=INK)
    return figure


def _draw(axis: Axes, spec: MetricSpec, matrix: RetentionMatrix) -> AxesImage:
    """Draw one matrix; of a small one with its numbers."""
    colours = colormaps["cividis"].with_extremes(bad="white")
    image = axis.imshow(matrix.scores, vmin=0, vmax=100, cmap=colours, aspect="auto", zorder=2)
    axis.set_title(spec.title, fontsize=10, color=INK)
    axis.set_xlabel("measured after batch")
    columns = [_label(column) for column in matrix.columns]
    stride = math.ceil(len(columns) / TICKS_AT_MOST)
    inner = range(1, len(columns) - 1)
    places = [0, *(i for i in inner if (i - 1) % stride == 0), len(columns) - 1]
    axis.set_xticks(places, [columns[i] for i in places], rotation=90)
    rows = range(0, len(matrix.batches), math.ceil(len(matrix.batches) / TICKS_AT_MOST))
    axis.set_yticks(rows, [_label(matrix.batches[i]) for i in rows])
    if len(matrix.batches) <= NUMBERS_AT_MOST:
        for y, scores in enumerate(matrix.scores):
            for x, score in enumerate(scores):
                if not math.isnan(score):
                    dark = "white" if score < 55 else "black"
                    axis.text(
                        x, y, f"{score:.0f}", ha="center", va="center", fontsize=7, color=dark
                    )
    return image


def _shown(found: Matrices) -> Matrices:
    """Return the matrices of metrics of success, which are in percent."""
    specs = {name: table.by_name(name) for name in found}
    return {
        name: matrix
        for name, matrix in found.items()
        if specs[name].panel == "success" and specs[name].unit == PERCENT
    }


def _label(column: int | str) -> str:
    """Name a column or a row: batches are counted from 1."""
    return str(column + 1) if isinstance(column, int) else column
