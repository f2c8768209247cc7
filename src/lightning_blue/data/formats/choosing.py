"""Which format a file has, told by its columns."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

from lightning_blue.data.formats.format import Format
from lightning_blue.data.formats.rows import FACTS, FORMATS
from lightning_blue.support.errors import InputError


def choose_format(name: str, first: Iterable[str], columns: Sequence[str], *, where: str) -> Format:
    """Return the format called ``name``, or for ``auto`` the one that the columns tell.

    ``first`` holds the columns of the first record, ``columns`` those of all records: the first
    record decides, and all together where it lacks something.

    Raises InputError for an unknown name and for columns that fit no format.
    """
    if name == "auto":
        for seen in (set(first), set(columns)):
            for row in FORMATS.values():
                if seen.issuperset(row.required_columns) and row.absent.isdisjoint(columns):
                    return row
        raise _unknown_columns(columns, FACTS, where)
    require_format(name)
    if not set(columns).issuperset(FORMATS[name].required_columns):
        raise _unknown_columns(columns, FORMATS[name], where)
    return FORMATS[name]


def require_format(name: str) -> None:
    """Raise InputError if there is no format of this name, and it is not ``auto``."""
    if name != "auto" and name not in FORMATS:
        raise InputError(
            f"There is no data format {name!r}",
            where="data.format",
            hint=f"choose one of: auto, {', '.join(FORMATS)}",
        )


def _unknown_columns(columns: Sequence[str], wanted: Format, where: str) -> InputError:
    """The error for a file whose columns do not fit the format ``wanted``."""
    has = ", ".join(columns) or "none"
    hints = [
        f"rename {column!r} to {near[0]!r}"
        for column in columns
        if column not in wanted.columns()
        and (near := difflib.get_close_matches(column, wanted.required_columns, n=1, cutoff=0.7))
    ]
    if any(sign in column for column in columns for sign in ";\t"):
        hints.append("separate the columns by commas")
    hints = hints or [f"formats known: {', '.join(FORMATS)}; --data.format forces one"]
    return InputError(
        f"The data has columns {has}; needs {', '.join(wanted.required_columns)}",
        where=where,
        hint="; ".join(hints),
    )


def columns_not_used(columns: Iterable[str], row: Format) -> list[str]:
    """Describe the columns that the format does not read, with the nearest one that it does."""
    notes = []
    for column in columns:
        if column not in row.columns():
            near = difflib.get_close_matches(column, sorted(row.columns()), n=1, cutoff=0.75)
            notes.append(f"{column!r}" + (f" (did you mean {near[0]!r}?)" if near else ""))
    return notes
