"""The command ``compare``: read runs, make tables and curves, write them into a folder."""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_blue.comparison import presented, records
from lightning_blue.comparison.beside_paper import paper_grids
from lightning_blue.comparison.changes import changes, compared_metrics, shared_requests
from lightning_blue.comparison.curves import curves, figures
from lightning_blue.comparison.differences import between_runs, differences
from lightning_blue.comparison.grids import Grid
from lightning_blue.comparison.improvement import Improvement, improvements
from lightning_blue.comparison.runs import FinishedRun, LeftOut, read_runs
from lightning_blue.comparison.scores import ScoreTable, score_tables
from lightning_blue.comparison.written import FOLDER, file_name, log_to_wandb, write_comparison
from lightning_blue.metrics import table
from lightning_blue.reporting.run_folders import STATUS
from lightning_blue.support.errors import InputError
from lightning_blue.support.space import check_writable

LONGEST = 240  # characters of a folder's name, of which file systems take 255 bytes


@dataclass
class Comparison:
    """What is written of a comparison.

    Attributes:
        grids: tables to read, in order.
        records: lines of CSV files, by name.
        pictures: PNG by name.
        left_out: runs that are in no table.
    """

    grids: list[Grid] = field(default_factory=list)
    records: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    pictures: dict[str, bytes] = field(default_factory=dict)
    left_out: list[LeftOut] = field(default_factory=list)

    def add(self, grid: Grid | None) -> None:
        """Add a table, if there is one."""
        if grid is not None:
            self.grids.append(grid)


def compare(args: Namespace) -> None:
    """Compare runs, print the tables, and write them in all formats.

    Raises:
        InputError: if there is nothing to compare, or the folder cannot be written.
    """
    folder = args.output or _folder(args.runs)
    check_writable(folder)
    runs, left_out = read_runs(args.runs)
    made = Comparison(left_out=left_out)
    scores = score_tables(runs)
    _add_scores(made, scores)
    if len(runs) == 2 and _are_two(args.runs):
        _add_changes(made, runs[0], runs[1])
    else:
        _add_differences(made, scores)
    if args.paper:
        made.grids += paper_grids(args.paper, scores)
    _add_curves(made, scores)
    write_comparison(folder, made.grids, made.records, made.pictures, made.left_out)
    if args.wandb != "off":
        log_to_wandb(folder, made.grids, made.pictures, args.wandb)
    _say(made, folder)


def _add_scores(made: Comparison, scores: Sequence[ScoreTable]) -> None:
    improved: list[Improvement] = []
    for each in scores:
        made.add(presented.score_grid(each))
        found = improvements(each)
        made.add(presented.improvement_grid(each, found))
        improved += found
    for group in table.GROUPS[1:]:
        for each in scores:
            made.add(presented.score_grid(each, group))
    for each in scores:
        made.add(presented.seconds_grid(each))
    made.records["scores"] = records.score_records(scores)
    made.records["seconds"] = records.seconds_records(scores)
    made.records["improvement"] = records.improvement_records(improved)


def _add_differences(made: Comparison, scores: Sequence[ScoreTable]) -> None:
    """Test BLUE against the classic plan, and each method against the first one, plan by plan."""
    lines = []
    for each in scores:
        parts = {
            "BLUE against the classic plan": each.pairs(),
            "Methods against the first one": each.against_first(),
        }
        for number, (title, pairs) in enumerate(parts.items()):
            found = differences(each, pairs)
            name = f"differences-{each.setting.edits}-{each.setting.batch_size}-{number}"
            made.add(presented.difference_grid(name, f"{title}, {each.setting.title}", found))
            lines += records.difference_records(found)
    made.records["differences"] = lines


def _add_changes(made: Comparison, first: FinishedRun, second: FinishedRun) -> None:
    """Show what became of single requests from one run to another."""
    shared = shared_requests(first, second)
    if not shared:
        raise InputError(
            "the two runs have no request in common",
            where=f"{first.folder}, {second.folder}",
            hint="compare runs on the same data; `lightning-blue show RUN` lists a run's edits",
        )
    tested = between_runs(first, second)
    found = changes(first, second)
    names = first.folder.name, second.folder.name
    made.add(presented.difference_grid("differences", f"{names[1]} less {names[0]}", tested))
    metrics = compared_metrics(first, second)
    made.add(presented.changes_grid(found, shared, metrics, names))
    made.records["differences"] = records.difference_records(tested)
    made.records["changed"] = records.change_records(found)


def _add_curves(made: Comparison, scores: Sequence[ScoreTable]) -> None:
    lines = []
    for each in scores:
        found = curves(each)
        lines += [
            {"edits_in_all": each.setting.edits, "batch_size": each.setting.batch_size, **line}
            for line in records.curve_records(found)
        ]
        for name, picture in figures(found, each).items():
            made.pictures[f"curves-{each.setting.edits}-{each.setting.batch_size}-{name}"] = picture
    made.records["curves"] = lines


def _folder(paths: Sequence[Path]) -> Path:
    """Return where a comparison is written: in the sweep, or the nearest folder above all runs.

    Two runs have a folder of their own in there, and leave the comparison of all runs as it is.
    """
    folders = [path.parent if _is_run(path) else path for path in paths]
    folder = Path(os.path.commonpath([folder.absolute() for folder in folders])) / FOLDER
    if not _are_two(paths):
        return folder
    first, second = (path.absolute().name for path in paths)
    return folder / file_name(f"{first}-and-{second}")[:LONGEST]


def _is_run(path: Path) -> bool:
    return (path / STATUS).is_file()


def _are_two(paths: Sequence[Path]) -> bool:
    """Say whether two runs were named, and not folders that hold runs."""
    return len(paths) == 2 and all(map(_is_run, paths))


def _say(made: Comparison, folder: Path) -> None:
    for grid in made.grids:
        sys.stdout.write(f"{grid.markdown()}\n\n")
    for left in made.left_out:
        sys.stdout.write(f"left out: {left.folder.name}: {left.reason}\n")
    here = folder.absolute()
    shown = here.relative_to(Path.cwd()) if here.is_relative_to(Path.cwd()) else here
    sys.stdout.write(f"comparison: {shown / 'comparison.md'}\n")
