"""The folders of runs: one is claimed for each, found again to go on with, and says how it is."""

from __future__ import annotations

import json
from itertools import count
from pathlib import Path, PurePath
from typing import Any

from lightning_blue.support.checkpoints import FOLDER, checkpoints
from lightning_blue.support.errors import InputError
from lightning_blue.support.storage import writing

STATUS = "run.json"


def claim_folder(root: Path, name: str) -> Path:
    """Make the folder for a run, numbered from 2 where the name is taken.

    Raises:
        InputError: if it cannot be made.
    """
    for number in count(1):
        folder = root / (name if number == 1 else f"{name}-{number}")
        with writing(folder):
            try:
                folder.mkdir(parents=True)
            except FileExistsError:
                if not folder.exists() or folder.is_dir():
                    continue
                raise
        return folder
    raise AssertionError("count() has an end")


def run_to_resume(root: Path, name: str) -> Path | None:
    """Return the newest run of a name that edits.

    One that failed before its first checkpoint, or was killed before it was begun, counts only
    where there is no other: it may have been a slip of the command line.
    """
    runs = [(folder, read_status(folder)) for folder in _folders_of(root, name)]
    runs = [
        (folder, status)
        for folder, status in runs
        if status.get("command", "fit") == "fit" and status.get("name", name) == name
    ]
    solid = [
        (folder, status)
        for folder, status in runs
        if status.get("status", "failed") != "failed" or checkpoints(folder / FOLDER)
    ]
    candidates = [folder for folder, _ in solid or runs]
    return candidates[-1] if candidates else None


def _folders_of(root: Path, name: str) -> list[Path]:
    """Return the folders of all runs of a name, the newest last."""
    first = root / name
    numbered = [
        (int(folder.name.removeprefix(f"{first.name}-")), folder)
        for folder in first.parent.glob(f"{first.name}-*")
        if folder.name.removeprefix(f"{first.name}-").isdigit()
    ]
    return [*([first] if first.is_dir() else []), *(folder for _, folder in sorted(numbered))]


def read_status(folder: Path) -> dict[str, Any]:
    """Return what is known of a run: status, reason, W&B id; empty if nothing is."""
    try:
        content = json.loads((folder / STATUS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def inside(name: str) -> str:
    """Return the name of a run, unless it would lead out of the folder of all runs.

    Raises:
        InputError: if it would.
    """
    path = PurePath(name)
    if not path.parts or path.is_absolute() or ".." in path.parts:
        raise InputError(
            f"{name!r} is not the name of a run",
            where="run.name",
            hint="give a name without '..' that does not start at the root; --run.root says where",
        )
    return name
