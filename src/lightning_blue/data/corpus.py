"""Ordinary text: from the package, a local file, or a dataset on the hub.

A corpus is a sequence of documents, each of which is tokenised by itself: a tokenizer that begins
texts with a BOS puts one before each. Rows of a hub dataset are documents. In a text file, blank
lines end a document and belong to it; without any the file is one document. Nothing of the file is
lost: its documents, put together, are the file. To bound the memory, a document of more than
a million characters is read in parts, cut at the end of a line where there is one.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import Tokenizer

from lightning_blue.support.errors import InputError, first_line
from lightning_blue.support.hub import asked, looks_local, missing_path, no_source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ASSETS = resources.files("lightning_blue") / "assets"
_ALMANAC = {
    "almanac": _ASSETS / "almanac" / "corpus.txt",
    "almanac-heldout": _ASSETS / "almanac" / "heldout.txt",
}
PLAIN_ENGLISH = "plain_english"
PACKAGED = {**_ALMANAC, PLAIN_ENGLISH: _ASSETS / "plain_english" / "text.txt"}
AUTO = "auto"  # the text of the package that fits a model
LONGEST = 1_000_000  # characters that are tokenised at once


def is_local(corpus: str) -> bool:
    """Tell a path from the name of a hub dataset."""
    return (
        corpus in PACKAGED
        or Path(corpus).exists()
        or Path(corpus).suffix in {".txt", ".md", ".text"}
        or looks_local(corpus)
    )


def corpus_texts(corpus: str, split: str = "train") -> Iterator[str]:
    """Yield the documents of a corpus.

    Args:
        corpus: ``plain_english``, ``almanac`` or ``almanac-heldout`` from the package, a path, or a
            hub dataset, its configuration after a colon.
        split: split of a hub dataset.

    Raises:
        InputError: if there is no such file or dataset, or it has no text.
    """
    if is_local(corpus):
        yield from documents(read_text(corpus))
    else:
        yield from _hub_texts(corpus, split)


def documents(text: str) -> Iterator[str]:
    r"""Cut a text behind its blank lines, and what is too long into parts; nothing is lost.

    >>> list(documents("One.\nStill one.\n\n\nTwo.\n"))
    ['One.\nStill one.\n\n\n', 'Two.\n']
    """
    start, begun, blank = 0, False, False
    for line in re.finditer(r"[^\n]*\n|[^\n]+", text):
        written = bool(line[0].strip())
        if blank and written:
            yield from _parts(text[start : line.start()])
            start = line.start()
        begun = begun or written
        blank = begun and not written
    yield from _parts(text[start:])


def _parts(document: str) -> Iterator[str]:
    """Cut a document into parts of at most `LONGEST` characters, at ends of lines if possible."""
    while len(document) > LONGEST:
        cut = document.rfind("\n", 0, LONGEST) + 1 or LONGEST
        yield document[:cut]
        document = document[cut:]
    if document:
        yield document


def read_text(path: str) -> str:
    """Read a whole text, the package's own included.

    Raises:
        InputError: if the file is missing, empty, or not UTF-8.
    """
    file = PACKAGED.get(path, Path(path).expanduser())
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise missing_path(path, where=path) from None
    except UnicodeDecodeError as error:
        raise InputError(
            f"the text is not UTF-8: {error}", where=path, hint="save it as UTF-8"
        ) from error
    except OSError as error:
        raise InputError(
            f"the text cannot be read: {error.strerror}",
            where=path,
            hint="give a file of plain text that you may read",
        ) from error
    if not text.strip():
        raise InputError("the text file is empty", where=path, hint="give a text with content")
    return text


def require_named(key: str, corpus: str) -> None:
    """Refuse a corpus without a name before anything is loaded.

    Args:
        key: of the configuration, for the message.
        corpus: as in `corpus_texts`.

    Raises:
        InputError: if it is blank.
    """
    if not corpus.strip():
        raise InputError(
            "no text is named",
            where=f"{key} = {corpus!r}",
            hint="give a text file, the name of a dataset on the hub, or `plain_english`",
        )


def corpus_fingerprint(corpus: str, split: str = "train") -> str:
    """Identify a corpus: a local text by its content, a hub dataset by its name and split."""
    if is_local(corpus):
        return hashlib.sha256(read_text(corpus).encode()).hexdigest()[:16]
    return f"{corpus}/{split}"


def require_own_text(corpus: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a text about the almanac for a model that it was not written for.

    It belongs to the model beside it in the package: to models with that one's tokenizer.

    Raises:
        InputError: if it is a text about the almanac, and the tokenizer is not the package's.
    """
    if corpus in _ALMANAC and not _reads_the_almanac(tokenizer):
        raise InputError(
            f"the text {corpus!r} belongs to the small model in the package: it is about an "
            "invented world, and the statistics of its keys say little of another model",
            where=f"model.covariance.corpus = {corpus}",
            hint="leave it out, for the plain English of the package; or give ordinary text, about "
            "ten tokens for each key dimension: --model.covariance.corpus=FILE, or a dataset of "
            "the hub as name:configuration, e.g. wikimedia/wikipedia:20231101.en",
        )


def fitting_corpus(corpus: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return what ``auto`` stands for: the almanac's text for its own model, else plain English.

    Args:
        corpus: a name that is returned as it is, or ``auto``.
        tokenizer: of the model, by which the package's own is known.
    """
    if corpus != AUTO:
        return corpus
    return "almanac" if _reads_the_almanac(tokenizer) else PLAIN_ENGLISH


def _reads_the_almanac(tokenizer: PreTrainedTokenizerBase) -> bool:
    file = _ASSETS / "almanac" / "model" / "tokenizer.json"
    own = Tokenizer.from_str(file.read_text(encoding="utf-8"))
    return bool(tokenizer.get_vocab() == own.get_vocab())


def _hub_texts(corpus: str, split: str) -> Iterator[str]:
    from datasets import load_dataset

    name, _, config = corpus.partition(":")
    with asked("dataset", name) as reason:
        try:
            rows = load_dataset(name, config or None, split=split, streaming=True)
        except Exception as error:
            what = f"neither a text file nor a dataset that can be loaded: {first_line(error)}"
            hint = "give a path to a text file, or a hub dataset as name:configuration"
            if reason is not None:
                what, hint = no_source("text", corpus, reason, PACKAGED)
            raise InputError(what, where=corpus, hint=hint) from error
    for row in rows:
        if "text" not in row:
            raise InputError(
                f"the dataset has the columns {', '.join(row)}, but no 'text'",
                where=corpus,
                hint="choose a dataset of plain text",
            )
        yield row["text"]
