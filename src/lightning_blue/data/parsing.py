"""From the text of a JSON, JSONL or CSV file to records that know where they stand."""

from __future__ import annotations

import csv
import io
import json
from typing import Any, NamedTuple

from lightning_blue.support.errors import InputError

LIST_COLUMNS = frozenset(
    {
        "paraphrases",
        "neighborhood_prompts",
        "neighbourhood_prompts",
        "generation_prompts",
        "reference_texts",
        "answers",
    }
)
SEPARATOR = " | "
EXACT_COLUMNS = frozenset({"target_prefix"})
PADDING = " \t"  # around a cell it is the table's, not the text's


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
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise _malformed(error, name, error.lineno, hint_lines=True) from None
    except RecursionError:
        raise InputError("The JSON is nested too deeply", where=name, hint="flatten it") from None
    if not isinstance(content, list):
        raise InputError(
            "The JSON file does not hold a list of records",
            where=name,
            hint="put the records in square brackets: [{...}, {...}]",
        )
    return [Located(f"{name} record {i}", record) for i, record in enumerate(content, 1)]


def parse_jsonl(text: str, name: str) -> list[Located]:
    """Read one JSON record a line, skipping blank lines. Raises InputError with line and column."""
    located = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            located.append(Located(f"{name}:{number}", json.loads(line)))
        except json.JSONDecodeError as error:
            raise _malformed(error, name, number) from None
        except RecursionError:
            raise InputError(
                "The JSON is nested too deeply", where=f"{name}:{number}", hint="flatten it"
            ) from None
    return located


def parse_csv(text: str, name: str) -> list[Located]:
    """Read comma-separated records with a header line.

    Empty cells count as not given; the columns in ``LIST_COLUMNS`` hold a JSON array or texts
    separated by " | ". Blanks and tabs around a cell are no part of it, but in ``EXACT_COLUMNS``.
    A record's line is the one it begins on.
    Raises InputError for broken quoting and for a column that comes twice.
    """
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, skipinitialspace=True)
    located: list[Located] = []
    header: list[str] | None = None
    line = 1
    try:
        for cells in reader:
            if not any(cell.strip() for cell in cells):
                pass
            elif header is None:
                header = _header(cells, name)
            else:
                located.append(_csv_record(header, cells, f"{name}:{line}"))
            line = reader.line_num + 1
    except csv.Error as error:
        raise InputError(
            f"The CSV cannot be read: {error}",
            where=f"{name}:{line}",
            hint='close every quotation mark, and write one inside a cell as ""',
        ) from None
    return located


def _header(cells: list[str], name: str) -> list[str]:
    """The column names; each may come once."""
    header = [cell.strip() for cell in cells]
    twice = sorted({column for column in header if header.count(column) > 1})
    if twice:
        raise InputError(
            f"The column {twice[0]!r} comes twice", where=f"{name}:1", hint="rename or remove one"
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
        record[column] = cell if column in EXACT_COLUMNS else cell.strip(PADDING)
        if column in LIST_COLUMNS:
            try:
                record[column] = _list_cell(cell.strip())
            except json.JSONDecodeError as error:
                flaw = f"the list in {column!r} is not a JSON array ({error.msg})"
                return Located(source, None, (flaw, f"fix it, or separate texts by {SEPARATOR!r}"))
    return Located(source, record)


def _list_cell(cell: str) -> Any:
    """A cell that holds a list, as a JSON array or as texts separated by bars."""
    return json.loads(cell) if cell.startswith("[") else cell.split(SEPARATOR)


def _malformed(
    error: json.JSONDecodeError, name: str, line: int, *, hint_lines: bool = False
) -> InputError:
    """The error for JSON that cannot be parsed."""
    hint = "correct the JSON there (quotes, commas, brackets)"
    if hint_lines and error.msg == "Extra data":
        hint = "a file with one record a line has to be called .jsonl"
    return InputError(
        f"Malformed JSON: {error.msg}", where=f"{name}:{line}, column {error.colno}", hint=hint
    )
