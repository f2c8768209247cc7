"""The fields of a record at their places: texts, lists of texts, and what is wrong with them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_blue.data.formats.format import Format
from lightning_blue.support.text import no_text, shown


class Unusable(Exception):
    """One record that cannot become a request; becomes a :class:`Rejected`."""

    def __init__(self, kind: str, reason: str, hint: str) -> None:
        super().__init__(reason)
        self.kind, self.reason, self.hint = kind, reason, hint


def case_id(record: Mapping[str, Any], row: Format, index: int) -> str:
    """The record's own case id, or its number."""
    return name_at(record, row.paths["case_id"]) or str(index)


def name_at(record: Mapping[str, Any], path: str) -> str:
    """What a record calls something, by a text or a number; empty where it does not."""
    value = at(record, path)
    if value is None:
        return ""
    if isinstance(value, float) and value.is_integer():  # as pandas writes where one is missing
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise wrong_type(path, value, "a number or a string")
    try:
        text = str(value)
    except ValueError:  # a number of thousands of digits
        raise wrong_type(path, value, "a shorter number") from None
    require_text(text, path)
    return text.strip()


def at(record: Any, path: str) -> Any:
    """The value at a dotted path, or None where the path ends early."""
    for part in path.split("."):
        if isinstance(record, Mapping):
            record = record.get(part)
        elif isinstance(record, list) and part.isdigit():
            record = record[int(part)] if int(part) < len(record) else None
        elif record is not None:
            wanted = "a list of strings" if part.isdigit() else f"an object with {part!r}"
            raise wrong_type(path, record, wanted)
    return record


def spread(record: Any, path: str) -> list[Any]:
    """Everything at a path with ``*`` and ``|``, in order; what is absent or null gives nothing."""
    found = [record]
    for part in path.split("."):
        found = [inner for each in found for inner in _step(each, part, path)]
    return [each for each in found if each is not None]


def _step(value: Any, part: str, path: str) -> list[Any]:
    """What a value holds at one part of a path."""
    if value is None:
        return []
    if part == "*":
        if isinstance(value, Mapping):
            return list(value.values())
        if isinstance(value, list | tuple):
            return list(value)
        raise wrong_type(path, value, "a list, or an object of lists")
    if not isinstance(value, Mapping):
        raise wrong_type(path, value, f"an object with {part!r}")
    return [value[name] for name in part.split("|") if value.get(name) is not None]


def names_in(value: Any, path: str) -> list[str]:
    """The texts in a value that is one or a list of such values; blank ones are none."""
    if isinstance(value, list | tuple):
        return [name for item in value for name in names_in(item, path)]
    name = "" if value is None else string(value, path)
    return [name] if name else []


def text(record: Mapping[str, Any], row: Format, field: str) -> str | None:
    """An optional text without the white space around it; blank counts as not given.

    In formats whose answers are lists of names it is the first name.
    """
    if field in row.needed:
        return needed_text(record, row, field)
    path = row.paths.get(field)
    value = at(record, path) if path else None
    if value is None or path is None:
        return None
    if row.probe.listed:
        return next(iter(names_in(value, path)), None)
    return string(value, path) or None


def needed_text(record: Mapping[str, Any], row: Format, field: str, *, exact: bool = False) -> str:
    """A text that has to be there and not blank."""
    path = row.paths[field]
    value = at(record, path)
    if value is None and field in row.otherwise:
        instead = at(record, row.otherwise[field])
        path, value = (path, None) if instead is None else (row.otherwise[field], instead)
    if value is None:
        raise Unusable("missing field", f"the field {path!r} is missing", f"add {path!r}")
    text = string(value, path)
    if not text:
        kind = "empty target" if field == "target_new" else "empty field"
        raise Unusable(kind, f"the field {path!r} is empty", f"write something in {path!r}")
    return str(value) if exact else text


def prefix(record: Mapping[str, Any], row: Format) -> str | None:
    """What the record says to stand between its prompts and objects, to the letter."""
    path = row.paths.get("target_prefix")
    value = None if path is None else at(record, path)
    if value is not None and not isinstance(value, str):
        raise wrong_type(str(path), value, "a string")
    return value


def texts(
    record: Mapping[str, Any], row: Format, field: str, *, exact: bool = False
) -> tuple[str, ...]:
    """An optional list of texts; a single text counts as a list of one."""
    path = row.paths.get(field)
    found = [] if path is None else items(record, path)
    return tuple(filled(item, str(path), exact=exact) for item in found)


def items(record: Mapping[str, Any], path: str) -> list[Any]:
    """The list at a path; nothing and blank give an empty one, a single value a list of one."""
    if "*" in path or "|" in path:
        found = [(each if isinstance(each, list) else [each]) for each in spread(record, path)]
        return [item for some in found for item in some]
    value = at(record, path)
    if value is None or (isinstance(value, str) and not value.strip()):
        return []
    if isinstance(value, str | Mapping):
        return [value]
    if not isinstance(value, list | tuple):
        raise wrong_type(path, value, "a list of strings")
    return list(value)


def filled(value: Any, path: str, *, exact: bool = False) -> str:
    """One item of a list: a text that is not blank."""
    text = string(value, path)
    if not text:
        raise Unusable("empty field", f"an item of {path!r} is empty", "remove the empty item")
    return str(value) if exact else text


def string(value: Any, path: str) -> str:
    """A string without the white space around it."""
    if not isinstance(value, str):
        raise wrong_type(path, value, "a string")
    require_text(value, path)
    return value.strip()


def is_text(item: Any) -> bool:
    """Whether an item of a list is a text that could be written and is not blank."""
    return isinstance(item, str) and bool(item.strip()) and no_text(item) is None


def require_text(value: str, path: str) -> None:
    """Raise Unusable for a string that can be neither written nor tokenised."""
    flaw = no_text(value)
    if flaw is not None:
        raise Unusable("not text", f"the field {path!r} {flaw}", "write it without that")


def wrong_type(path: str, value: Any, wanted: str) -> Unusable:
    """The complaint about a value of another type."""
    return Unusable(
        "wrong type",
        f"the field {path!r} is {type_name(value)} ({shown(value):.40}), not {wanted}",
        f"write {path!r} as {wanted}",
    )


def type_name(value: Any) -> str:
    """What JSON calls the type of a value."""
    names = {bool: "a truth value", int: "a number", float: "a number", str: "a string"}
    names |= {list: "a list", tuple: "a list", dict: "an object", type(None): "null"}
    return names.get(type(value), type(value).__name__)
