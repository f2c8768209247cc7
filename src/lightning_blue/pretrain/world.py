"""What a world offers to pretraining: facts, running text that states them, text to tokenise."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

from lightning_blue.data.requests import Probe


class Piece(NamedTuple):
    """A stretch of running text; ``is_object`` marks the object of a fact.

    A piece starts at the beginning of a text or with a space or a punctuation mark, so that
    tokenising piece by piece gives the tokens of the whole text.
    """

    text: str
    is_object: bool = False


@dataclass(frozen=True)
class KnownFact:
    """A fact to be learned: prompts that training uses, prompts that it never sees, neighbours.

    All prompts are full texts, the subject in its place, and end where ``answer`` follows after
    one space. ``neighbours`` are prompts about other subjects with their own answers.
    """

    subject: str
    answer: str
    trained: tuple[str, ...]
    held_out: tuple[str, ...] = ()
    neighbours: tuple[Probe, ...] = ()


class World(Protocol):
    """A source of facts and of text. Everything is a pure function of the world and ``rng``."""

    @property
    def facts(self) -> Sequence[KnownFact]:
        """All facts, in the order in which they are learned."""
        ...

    def document(self, rng: random.Random, active: int) -> list[Piece]:
        """Write one document that states facts among the first ``active`` ones."""
        ...

    def tokenizer_texts(self) -> Iterator[str]:
        """Yield the texts on which the tokenizer is trained."""
        ...

    def write_files(self, folder: Path) -> None:
        """Write what belongs beside the model: texts for later measurements, facts to edit."""
        ...


def text_of(pieces: Sequence[Piece]) -> str:
    """Join pieces to running text.

    >>> text_of([Piece("Ada plays the"), Piece(" harp", True), Piece(".")])
    'Ada plays the harp.'
    """
    return "".join(piece.text for piece in pieces)


def write_prose(path: Path, document: Callable[[], list[Piece]], *, size: int) -> None:
    """Write documents, one a line, until the file has at least ``size`` characters."""
    lines: list[str] = []
    length = 0
    while length < size:
        lines.append(text_of(document()))
        length += len(lines[-1]) + 1
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
