"""What runs of a sweep have in common, and who computes it.

Covariances are collected by a process of their own before the runs that need them start, because
several runs would otherwise collect the same ones at the same time; it finds by itself what is
there already. What was measured of the unedited model is kept by the first run that gets there,
behind a lock (:class:`lightning_blue.metrics.unedited.UneditedMeasurements`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from blue_callbacks.plans import layer_updates
from blue_callbacks.solvers import CLOSED_FORMS
from lightning_blue.sweeps.planned import PlannedRun
from lightning_blue.sweeps.tasks import Task

MODEL = ("model/name_or_path", "model/dtype", "model/revision")
SOURCE = "model/covariance/"
BY_DEPTH = range(
    10**6, 10**6 + 5
)  # stand for the layers that a model proposes, which are not known before
GIVEN = "model/covariance/path"  # a file of the user's, from which nothing is collected


def covariance_tasks(runs: Sequence[PlannedRun]) -> list[Task]:
    """Return what collects the covariances that two or more of the runs need.

    Of runs on the same model and text, one task for each set of layers that no other holds, in
    that order: layers that a file lacks are added to it.
    """
    by_source: dict[str, list[PlannedRun]] = {}
    for run in runs:
        if run.config["update/solver"] in CLOSED_FORMS and not run.config.get(GIVEN):
            by_source.setdefault(_source_key(run.config), []).append(run)
    tasks = []
    for key, group in by_source.items():
        if len(group) < 2:
            continue
        covered: set[int] = set()
        for run in sorted(group, key=lambda run: -len(_written(run))):
            layers = _written(run)
            if not layers <= covered:
                covered |= layers
                chosen = run.config["update/layers"]
                named = "-".join(map(str, sorted(layers))) if chosen else "by-depth"
                name = f"stats-{key}-layers-{named}"
                tasks.append(Task(name, ("stats", *run.args), run.root))
    return tasks


def _written(run: PlannedRun) -> set[int]:
    """Return the layers that a run writes; stand-ins for those that it will propose by depth."""
    layers = run.config["update/layers"] or BY_DEPTH
    updates = layer_updates(run.config["update/plan"], layers)
    return {update.layer for update in updates}


def _source_key(config: Mapping[str, Any]) -> str:
    """Hash what a covariance depends on, but for the layer."""
    kept = {key: value for key, value in config.items() if key in MODEL or key.startswith(SOURCE)}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:8]
