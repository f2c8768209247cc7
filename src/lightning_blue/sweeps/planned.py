"""Which run a combination of a sweep is: its resolved configuration, its identity, its folder."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lightning_blue.cli.parser import EditCLI
from lightning_blue.judge.settings import JudgeSettings
from lightning_blue.reporting.files import flat
from lightning_blue.reporting.run_folders import read_status
from lightning_blue.support.checkpoints import FOLDER, checkpoints
from lightning_blue.support.errors import InputError
from lightning_blue.sweeps.local_files import LocalFiles
from lightning_blue.sweeps.sweep_file import Sweep, Values, short

# Keys that say where a run is kept and how it is shown, not what it is.
ELSEWHERE = re.compile(
    r"run/.*|base|ckpt_path|model/covariance/cache|model/cache_targets|measure/unedited_cache"
    r"|trainer/(logger|default_root_dir|enable_progress_bar|enable_model_summary)(/.*)?"
)
# An export rounds the weights before the last measurement, and writes them. The key is left out of
# runs without one and replies have their default, so that hashes are what they always were.
EXPORT, JUDGED = "run/export", "measure/judge/replies"
SEED = "PL_GLOBAL_SEED"
DECIDED = ("update/layers",)  # what a run writes into its configuration where nothing was asked for
SHARE_TARGETS = "--model.cache_targets=true"  # unless the sweep, or its user, says otherwise
DONE = ("finished", "ended early")  # states of a run that has a result
DIGITS = 10  # of the identity, in a folder's name
LONGEST = 100  # characters of a folder's name before them


@dataclass(frozen=True)
class PlannedRun:
    """A combination of a sweep as a run.

    Attributes:
        values: of the axes.
        config: the resolved configuration under flat keys, without where it is kept.
        identity: a hash of ``config`` and of the local files that it names.
        name: of the run, readable values of the axes and the first digits of the identity.
        root: folder of the sweep's runs.
        args: of `fit`.
    """

    values: Values
    config: Mapping[str, Any]
    identity: str
    name: str
    root: Path
    args: tuple[str, ...]

    @property
    def folder(self) -> Path:
        """The run's folder, whatever the values of its axes were called when it was made."""
        found = sorted(self.root.glob(f"*-{self.identity[:DIGITS]}"))
        return found[0] if found else self.root / self.name

    @property
    def command(self) -> list[str]:
        """The arguments of the program that start the run, or go on with it."""
        name = self.folder.name
        own = [f"--run.root={self.root}", f"--run.name={name}", "--ckpt_path=last"]
        shared = f"--measure.unedited_cache={self.root / 'unedited'}"
        return ["fit", SHARE_TARGETS, *self.args, shared, *own]

    @property
    def state(self) -> str:
        """``finished``, ``ended early``, ``stopped`` (it can be gone on with), or ``new``.

        A folder counts where its configuration is the planned one, whatever it is called.
        """
        status = read_status(self.folder)
        if status.get("status") in DONE and self._is_in(self.folder):
            return str(status["status"])
        return "stopped" if checkpoints(self.folder / FOLDER) else "new"

    @property
    def is_displaced(self) -> bool:
        """Whether a run of another configuration has finished in this one's folder.

        One that was made when an export was no part of what a run is, for instance: going on in
        its folder would put this run's numbers beside that one's model.
        """
        status = read_status(self.folder).get("status")
        return status in DONE and not self._is_in(self.folder)

    def _is_in(self, folder: Path) -> bool:
        try:
            written = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError):
            return False
        if not isinstance(written, dict):
            return False
        found = content(written)
        decided = {key: None for key in DECIDED if self.config.get(key) is None and key in found}
        return {**found, **decided} == self.config


def plan_runs(sweep: Sweep, root: Path, more: Sequence[str] = ()) -> list[PlannedRun]:
    """Resolve every combination of a sweep, without building anything.

    Args:
        sweep: the axes.
        root: folder of all sweeps.
        more: arguments of `fit` for all runs, behind those of the combination.

    Raises:
        InputError: for a combination that `fit` would refuse to parse, or two that are the same.
    """
    runs: dict[str, PlannedRun] = {}
    files = LocalFiles()
    for values in sweep.combinations():
        args = [*sweep.args(values), *more]
        config = content(resolved(args))
        identity = identity_of(config, files)
        parts = [short(axis, values[axis]) for axis in sweep.named]
        label = re.sub(r"[^\w.=+-]+", "-", "-".join(parts))[:LONGEST].strip("-")
        name = f"{label}-{identity[:DIGITS]}"
        if identity in runs:
            raise InputError(
                f"{dict(runs[identity].values)} and {dict(values)} are the same run",
                where=str(sweep.path),
                hint="a run file that comes later, or a key, overrides what differs between them",
            )
        runs[identity] = PlannedRun(values, config, identity, name, root / sweep.name, tuple(args))
    return list(runs.values())


class _Resolved(EditCLI):
    """What `fit` makes of its arguments, without a seed, a folder or a model."""

    def before_instantiate_classes(self) -> None:
        """Check nothing: nothing will be written."""

    def instantiate_classes(self) -> None:
        """Build nothing."""


def resolved(args: Sequence[str]) -> dict[str, Any]:
    """Return the whole configuration that `fit` would run with, as plain nested values.

    Raises:
        InputError: for what `fit` refuses to parse.
    """
    seed = os.environ.get(SEED)
    try:
        cli = _Resolved(list(args))
    finally:  # a parser seeds its process; runs have seeds of their own
        os.environ.pop(SEED, None)
        if seed is not None:
            os.environ[SEED] = seed
    return dict(yaml.safe_load(cli.parser.dump(cli.config, skip_none=False, skip_check=True)))


def content(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a run is: its configuration under flat keys, without where it is kept."""
    found = flat(config)
    kept = {key: value for key, value in found.items() if not ELSEWHERE.fullmatch(key)}
    if found.get(EXPORT):
        kept[EXPORT] = True
    if JUDGED in kept:
        kept[JUDGED] = JudgeSettings().replies
    return kept


def identity_of(config: Mapping[str, Any], files: LocalFiles | None = None) -> str:
    """Hash what a run is, and the local files that it names; hexadecimal."""
    hashes = (files or LocalFiles()).of(config)
    described = json.dumps([config, hashes], sort_keys=True, default=str)
    return hashlib.sha256(described.encode()).hexdigest()
