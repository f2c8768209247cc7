"""Whether a run that is resumed goes on measuring as it was asked to at its start."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_blue.support.errors import InputError

NAMED = 5  # of many files or tasks

Asked = Mapping[str, Any]  # by setting a plain value; of texts, tasks and files hashes by name


def require_same(was: Asked, now: Asked) -> None:
    """Refuse to measure the rest of a run in another way than its beginning.

    Args:
        was: how the run was started; what it does not measure has no key.
        now: how it is to go on.

    Raises:
        InputError: naming each setting that differs, and what it was.
    """
    different = [key for key in was if key in now and was[key] != now[key]]
    # what belongs to something that only one of them measures follows from that, and is not said
    alone = [key for key, value in {**was, **now}.items() if isinstance(value, Mapping)]
    different += [key for key in alone if (key in was) != (key in now)]
    if not different:
        return
    told = "; ".join(_said(key, was.get(key), now.get(key)) for key in different)
    raise InputError(
        f"the run was started with {told}; before and after would not be measured alike",
        where=", ".join(different),
        hint="resume it with what it was started with, or start a new run",
    )


def _said(key: str, was: Any, now: Any) -> str:
    """Say what a setting was, and what it is now; hashes tell nobody anything."""
    if not isinstance(was, Mapping) and not isinstance(now, Mapping):
        return f"{key} {was}, not {now}"
    if was is None or now is None:
        return f"no {key}" if was is None else f"{key}, which is gone"
    if was.keys() == now.keys():
        return f"other content of {key}"
    return f"{key} {_names(was)}, not {_names(now)}"


def _names(hashes: Mapping[str, str]) -> str:
    names = sorted(hashes)
    return ", ".join(names[:NAMED]) + (" and others" if len(names) > NAMED else "")
