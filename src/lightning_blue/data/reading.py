"""Open a data source of any kind and read the edit requests in it."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from types import MappingProxyType

from lightning_blue.data.formats import (
    FACTS,
    ZSRE,
    Format,
    choose_format,
    columns_not_used,
    parse_records,
    unanswered,
)
from lightning_blue.data.hub import ALMANAC, load_rows
from lightning_blue.data.memory import Facts, locate, name_of, rows_of
from lightning_blue.data.parsing import Located, parse_csv, parse_json, parse_jsonl
from lightning_blue.data.requests import EditRequest, Rejected
from lightning_blue.support.errors import InputError
from lightning_blue.support.hub import looks_local, missing_path

log = logging.getLogger(__name__)

PARSERS = MappingProxyType({".json": parse_json, ".jsonl": parse_jsonl, ".csv": parse_csv})
SUFFIXES = (*PARSERS, ".parquet")


def read_requests(
    path: str | Path | Facts, format: str = "auto", split: str = "train"
) -> tuple[list[EditRequest], list[Rejected]]:
    """Read all requests of a data source, in order, and the records that are not usable.

    ``path``: a .json, .jsonl, .csv or .parquet file, the folder of a saved dataset, the name of a
    dataset on the Hugging Face hub, ``almanac`` for the facts that ship with the package, or facts
    in memory, see :func:`lightning_blue.data.memory.rows_of`.
    ``format``: ``counterfact`` (ROME's nested form), ``counterfact-flat``, ``zsre`` (MEND's form),
    ``zsre-alt`` (the same, edited to ``alt``), ``facts`` (people's own), another of ``FORMATS``, or
    ``auto`` to tell by the columns. ``split`` matters for datasets.

    A record may make several requests. Every record ends up in one of the two lists. Raises
    InputError where nothing can be read: no such source, empty, malformed, not text, or columns
    that fit no format.
    """
    if isinstance(path, str | Path):
        require_source(path)
        name, located = read_records(str(path), split)
    else:
        rows = rows_of(path)
        name, located = name_of(rows), locate(rows)
    if not located:
        raise _empty(name)
    if all(item.flaw for item in located):
        return _sort_out(located, FACTS)  # no record tells the format, and none needs it
    mappings = [item.record for item in located if isinstance(item.record, Mapping)]
    columns = list(dict.fromkeys(key for record in mappings for key in record))
    row = choose_format(format, mappings[0] if mappings else (), columns, where=name)
    _warn_of_columns(columns, row, name)
    if row is ZSRE and "alt" in columns:
        log.info(
            "%s: the answer to edit to is the first of 'answers', or 'alt' where there is none; "
            "--data.format=zsre-alt takes 'alt'",
            name,
        )
    left_out = sum(unanswered(record, row) for record in mappings)
    if left_out:
        log.info("%s: %d prompts without an answer are left out", name, left_out)
    return _sort_out(located, row)


def require_source(path: str | Path, key: str = "data.path") -> None:
    """Raise InputError if no source is named: an empty path would be the current folder."""
    if not str(path).strip():
        raise InputError(
            "no data is named",
            where=f"{key} = {str(path)!r}",
            hint="give a file, a folder, the name of a dataset on the hub, or `almanac`",
        )


def _sort_out(located: Sequence[Located], row: Format) -> tuple[list[EditRequest], list[Rejected]]:
    """Parse each record into one of two lists."""
    requests: list[EditRequest] = []
    rejected: list[Rejected] = []
    for index, (source, record, flaw) in enumerate(located):
        if flaw is not None:
            rejected.append(Rejected(source, str(index), "malformed row", *flaw))
            continue
        for parsed in parse_records(record, row, source=source, index=index):
            if isinstance(parsed, EditRequest):
                requests.append(parsed)
            else:
                rejected.append(parsed)
    return requests, rejected


def _warn_of_columns(columns: Sequence[str], row: Format, name: str) -> None:
    """Say which columns have no meaning here, so that a misspelt one is not lost unnoticed."""
    notes = columns_not_used(columns, row)
    if notes:
        log.warning("%s: columns not used: %s", name, ", ".join(notes))


def read_records(path: str, split: str = "train") -> tuple[str, list[Located]]:
    """Open a data source; return its short name and its records. Raises InputError."""
    if path == ALMANAC:
        bundled = resources.files("lightning_blue") / "assets" / "almanac" / "facts.jsonl"
        if not bundled.is_file():
            raise InputError(
                "The facts that ship with the package are missing",
                where=str(bundled),
                hint="install the package again, or give a file of your own (--data.path)",
            )
        return ALMANAC, parse_jsonl(_decode(bundled.read_bytes(), ALMANAC), ALMANAC)
    place = Path(path).expanduser()
    if place.is_dir() or (place.is_file() and place.suffix.lower() == ".parquet"):
        return place.name, load_rows(str(place), split)
    if place.is_file():
        return place.name, _read_file(place)
    if looks_local(path) or place.suffix.lower() in SUFFIXES:
        raise missing_path(path, where=str(place))
    return path, load_rows(path, split)


def _read_file(place: Path) -> list[Located]:
    """Parse a text file by its ending."""
    parser = PARSERS.get(place.suffix.lower())
    if parser is None:
        raise InputError(
            f"Files that end with {place.suffix or 'nothing'!r} cannot be read",
            where=str(place),
            hint=f"give a file that ends with {', '.join(SUFFIXES)}",
        )
    try:
        content = place.read_bytes()
    except OSError as error:
        raise InputError(
            f"The file cannot be opened: {error.strerror}",
            where=str(place),
            hint="check its permissions",
        ) from None
    text = _decode(content, place.name, by_line=parser is not parse_json)
    if not text.strip():
        raise _empty(str(place))
    return parser(text, place.name)


def _decode(content: bytes, name: str, by_line: bool = False) -> str:
    """UTF-8 text, with or without a byte order mark.

    With ``by_line`` bytes that are none stay in the text as surrogates, for the parser to find
    the records they belong to. Raises InputError, with the line where it is one.
    """
    encoding = json.detect_encoding(content)
    if not encoding.startswith("utf-8"):
        raise InputError(f"The file is {encoding.upper()}", where=name, hint="save it as UTF-8")
    try:
        return content.decode("utf-8-sig", errors="surrogateescape" if by_line else "strict")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"The file is not UTF-8 text: byte 0x{content[error.start]:02x} cannot be decoded",
            where=f"{name}:{line}",
            hint="save it as UTF-8",
        ) from None


def _empty(name: str) -> InputError:
    """The error for a source without records."""
    return InputError(
        "There are no records",
        where=name,
        hint="give at least one record with subject, prompt and target_new",
    )
