"""From a prompt that names its subject to a template with a ``{}`` in the subject's place."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator

SLOT = "{}"


def find_subject(prompt: str, subject: str) -> int | None:
    """Index of the subject in the prompt, or None where it does not stand there.

    The first occurrence as a whole word counts; where there is none, the first occurrence at all
    ("Lyon" in "Lyonnais", or in a script that writes without spaces). The first rather than the
    last, because with causal attention every later mention sees it. Capitals and Unicode forms
    have to match: nothing is altered.
    """
    starts = list(_occurrences(prompt, subject))
    whole = (i for i in starts if _is_whole_word(prompt, i, i + len(subject)))
    return next(whole, starts[0] if starts else None)


def spelling_hint(prompt: str, subject: str) -> str | None:
    """How to correct a subject that differs from the prompt's in capitals or Unicode form only."""
    other_capitals = re.search(re.escape(subject), prompt, re.IGNORECASE)
    if other_capitals:
        return f"spell it as the prompt does, {other_capitals[0]!r}"
    if unicodedata.normalize("NFC", subject) in unicodedata.normalize("NFC", prompt):
        return "write the prompt and the subject in the same Unicode form (NFC)"
    return None


def _occurrences(prompt: str, subject: str) -> Iterator[int]:
    """Indices where the subject stands and does not end inside a combined character."""
    start = prompt.find(subject)
    while start >= 0:
        following = prompt[start + len(subject) : start + len(subject) + 1]
        if not (following and unicodedata.combining(following)):
            yield start
        start = prompt.find(subject, start + 1)


def _is_whole_word(text: str, start: int, stop: int) -> bool:
    """Whether neither neighbour of ``text[start:stop]`` belongs to a word."""
    return not (_is_word(text[start - 1 : start]) or _is_word(text[stop : stop + 1]))


def _is_word(character: str) -> bool:
    """Whether a character (or none, at the end of a text) is a letter, mark, digit or ``_``."""
    return character == "_" or unicodedata.category(character or " ")[0] in "LMN"
