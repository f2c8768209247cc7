"""What a run is in a table: model, data, method, plan, seed, order, read off its configuration."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import yaml

from lightning_blue.cli.run_files import PACKAGED
from lightning_blue.reporting.files import flat

# What makes a method: a row of conf/methods sets some of these.
METHOD_KEYS = (
    "update/solver",
    "update/past_keys",
    "update/rect_keep",
    "update/post_edit_transform",
    "model/target/site",
    "model/target/early_stop",
    "model/target/keep_norm",
    "model/target/merge_subjects",
)
DEFAULTS = {
    "update/solver": "least_squares",
    "update/past_keys": True,
    "model/target/site": "auto",
    "model/target/keep_norm": False,
    "model/target/merge_subjects": False,
}
TITLES = {  # in the order of the paper's tables
    "memit": "MEMIT",
    "prune": "PRUNE",
    "rect": "RECT",
    "alphaedit": "AlphaEdit",
    "pmet": "PMET",
    "locft_bf": "LocFT-BF",
    "in_context": "in-context",
}
BLUE = "boundary"  # the plan
CLASSIC = {"PMET": "square_root"}  # of every other method: even
PLANS = ("even", "square_root", BLUE, "computed", "first", "last", "none")  # order in tables
UNEDITED = "unedited"


class Replicate(NamedTuple):
    """What may differ between runs of one row: the seed, and the seed of the edits' order."""

    seed: int | None
    order: int | None  # None: that of the file


def replicated(rows: Iterable[Iterable[Replicate]]) -> str:
    """Say in what the runs of a row differ, in any of the rows: seeds, orders, or both.

    >>> replicated([[Replicate(0, 1), Replicate(0, 2)], [Replicate(0, 1)]])
    'orders'
    """
    groups = [set(row) for row in rows]
    seeds = any(len({each.seed for each in group}) > 1 for group in groups)
    orders = any(len({each.order for each in group}) > 1 for group in groups)
    return "seeds and orders" if seeds and orders else "orders" if orders else "seeds"


class Labels(NamedTuple):
    """What a run is."""

    model: str
    data: str
    method: str
    plan: str
    replicate: Replicate


def labels(config: Mapping[str, Any]) -> Labels:
    """Read the labels off a resolved configuration under flat keys."""
    return Labels(
        model=PurePath(str(config.get("model/name_or_path"))).name,
        data=PurePath(str(config.get("data/path"))).stem,
        method=method_of(config),
        plan=str(config.get("update/plan")),
        replicate=Replicate(config.get("seed_everything"), config.get("data/shuffle")),
    )


def method_of(
    config: Mapping[str, Any], rows: Mapping[str, Mapping[str, Any]] | None = None
) -> str:
    """Name the row of ``conf/methods`` that a run follows, and in what it departs from it.

    A number counts as equal to any other: it is a setting of the method (AlphaEdit's ridge with
    BLUE differs by model). Of rows that fit equally well, the one that says more counts.

    Args:
        config: under flat keys.
        rows: the rows by name; by default those of ``conf/methods``.
    """
    rows = method_rows() if rows is None else rows
    if config.get("model/target/site") in ("block", "ffn"):  # what auto finds, by itself no method
        config = {**config, "model/target/site": "auto"}
    best, departures = "", [f"{key}={config.get(key)}" for key in METHOD_KEYS]
    said = -1
    for name, row in rows.items():
        wanted = {**DEFAULTS, **row}
        others = [
            f"{key.rpartition('/')[2]}={config.get(key)}"
            for key in METHOD_KEYS
            if not _same(wanted.get(key), config.get(key, DEFAULTS.get(key)))
        ]
        if (len(others), -len(row)) < (len(departures), -said) or not best:
            best, departures, said = name, others, len(row)
    return ", ".join([TITLES.get(best, best), *departures])


def classic_plan(method: str) -> str:
    """Return the plan of a method without BLUE."""
    return CLASSIC.get(method.partition(",")[0], "even")


def method_place(method: str) -> tuple[int, str]:
    """Sort methods as the paper does, others behind by name."""
    order = list(TITLES.values())
    first = method.partition(",")[0]
    return order.index(first) if first in order else len(order), method


def plan_place(plan: str) -> tuple[int, str]:
    """Sort plans: the classic ones, BLUE's, the baselines, others by name."""
    first = plan.partition(",")[0]
    return PLANS.index(first) if first in PLANS else len(PLANS), plan


def plan_title(plan: str) -> str:
    """Return a plan as tables show it."""
    first, comma, rest = plan.partition(",")
    return f"{first} (BLUE){comma}{rest}" if first == BLUE else plan


@cache
def method_rows() -> dict[str, dict[str, Any]]:
    """Read the rows of ``conf/methods``: here, in the repository, or in the installed package."""
    places: Sequence[Path] = (Path("conf"), Path(__file__).parents[3] / "conf", PACKAGED)
    folder = next((place for place in places if (place / "methods").is_dir()), None)
    if folder is None:
        return {}
    rows = {}
    for path in sorted((folder / "methods").glob("*.yaml")):
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        rows[path.stem] = flat(content if isinstance(content, dict) else {})
    return rows


def _same(wanted: Any, found: Any) -> bool:
    numbers = [
        isinstance(value, int | float) and not isinstance(value, bool) for value in (wanted, found)
    ]
    return all(numbers) or wanted == found
