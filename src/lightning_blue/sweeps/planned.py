"""Which run a combination of a sweep is: its resolved configuration, its identity, its folder."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from lightning_blue.cli.parser import EditCLI
from lightning_blue.reporting.files import flat
from lightning_blue.reporting.run_folders import read_status
from lightning_blue.support.checkpoints import FOLDER, checkpoints
from lightning_blue.support.errors import InputError
from lightning_blue.sweeps.sweep_file import Sweep, Values, short

# Keys that say where a run is kept and how it is shown, not what it is.
ELSEWHERE = re.compile(
    r"run/.*|base|ckpt_path|model/covariance/cache|model/cache_targets|measure/unedited_cache"
    r"|trainer/(logger|default_root_dir|enable_progress_bar|enable_model_summary)(/.*)?"
)
SOURCES = (
    "model/name_or_path",
    "data/path",
    "data/controls",
    "measure/text",
    "measure/ability/data",
    "model/covariance/corpus",
    "model/covariance/path",
)
BUNDLED = resources.files("lightning_blue") / "assets" / "almanac"
SEED = "PL_GLOBAL_SEED"
DECIDED = ("update/layers",)  # what a run writes into its configuration where nothing was asked for
SHARE_TARGETS = "--model.cache_targets=true"  # unless the sweep, or its user, says otherwise
DIGITS = 10  # of the identity, in a folder's name
LONGEST = 100  # characters of a folder's name before them
_SAMPLES, _SAMPLE = 64, 65536  # blocks of a large file that are read, and their bytes


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
        if status.get("status") in ("finished", "ended early") and self._is_in(self.folder):
            return str(status["status"])
        return "stopped" if checkpoints(self.folder / FOLDER) else "new"

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
    for values in sweep.combinations():
        args = [*sweep.args(values), *more]
        config = content(resolved(args))
        identity = identity_of(config)
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
    return {key: value for key, value in flat(config).items() if not ELSEWHERE.fullmatch(key)}


def identity_of(config: Mapping[str, Any]) -> str:
    """Hash what a run is, and the local files that it names; hexadecimal."""
    files = {key: _fingerprint(str(config.get(key))) for key in SOURCES}
    described = json.dumps([config, files], sort_keys=True, default=str)
    return hashlib.sha256(described.encode()).hexdigest()


@cache
def _fingerprint(source: str) -> str | None:
    """Hash a file or the files of a folder, large ones by samples; None for what is no path."""
    path = Path(str(BUNDLED)) if source.startswith(BUNDLED.name) else Path(source)
    if not path.exists():
        return None
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            digest.update(f"{file.name} {file.stat().st_size}".encode())
            _read_samples(file, digest)
    return digest.hexdigest()


def _read_samples(path: Path, digest: Any) -> None:
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= _SAMPLES * _SAMPLE:
            digest.update(file.read())
            return
        for sample in range(_SAMPLES):
            file.seek((size - _SAMPLE) * sample // (_SAMPLES - 1))
            digest.update(file.read(_SAMPLE))
