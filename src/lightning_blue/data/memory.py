"""Facts that are in memory already: what a Python program passes where others name a file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lightning_blue.data.hub import to_record
from lightning_blue.data.parsing import Located
from lightning_blue.data.requests import EditRequest
from lightning_blue.support.errors import InputError

IN_MEMORY = "facts in memory"
TUPLE = ("subject", "prompt", "target_new", "target_true")  # the last may be left out

Facts = Iterable[Any]


def rows_of(facts: Facts) -> list[Any]:
    """Return the rows of facts in memory, as they are given.

    Args:
        facts: mappings, :class:`EditRequest`, tuples ``(subject, prompt, target_new)`` or with
            ``target_true`` behind; in a list or another iterable, a pandas DataFrame or a split of
            ``datasets``.

    Raises:
        InputError: for one mapping, bytes, and what cannot be gone through.
    """
    if isinstance(facts, Mapping):
        keys = ", ".join(map(str, list(facts)[:5]))
        raise InputError(
            f"one {type(facts).__name__} with {keys or 'nothing'}, where a list of facts belongs",
            where="EditDataModule(path)",
            hint="put a fact into a list, [{...}]; of a dictionary of splits, choose one",
        )
    if hasattr(facts, "to_dict") and hasattr(facts, "columns"):  # a DataFrame, of pandas' kind
        return [{str(k): _present(v) for k, v in row.items()} for row in facts.to_dict("records")]
    if isinstance(facts, bytes | bytearray) or not isinstance(facts, Iterable):
        raise InputError(
            f"a {type(facts).__name__} holds no facts",
            where="EditDataModule(path)",
            hint="give a path, the name of a dataset, a list of dictionaries with subject, prompt "
            "and target_new, a pandas DataFrame, or a split of datasets",
        )
    return list(facts)


def locate(rows: Iterable[Any]) -> list[Located]:
    """Return rows as records that know where they stand, from 1."""
    return [Located(f"{IN_MEMORY}, record {i}", _record(row)) for i, row in enumerate(rows, 1)]


def name_of(source: str | Path | list[Any]) -> str:
    """Name a source in messages and reports: as it was given, or the number of facts in memory."""
    if isinstance(source, list):
        return f"{len(source):,} {IN_MEMORY}"
    return str(source)


def _record(row: Any) -> Any:
    if isinstance(row, EditRequest):
        return to_record(row)
    texts = isinstance(row, tuple) and all(isinstance(part, str) for part in row)
    if texts and len(row) in (len(TUPLE) - 1, len(TUPLE)):
        return dict(zip(TUPLE, row, strict=False))
    return row


def _present(value: Any) -> Any:
    """Return None for a cell without a value, which pandas fills with NaN."""
    return None if isinstance(value, float) and value != value else value
