"""Read finished runs from their folders; name those that cannot be compared, and why."""

from __future__ import annotations

import csv
import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from lightning_blue.comparison import identity
from lightning_blue.comparison.labels import Labels, labels
from lightning_blue.metrics.table import DIRECTION
from lightning_blue.reporting.files import flat, read_edits
from lightning_blue.reporting.run_folders import STATUS, read_status
from lightning_blue.runs.journal import HEADER, RECORDS
from lightning_blue.support.errors import InputError, first_line
from lightning_blue.support.text import counted

DEPTH = 3  # folders below a given one in which runs are looked for

Request = tuple[str, str, str]  # case id, prompt, new object


class LeftOut(NamedTuple):
    """A run that is in no table, and why."""

    folder: Path
    reason: str


@dataclass(frozen=True)
class FinishedRun:
    """A run that has applied and measured all of its requests.

    Attributes:
        folder: of the run.
        config: the resolved configuration under flat keys.
        summary: the numbers of ``summary.json``.
        labels: what it is in a table.
        fingerprint: hash of the unedited model's weights; None where none was recorded.
    """

    folder: Path
    config: Mapping[str, Any]
    summary: Mapping[str, Any]
    labels: Labels
    fingerprint: str | None = None

    @cached_property
    def requests(self) -> dict[Request, dict[str, Any]]:
        """The lines of ``edits.jsonl``, by what was asked for.

        Raises:
            InputError: if the file is missing or damaged.
        """
        rows = read_edits(self.folder)
        return {(row["case_id"], row["prompt"], row["target_new"]): row for row in rows}

    @cached_property
    def digest(self) -> str:
        """A hash of the requests, in any order."""
        asked = sorted((*key, str(row.get("target_true"))) for key, row in self.requests.items())
        return hashlib.sha256(repr(asked).encode()).hexdigest()[:8]

    @cached_property
    def compared(self) -> dict[str, Any]:
        """What was computed and measured, see `identity.compared`."""
        return identity.compared(self.config, self.summary)

    @property
    def protocol(self) -> str:
        """``counterfact`` or ``zsre``."""
        return str(self.summary.get("protocol", "counterfact"))

    def value(self, stage: str, metric: str, field: str = "") -> float | None:
        """Return a number of a stage, NaN if it was not finite, None if it was not measured."""
        key = f"{stage}/{metric}"
        if f"{key}/count" not in self.summary and key not in self.summary:
            return None
        number = self.summary.get(f"{key}/{field}" if field else key)
        return math.nan if number is None else float(number)

    def measured(self, stage: str) -> list[str]:
        """Return the names of the metrics that a stage has a number of, finite or not."""
        keys = (
            key.partition(f"{stage}/")[2] for key in self.summary if key.startswith(f"{stage}/")
        )
        return [k.removesuffix("/count") for k in keys if "/" not in k or k.endswith("/count")]

    @property
    def directions(self) -> list[dict[str, dict[str, float]]]:
        """Which direction of metrics is better, as recorded, for `table.directions_in`."""
        end = f"/{DIRECTION}"
        return [
            {key.removesuffix(end).partition("/")[2]: {DIRECTION: number}}
            for key, number in self.summary.items()
            if key.endswith(end)
        ]

    def curve(self, metric: str) -> list[tuple[int, float, float]]:
        """Return the cumulative measurement over edits applied: edits, value, standard error."""
        points = []
        for row in self._metrics:
            value, error = (
                row.get(f"cumulative/{metric}"),
                row.get(f"cumulative/{metric}/standard_error"),
            )
            if value and math.isfinite(float(value)):
                points.append((int(float(row["edits/applied"])), float(value), float(error or 0)))
        return points

    @cached_property
    def _metrics(self) -> list[dict[str, str]]:
        path = self.folder / "metrics.csv"
        if not path.is_file():
            return []
        with path.open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))


def read_runs(paths: Sequence[Path]) -> tuple[list[FinishedRun], list[LeftOut]]:
    """Read the runs in folders.

    Args:
        paths: of runs, or of folders that hold runs.

    Raises:
        InputError: if a path holds no run, or no run is finished.
    """
    runs: list[FinishedRun] = []
    left_out: list[LeftOut] = []
    for folder in dict.fromkeys(folder for path in paths for folder in _folders(path)):
        found = _read(folder)
        if isinstance(found, LeftOut):
            left_out.append(found)
        else:
            runs.append(found)
    runs, repeated = _without_repeats(runs)
    left_out += repeated
    if not runs:
        reasons = "; ".join(f"{left.folder.name}: {left.reason}" for left in left_out[:5])
        raise InputError(
            f"none of {counted(len(left_out), 'run')} can be compared: {reasons}",
            where=", ".join(map(str, paths)),
            hint="let them finish: the command of each with --ckpt_path=last",
        )
    return runs, left_out


def _folders(path: Path) -> Iterator[Path]:
    """Yield the run folders at or below a path."""
    if not path.is_dir():
        raise InputError(
            "there is no such folder of runs", where=str(path), hint="give a folder under runs/"
        )
    levels = ["*/" * level + STATUS for level in range(DEPTH + 1)]
    found = sorted(file.parent for level in levels for file in path.glob(level))
    if not found:
        raise InputError(
            "the folder holds no runs",
            where=str(path),
            hint="give the folder of a run, which holds run.json, or one with such folders in it",
        )
    yield from found


def model_keys(runs: Sequence[FinishedRun]) -> dict[Path, str]:
    """Tell models by the hash of their weights, or by their full names where none was recorded."""
    paths = {run.folder: str(run.config.get("model/name_or_path")) for run in runs}
    recorded = {paths[run.folder]: run.fingerprint for run in runs if run.fingerprint}
    return {
        run.folder: run.fingerprint or recorded.get(paths[run.folder]) or paths[run.folder]
        for run in runs
    }


def _without_repeats(
    runs: Sequence[FinishedRun],
) -> tuple[list[FinishedRun], list[LeftOut]]:
    """Keep the first of runs that computed and measured the same with one seed and order."""
    models = model_keys(runs)
    kept: dict[str, FinishedRun] = {}
    repeated = []
    for run in runs:
        given = {key: value for key, value in run.compared.items() if value is not None}
        size = run.config.get("data/batch_size")
        what = [models[run.folder], *run.labels, run.digest, size, run.protocol, given]
        first = kept.setdefault(json.dumps(what, sort_keys=True, default=str), run)
        if first is not run:
            repeated.append(LeftOut(run.folder, f"it repeats {first.folder.name}"))
    return list(kept.values()), repeated


def _read(folder: Path) -> FinishedRun | LeftOut:
    status = read_status(folder)
    if status.get("command", "fit") != "fit":
        return LeftOut(folder, "it measured a model without editing it")
    if status.get("status") != "finished":
        said = str(status.get("status", "unknown"))
        reason = str(status.get("reason") or "")
        return LeftOut(folder, f"{said}: {reason}" if reason else said)
    try:
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        config = flat(yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")))
        run = FinishedRun(folder, config, summary, labels(config), _fingerprint(folder))
        _ = run.requests
        return run
    except (OSError, ValueError, yaml.YAMLError, AttributeError) as error:
        return LeftOut(folder, f"its files cannot be read: {first_line(error)}")


def _fingerprint(folder: Path) -> str | None:
    """Return the hash of the unedited model's weights from the journal of a run's records."""
    try:
        journal = json.loads((folder / RECORDS / HEADER).read_text(encoding="utf-8"))
        return str(journal["model"]["fingerprint"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
