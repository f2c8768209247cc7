"""Ordinary text: from the package, a local file, or a dataset on the hub."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

from lightning_blue.support.errors import InputError

_ASSETS = resources.files("lightning_blue") / "assets" / "almanac"
PACKAGED = {"almanac": _ASSETS / "corpus.txt", "almanac-heldout": _ASSETS / "heldout.txt"}


def is_local(corpus: str) -> bool:
    """Tell a path from the name of a hub dataset."""
    return (
        corpus in PACKAGED
        or Path(corpus).exists()
        or Path(corpus).suffix in {".txt", ".md", ".text"}
    )


def corpus_texts(corpus: str, split: str = "train") -> Iterator[str]:
    """Yield the documents of a corpus: paragraphs of a text file, rows of a hub dataset.

    Args:
        corpus: ``almanac`` or ``almanac-heldout`` from the package, a path, or a hub dataset, its
            configuration after a colon.
        split: split of a hub dataset.

    Raises:
        InputError: if there is no such file or dataset, or it has no text.
    """
    if is_local(corpus):
        yield from read_text(corpus).splitlines(keepends=True)
    else:
        yield from _hub_texts(corpus, split)


def read_text(path: str) -> str:
    """Read a whole text, the package's own included.

    Raises:
        InputError: if the file is missing, empty, or not UTF-8.
    """
    file = PACKAGED.get(path, Path(path))
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError("there is no such text file", where=path, hint="check the path") from None
    except UnicodeDecodeError as error:
        raise InputError(
            f"the text is not UTF-8: {error}", where=path, hint="save it as UTF-8"
        ) from error
    if not text.strip():
        raise InputError("the text file is empty", where=path, hint="give a text with content")
    return text


def corpus_fingerprint(corpus: str, split: str = "train") -> str:
    """Identify a corpus: a local text by its content, a hub dataset by its name and split."""
    if is_local(corpus):
        return hashlib.sha256(read_text(corpus).encode()).hexdigest()[:16]
    return f"{corpus}/{split}"


def _hub_texts(corpus: str, split: str) -> Iterator[str]:
    from datasets import load_dataset

    name, _, config = corpus.partition(":")
    try:
        rows = load_dataset(name, config or None, split=split, streaming=True)
    except Exception as error:
        raise InputError(
            f"neither a text file nor a dataset that can be loaded: {error}",
            where=corpus,
            hint="give a path to a text file, or a hub dataset as name:configuration",
        ) from error
    for row in rows:
        if "text" not in row:
            raise InputError(
                f"the dataset has the columns {', '.join(row)}, but no 'text'",
                where=corpus,
                hint="choose a dataset of plain text",
            )
        yield row["text"]
