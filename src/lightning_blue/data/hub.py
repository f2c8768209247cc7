"""Hugging Face ``datasets``: edit requests out of them, and into them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_blue.data.parsing import Located
from lightning_blue.data.requests import EditRequest
from lightning_blue.support.errors import InputError
from lightning_blue.support.hub import asked, no_source

if TYPE_CHECKING:
    from datasets import Dataset

log = logging.getLogger(__name__)

ALMANAC = "almanac"  # the facts that ship with the package


def load_rows(path: str, split: str) -> list[Located]:
    """Rows of a dataset: a name on the hub, a saved dataset's folder, or a Parquet file.

    No code that a dataset brings is run. Raises InputError where it cannot be had.
    """
    import datasets  # noqa: F401  (before the hub is asked, see `asked`)

    with asked("dataset", path) as reason:
        return _load_located(path, split, reason)


def _load_located(path: str, split: str, reason: str | None) -> list[Located]:
    """Read the rows; ``reason`` is why the hub has no such dataset, where it has been asked."""
    try:
        rows = list(_load(path, split))  # inside: a damaged file may open, and fail at a row
    except Exception as error:  # the hub's client and the readers raise dozens of types
        log.debug("loading %s failed", path, exc_info=True)
        if reason is not None:
            what, hint = no_source("data file or dataset", path, reason, [ALMANAC])
            raise InputError(what, where=f"data.path = {path}", hint=hint) from error
        first_line = (str(error).splitlines() or [""])[0]
        raise InputError(
            f"The dataset cannot be loaded: {type(error).__name__}: {first_line}",
            where=f"{path}, split {split!r}",
            hint="give a file that exists (.json, .jsonl, .csv, .parquet), a folder, or a dataset "
            "on the hub and a split that it has (--data.split)",
        ) from error
    name = Path(path).name if Path(path).exists() else path
    return [Located(f"{name} record {i}", row) for i, row in enumerate(rows, 1)]


def _load(path: str, split: str) -> Dataset:
    """Open the dataset; raises whatever ``datasets`` raises."""
    import datasets

    folder = Path(path)
    if folder.is_file():
        return datasets.load_dataset("parquet", data_files=path, split="train")
    if (folder / "dataset_dict.json").is_file():
        return datasets.load_from_disk(path)[split]
    if (folder / "state.json").is_file():
        return datasets.load_from_disk(path)
    return datasets.load_dataset(path, split=split)


def to_dataset(requests: Sequence[EditRequest]) -> Dataset:
    """Requests as a dataset in the format ``facts``; reading it back gives the same requests.

    ``source`` is left out: it is where a request was read, and not part of it. So are ``premises``,
    which the format has no column for: portability prompts are then asked in any case.
    """
    import datasets

    texts = datasets.List(datasets.Value("string"))
    texts_of = {name: datasets.Value("string") for name in _PROBE}
    features = datasets.Features(
        {
            **dict.fromkeys(_TEXT_COLUMNS, datasets.Value("string")),
            **dict.fromkeys(_LIST_COLUMNS, texts),
            "neighborhood_prompts": datasets.List(texts_of),
            "portability": datasets.List({**texts_of, "aliases": texts}),
        }
    )
    rows = [to_record(request) for request in requests]
    return datasets.Dataset.from_list(rows, features=features)


_TEXT_COLUMNS = ("case_id", "subject", "prompt", "target_new", "target_true", "target_prefix")
_PROBE = ("prompt", "answer")
_LIST_COLUMNS = ("paraphrases", "generation_prompts", "reference_texts", "aliases")
_PROBE_COLUMNS = {"neighborhood_prompts": "neighborhood", "portability": "portability"}


def to_record(request: EditRequest) -> dict[str, Any]:
    """One request under the column names of the format ``facts``."""
    fields = asdict(request)
    row = {name: fields[name] for name in _TEXT_COLUMNS}
    row |= {name: list(fields[name]) for name in _LIST_COLUMNS}
    for column, name in _PROBE_COLUMNS.items():
        row[column] = [{part: probe[part] for part in _PROBE} for probe in fields[name]]
    for written, probe in zip(row["portability"], request.portability, strict=True):
        written["aliases"] = list(probe.aliases)
    return row
