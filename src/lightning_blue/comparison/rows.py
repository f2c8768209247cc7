"""Which runs share a row of a table, and what the row is called."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import NamedTuple

from lightning_blue.comparison.identity import OF_UNEDITED, spelled, varied
from lightning_blue.comparison.labels import UNEDITED
from lightning_blue.comparison.runs import FinishedRun, model_keys


class Row(NamedTuple):
    """A row of a table: a method with a plan on a model; unedited models have a row too."""

    model: str
    method: str
    plan: str

    @property
    def settings(self) -> list[str]:
        """What is said behind the plan: in what the row differs from others of its kind."""
        return self.plan.split(", ", 1)[1:]


class Placed(NamedTuple):
    """A run with its place in a table: its rows, edited and unedited, and its data."""

    run: FinishedRun
    row: Row
    unedited: Row
    data: str


def placed(runs: Sequence[FinishedRun]) -> list[Placed]:
    """Place runs in the rows of a table.

    Runs of one row agree in all but their seed and order. What they differ in otherwise is said
    behind the plan. The same holds of the unedited models, for what their numbers depend on.
    """
    models, data = model_names(runs), data_names(runs)
    subjects: dict[tuple[str, str], list[FinishedRun]] = {}
    for run in runs:
        subjects.setdefault((models[run.folder], data[run.folder]), []).append(run)
    found = []
    for (model, name), group in subjects.items():
        of_unedited = {
            key: short
            for key, short in varied([run.compared for run in group]).items()
            if OF_UNEDITED.fullmatch(key)
        }
        by_label: dict[tuple[str, str], list[FinishedRun]] = {}
        for run in group:
            by_label.setdefault((run.labels.method, run.labels.plan), []).append(run)
        for (method, plan), alike in by_label.items():
            differing = varied([run.compared for run in alike])
            for run in alike:
                row = Row(model, method, ", ".join([plan, *spelled(run.compared, differing)]))
                named = ", ".join([UNEDITED, *spelled(run.compared, of_unedited)])
                found.append(Placed(run, row, Row(model, UNEDITED, named), name))
    order = {run.folder: place for place, run in enumerate(runs)}
    return sorted(found, key=lambda each: order[each.run.folder])


def model_names(runs: Sequence[FinishedRun]) -> dict[Path, str]:
    """Name the model of each run by its folder; several of one name by more of their paths."""
    keys = model_keys(runs)
    by_label: dict[str, dict[str, FinishedRun]] = {}  # name, key, the first run of it
    for run in runs:
        by_label.setdefault(run.labels.model, {}).setdefault(keys[run.folder], run)
    names = {
        (label, key): name
        for label, models in by_label.items()
        for key, name in zip(models, _told_apart(models), strict=True)
    }
    return {run.folder: names[run.labels.model, keys[run.folder]] for run in runs}


def data_names(runs: Sequence[FinishedRun]) -> dict[Path, str]:
    """Name the data of each run; by requests and protocol where a name has several of them."""
    requests: dict[str, set[str]] = {}
    protocols: dict[str, set[str]] = {}
    for run in runs:
        requests.setdefault(run.labels.data, set()).add(run.digest)
        protocols.setdefault(run.labels.data, set()).add(run.protocol)
    names = {}
    for run in runs:
        parts = [run.labels.data]
        parts += [f"requests {run.digest}"] if len(requests[run.labels.data]) > 1 else []
        parts += [f"protocol {run.protocol}"] if len(protocols[run.labels.data]) > 1 else []
        names[run.folder] = ", ".join(parts)
    return names


def _told_apart(models: Mapping[str, FinishedRun]) -> list[str]:
    """Name models whose folders have one name: the shortest ends of their paths, dtypes, hashes."""
    runs = list(models.values())
    paths = [PurePath(str(run.config.get("model/name_or_path"))).parts for run in runs]
    dtypes = [f"{run.labels.model}, {run.config.get('model/dtype')}" for run in runs]
    ends = [
        ["/".join(parts[-length:]) for parts in paths]
        for length in range(1, max(map(len, paths)) + 1)
    ]
    hashes = [f"{run.labels.model}, {key[:8]}" for key, run in models.items()]
    candidates = [*ends, dtypes, hashes]
    return next((names for names in candidates if len(set(names)) == len(names)), hashes)
