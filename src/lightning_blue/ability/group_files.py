"""Which tasks of lm-evaluation-harness a YAML file puts together to a group."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

DEFINES = {"dataset_path", "custom_dataset", "class"}  # what a task has that is no mere name


def read_group(path: Path) -> dict[str, Any] | None:
    """Return what a file says of a group; None of a file that has none, or cannot be read.

    Of one that cannot be read, whoever loads it says what is wrong.
    """
    try:
        config = _read(path, set())
    except (OSError, ValueError, yaml.YAMLError):
        return None
    return config if "group" in config else None


def tasks_named(group: Mapping[str, Any]) -> list[str]:
    """Return the tasks, groups and tags that a group refers to by name, inner groups with them."""
    return list(_named(group))


class _Plain(yaml.SafeLoader):
    """Reads ``!function`` as nothing: no code is run."""


_Plain.add_multi_constructor("!", lambda loader, suffix, node: None)


def _read(path: Path, seen: set[Path]) -> dict[str, Any]:
    """Read a file and, below it, those that it includes."""
    path = path.expanduser().resolve()
    if path in seen:
        return {}
    with path.open(encoding="utf-8") as file:
        config = yaml.load(file, _Plain)
    if not isinstance(config, dict):
        return {}
    included = config.pop("include", [])
    merged: dict[str, Any] = {}
    for other in included if isinstance(included, list) else [included]:
        merged |= _read(path.parent / str(other), seen | {path})
    return merged | config


def _named(group: Mapping[str, Any]) -> Iterator[str]:
    """Yield the names in the list of a group, and in those of groups that it defines itself."""
    members = group.get("task")
    for each in members if isinstance(members, list) else []:
        if isinstance(each, str):
            yield each
        elif isinstance(each, Mapping) and isinstance(each.get("task"), list):
            yield from _named(each)
        elif isinstance(each, Mapping) and not DEFINES & each.keys():
            yield str(each.get("task", each.get("group")))
