"""From the text of a JSON, JSONL or CSV file to records that know where they stand."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from lightning_blue.support.errors import InputError
from lightning_blue.support.text import no_text

LIST_COLUMNS = frozenset(
    {
        "paraphrases",
        "neighborhood_prompts",
        "neighbourhood_prompts",
        "generation_prompts",
        "reference_texts",
        "answers",
        "aliases",
        "portability",
    }
)
SEPARATOR = " | "
EXACT_COLUMNS = frozenset({"target_prefix"})
PADDING = " \t"  # around a cell it is the table's, not the text's
BOM = "\ufeff"  # begins a file, and a line where files were put behind each other
NOT_UTF8 = "save the file as UTF-8, without it"


class Located(NamedTuple):
    """A record and where it stands: ``facts.csv:12`` or ``facts.json record 3``, both from 1.

    ``flaw`` is the reason and the hint where a record could not be read; ``record`` is then None.
    """

    source: str
    record: Any
    flaw: tuple[str, str] | None = None


def parse_json(text: str, name: str) -> list[Located]:
    """Read a JSON file that holds one list of records. Raises InputError with line and column."""
    try:
        content = load_json(text)
    except json.JSONDecodeError as error:
        flaw, hint = _json_flaw(error)
        if error.msg == "Extra data":
            hint = "a file with one record a line has to be called .jsonl"
        raise InputError(flaw, where=f"{name}:{error.lineno}", hint=hint) from None
    except RecursionError as error:
        flaw, hint = _json_flaw(error)
        raise InputError(flaw, where=name, hint=hint) from None
    if not isinstance(content, list):
        raise InputError(
            "The JSON file does not hold a list of records",
            where=name,
            hint="put the records in square brackets: [{...}, {...}]",
        )
    return [Located(f"{name} record {i}", record) for i, record in enumerate(content, 1)]


def parse_jsonl(text: str, name: str) -> list[Located]:
    """Read one JSON record a line, skipping blank lines; a line that is none has a flaw.

    Raises InputError for a file that is JSON as a whole, over several lines.
    """
    located = [
        _jsonl_record(line, f"{name}:{number}")
        for number, line in enumerate(text.split("\n"), 1)
        if line.strip()
    ]
    if len(located) > 1 and any(item.flaw for item in located) and _is_json(text):
        raise InputError(
            "The whole file is JSON, not each of its lines",
            where=name,
            hint="call it .json, and put the records into one list: [{...}, {...}]",
        )
    return located


def _is_json(text: str) -> bool:
    try:
        load_json(text)
    except (json.JSONDecodeError, RecursionError):
        return False
    return True


def _jsonl_record(line: str, source: str) -> Located:
    """One line as a record, or why it is none."""
    flaw = no_text(line)
    if flaw is not None:
        return Located(source, None, (f"the line {flaw}", NOT_UTF8))
    try:
        return Located(source, load_json(line.lstrip(BOM)))
    except (json.JSONDecodeError, RecursionError) as error:
        return Located(source, None, _json_flaw(error))


def load_json(text: str) -> Any:
    """Read JSON; a whole number with more digits than Python converts becomes a float.

    Raises JSONDecodeError, and RecursionError for what is nested too deeply.
    """
    return json.loads(text, parse_int=_whole_number)


def _whole_number(digits: str) -> int | float:
    try:
        return int(digits)
    except ValueError:
        return float(digits)


def parse_csv(text: str, name: str) -> list[Located]:
    """Read comma-separated records with a header line.

    Empty cells count as not given; the columns in ``LIST_COLUMNS`` hold a JSON array or texts
    separated by " | ". Blanks and tabs around a cell are no part of it, but in ``EXACT_COLUMNS``:
    there only as many blanks are taken off as stand before the column's name in the header.
    A record's line is the one it begins on. A row that cannot be read has a flaw, and the line
    below it begins the next one: a quotation mark that is not closed takes no other row with it.

    Raises InputError for a header that cannot be read or names a column twice.
    """
    located: list[Located] = []
    header: list[str] | None = None
    for line, cells in _rows(list(io.StringIO(text, newline=""))):
        source = f"{name}:{line}"
        if isinstance(cells, csv.Error):
            flaw, hint = _csv_flaw(cells)
            if header is None:
                raise InputError(flaw, where=source, hint=hint)
            located.append(Located(source, None, (flaw, hint)))
        elif not any(cell.strip() for cell in cells):
            continue
        elif header is None:
            header = _header(cells, source)
        else:
            located.append(_csv_record(header, cells, source))
    return located


def _rows(lines: Sequence[str]) -> Iterator[tuple[int, list[str] | csv.Error]]:
    """Yield each row of a CSV with the line that it begins on, from 1; an error in its place."""
    first = 0
    padding: list[int] = []  # blanks before each name in the header, and so before each cell
    while first < len(lines):
        rest = (lines[i] for i in range(first, len(lines)))
        reader = csv.reader(rest, strict=True, skipinitialspace=True)
        start = first
        try:
            for cells in reader:
                stop = first + reader.line_num
                exact = _with_blanks(lines[start:stop], cells)
                if not padding and any(cells):
                    padding = [len(cell) - len(cell.lstrip(" ")) for cell in exact]
                yield start + 1, cells if exact is cells else _cut(exact, padding)
                start = stop
            return
        except csv.Error as error:
            yield start + 1, error
            first = start + 1


def _with_blanks(lines: Sequence[str], cells: list[str]) -> list[str]:
    """Give the cells of a row the blanks that they begin with; what is quoted has its own."""
    try:
        [exact] = csv.reader(lines, strict=True)
    except (csv.Error, ValueError):  # a blank before a quotation mark, which then opens no cell
        return cells
    same = [cell.lstrip(" ") for cell in exact] == [cell.lstrip(" ") for cell in cells]
    return exact if same else cells


def _cut(cells: Sequence[str], padding: Sequence[int]) -> list[str]:
    """Take the blanks off each cell with which a table sets its columns apart."""
    wide = [*padding, *[0] * len(cells)]
    return [
        cell[min(pad, len(cell) - len(cell.lstrip(" "))) :]
        for cell, pad in zip(cells, wide, strict=False)
    ]


def _csv_flaw(error: csv.Error) -> tuple[str, str]:
    """What is wrong with a row, and how to correct it."""
    hint = 'close every quotation mark, and write one inside a cell as ""'
    if "field limit" in str(error):
        hint = f"close every quotation mark; a cell holds at most {csv.field_size_limit():,} signs"
    return f"the CSV cannot be read: {error}", hint


def _header(cells: list[str], source: str) -> list[str]:
    """The column names; each may come once."""
    header = [cell.strip() for cell in cells]
    twice = sorted({column for column in header if header.count(column) > 1})
    if twice:
        raise InputError(
            f"The column {twice[0]!r} comes twice", where=source, hint="rename or remove one"
        )
    return header


def _csv_record(header: list[str], cells: list[str], source: str) -> Located:
    """One row as a record, without its empty cells."""
    if len(cells) > len(header):
        flaw = f"the row has {len(cells)} cells, the header {len(header)}"
        return Located(source, None, (flaw, "put cells that hold commas in quotation marks"))
    record: dict[str, Any] = {}
    for column, cell in zip(header, cells, strict=False):
        if not (cell if column in EXACT_COLUMNS else cell.strip()):
            continue
        bad = no_text(cell)
        if bad is not None:
            return Located(source, None, (f"the cell in {column!r} {bad}", NOT_UTF8))
        record[column] = cell if column in EXACT_COLUMNS else cell.strip(PADDING)
        if column in LIST_COLUMNS:
            try:
                record[column] = _list_cell(cell.strip())
            except (json.JSONDecodeError, RecursionError) as error:
                flaw = f"the list in {column!r} is not a JSON array ({_json_flaw(error)[0]})"
                return Located(source, None, (flaw, f"fix it, or separate texts by {SEPARATOR!r}"))
    return Located(source, record)


def _list_cell(cell: str) -> Any:
    """A cell that holds a list, as a JSON array or as texts separated by bars."""
    return load_json(cell) if cell.startswith("[") else cell.split(SEPARATOR)


def _json_flaw(error: json.JSONDecodeError | RecursionError) -> tuple[str, str]:
    """What is wrong with JSON, and how to correct it."""
    if isinstance(error, RecursionError):
        return "the JSON is nested too deeply", "flatten it"
    flaw = f"malformed JSON in column {error.colno}: {error.msg}"
    return flaw, "correct the JSON there (quotes, commas, brackets)"
