"""What of a run's configuration counts when it is compared with other runs.

Runs that agree in all of it have computed and measured the same. Runs that agree in all but their
seed and the order of their edits are replicates, and are averaged; others have rows of their own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

# Keys that change no number of a finished run: where it is kept, how it is shown, what it shares.
ELSEWHERE = re.compile(
    r"run/(?!export$).*|base|for_model|ckpt_path"
    r"|model/covariance/(cache|trust|report_change)|model/cache_targets|measure/unedited_cache"
    r"|measure/judge/(timeout|retries|concurrency|replies)"
    r"|trainer/(logger|default_root_dir|enable_\w+|profiler|log_every_n_steps|max_time"
    r"|model_registry)(/.*)?"
)
# Keys that are told by what the run has recorded instead: the model by a hash of its weights, the
# data by the requests that were edited, the size of batches by the table, the protocol as resolved.
RECORDED = re.compile(
    r"model/name_or_path|measure/protocols"
    r"|data/(path|split|batch_size|edits|offset|on_unusable|protocol)"
)
REPLICATES = ("seed_everything", "data/shuffle")
# Files and folders. Another machine keeps them elsewhere: they count as the same by their names.
SOURCES = (
    "data/controls",
    "measure/text",
    "measure/ability/data",
    "measure/ability/tasks",
    "model/covariance/corpus",
    "model/covariance/path",
)
JUDGE, GUARD = "measure/judge/", "guard/"
# What the numbers of the unedited model depend on.
OF_UNEDITED = re.compile(r"measure/.*|data/.*|trainer/.*|model/(dtype|revision)")


def compared(config: Mapping[str, Any], summary: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a run computed and measured, but for seed, order, model and requests.

    What is not measured is None, whether it was turned off or the version did not have it.

    Args:
        config: under flat keys.
        summary: the numbers of the run.
    """
    found = {
        key: _named(value) if key in SOURCES else value
        for key, value in config.items()
        if not (ELSEWHERE.fullmatch(key) or RECORDED.fullmatch(key) or key in REPLICATES)
    }
    for key in found:
        off = key.startswith("measure/") and (found[key] is False or found[key] == [])
        if off or (key.startswith(JUDGE) and not config.get(f"{JUDGE}url")):
            found[key] = None
        if key.startswith(GUARD) and config.get(f"{GUARD}action") != "rollback":
            found[key] = None  # another action ends the run, or changes nothing
    found["measure/protocols"] = summary.get("protocol/added") or None
    return found


def varied(settings: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return the keys in which runs differ, in order, with short names; missing is as good as None.

    A name is the end of its key, or the whole of it where another key ends alike.

    >>> varied([{"update/ridge": 10, "model/seed": 0}, {"update/ridge": 20, "measure/seed": 0}])
    {'update/ridge': 'ridge', 'model/seed': 'model.seed', 'measure/seed': 'measure.seed'}
    """
    keys = dict.fromkeys(key for each in settings for key in each)
    ends = [key.rpartition("/")[2] for key in keys]
    return {
        key: end if ends.count(end) == 1 else key.replace("/", ".")
        for key, end in zip(keys, ends, strict=True)
        if any(each.get(key) != settings[0].get(key) for each in settings)
    }


def spelled(settings: Mapping[str, Any], names: Mapping[str, str]) -> list[str]:
    """Spell what a run has for the keys that vary, by their names."""
    return [f"{name}={settings.get(key)}" for key, name in names.items()]


def _named(source: Any) -> Any:
    """Return the names of files without their folders."""
    if isinstance(source, list):
        return [_named(each) for each in source]
    return PurePath(source).name if isinstance(source, str) else source
