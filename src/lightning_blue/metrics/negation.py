"""Negation probes: the request's own prompt behind words that deny what follows.

After "It is not true that the mother tongue of Danielle Darrieux is", a model that has learned that
it is English does not go on with English. See docs/protocols.md for sources and for what a good
model does.
"""

from __future__ import annotations

from collections.abc import Sequence

import regex
from transformers import PreTrainedTokenizerBase

from lightning_blue.data.requests import EditRequest
from lightning_blue.language_model.chat import SLOT, Markers, markers
from lightning_blue.support.errors import InputError

TEXT = "It is not true that {}"
FUNCTION_WORDS = ("The ", "A ", "An ", "In ", "On ", "At ", "From ", "During ", "As ")
# A question says nothing that could be denied. In Greek a semicolon ends one, in Armenian the mark
# stands on the word that asks.
_QUESTION = regex.compile(r"(?s)[?？؟⸮\u037e]\s*\Z|\p{Greek}.*;\s*\Z|՞")


def negation_text(given: bool | str) -> str | None:
    """Return the words around a prompt; None for no negation probes.

    Raises:
        InputError: for a text without one place for the prompt.

    >>> negation_text(True), negation_text(False)
    ('It is not true that {}', None)
    """
    if isinstance(given, bool):
        return TEXT if given else None
    if given.count(SLOT) != 1:
        raise InputError(
            f"{given!r} does not say where the prompt belongs",
            where="measure.negation",
            hint=f"write {SLOT} there, once, as in {TEXT!r}; or give true for that text",
        )
    return given


def negated_prompts(
    tokenizer: PreTrainedTokenizerBase, requests: Sequence[EditRequest], text: str | None
) -> list[str | None]:
    """Return the negated own prompt of each request; None without a text, and for a question."""
    if text is None:
        return [None] * len(requests)
    known = markers(tokenizer)
    return [negated(request, text, known) for request in requests]


def negated(request: EditRequest, text: str, known: Markers) -> str | None:
    """Put a request's own prompt behind a negation, inside a chat template that it carries.

    A function word at its beginning loses its capital letter.

    >>> request = EditRequest("0", "The mother tongue of {} is", "Danielle Darrieux", "English")
    >>> negated(request, TEXT, Markers())
    'It is not true that the mother tongue of Danielle Darrieux is'
    """
    head, words, tail = known.parts(request.prompt)
    if _QUESTION.search(words):
        return None
    if words.startswith(FUNCTION_WORDS) and not text.startswith(SLOT):
        words = words[0].lower() + words[1:]
    return (head + text.replace(SLOT, words) + tail).replace(SLOT, request.subject, 1)
