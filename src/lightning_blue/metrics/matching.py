"""When an answer that a model wrote by itself counts as right: functions of texts and token ids."""

from __future__ import annotations

import string
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import regex
import torch
from torch import Tensor

from lightning_blue.language_model.joining import writes_no_spaces
from lightning_blue.metrics.spec import NEGATED, NEIGHBOURS

RULES = 3  # raised where a rule below changes; unedited models are then measured anew

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLE = regex.compile(r"\b(?:a|an|the)\b")
_ARTICLE_ALONE = regex.compile(r"(?<!\S)(?:a|an|the)(?!\S)")  # not the first letter of "a+b"
# No sign is one inside a number, nor U+FFFD, which stands for part of a character, often a letter.
_SIGN = regex.compile(r"(?!\uFFFD|(?<=\p{Nd})[.,:'’]\p{Nd})[\p{P}\p{S}]")

_GLUED = regex.compile(r"(?!(?<=\p{Nd}).\p{Nd})[!-/:-@\[-`{-~]")  # ASCII's, but within a number
_THOUSANDS = regex.compile(r"(?<=\p{Nd}),(?=\p{Nd}{3}(?!\p{Nd}))")
_ENDS_IN_ARTICLE = regex.compile(r"\s(?:a|an|the)\W*\Z", regex.IGNORECASE)
_ENDS_IN_PLUS = regex.compile(r"[\p{L}\p{N}][+#]+\s*\Z")


@dataclass(frozen=True)
class GeneratedAnswer:
    """What a model answered to one prompt, and what was wanted.

    Attributes:
        request: place of the request among those that were asked.
        prompts: which of its prompts it is, as the table of metrics calls them.
        prompt: as the data has it.
        wanted: the object that should be said; of a neighbour its own.
        aliases: other names of that object.
        answer: what was said up to the first stop string.
        longer: what was said up to the stop string behind as many as the object holds itself.
        alias_texts: by alias that holds stop strings itself, what was said up to the one behind as
            many; to be compared with that alias alone.
        ids: tokens of the answer with those of the stop string.
        ended_by: ``stop``, ``end`` (an end-of-text token) or ``limit``.
        unedited: what ``ids`` were before any edit; None where that was not asked.
        judged: whether a judge calls it right; None where it was not asked or could not say.
    """

    request: int
    prompts: str
    prompt: str
    wanted: str
    aliases: tuple[str, ...]
    answer: str
    longer: str
    ids: tuple[int, ...]
    ended_by: str
    unedited: tuple[int, ...] | None = None
    judged: bool | None = None
    alias_texts: Mapping[str, str] = field(default_factory=dict)

    @property
    def compared(self) -> bool:
        """Whether the object is what should be said: not to a neighbour's or a negated prompt."""
        return self.prompts not in (NEIGHBOURS, NEGATED)


def answer_from(fields: Mapping[str, Any]) -> GeneratedAnswer:
    """Make an answer of its fields as a file holds them, which has lists for tuples."""
    restored: dict[str, Any] = {
        k: tuple(part) if isinstance(part, list) else part for k, part in fields.items()
    }
    return GeneratedAnswer(**restored)


def normalized(text: str) -> str:
    """Return a text as exact match compares it: SQuAD's rule, in its order.

    Lower case; without ASCII punctuation; without the words a, an and the; white space collapsed.

    >>> normalized(" The U.S.A. and an  apple")
    'usa and apple'
    """
    return " ".join(_ARTICLE.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def is_match(answer: str, wanted: str) -> bool:
    """Say whether two texts are equal once they are normalized.

    >>> is_match(" the Beatles!", "Beatles"), is_match(" English language", "English")
    (True, False)
    """
    return normalized(answer) == normalized(wanted)


def spaced(text: str, articles: bool = False) -> str:
    """Return a text as the words between its punctuation marks and symbols, of any script.

    Lower case; full-width and half-width forms as ordinary ones; without the words a, an and the
    where they stand alone, unless ``articles`` are kept; signs as spaces, but for those inside a
    number; white space collapsed.

    >>> spaced(" the «English»-speaking U.S., 1.5")
    'english speaking u s 1.5'
    """
    text = _of_one_width(text).lower()
    return " ".join(_SIGN.sub(" ", text if articles else _ARTICLE_ALONE.sub(" ", text)).split())


def glued(text: str, articles: bool = False) -> str:
    """Return a text as `spaced`, but that ASCII punctuation is deleted, so that "US" is "U.S.".

    Between digits only the comma before three of them is: 1,000 is 1000, but 1.5 is not 15.

    >>> glued(" the U.S., 1,500.25 or 1/2")
    'us 1500.25 or 1 2'
    """
    text = _GLUED.sub("", _THOUSANDS.sub("", _of_one_width(text)))
    return spaced(text, articles)


def contains(text: str, wanted: str) -> bool:
    """Say whether the words of an object stand in a text one after the other.

    They do if they do once ASCII punctuation is deleted from both (`glued`), or once the signs of
    both are spaces (`spaced`). Articles do not count, unless the object ends in one ("Serie A").
    Scripts without spaces write no boundary, so that none is asked for beside their characters. A
    plus or a number sign at the end is part of the object ("C++"). An object of which exact match
    leaves nothing (`normalized`) is contained in nothing.

    >>> contains(" It is “English”", "English"), contains(" English/French", "English")
    (True, True)
    >>> contains(" Englishman", "English"), contains(" 1.5 million", "5")
    (False, False)
    >>> contains("他于1995年出生", "1995年"), contains("Vitamin C", "Vitamin A")
    (True, False)
    """
    if not normalized(wanted):
        return False
    if _ENDS_IN_PLUS.search(wanted) and wanted.strip().lower() not in text.lower():
        return False
    articles = bool(_ENDS_IN_ARTICLE.search(wanted))
    return any(_stands_in(form(text, articles), form(wanted, articles)) for form in (glued, spaced))


def _stands_in(text: str, words: str) -> bool:
    """Say whether words that spaces part stand in a text of such words."""
    found = regex.finditer(regex.escape(words), text, overlapped=True) if words else ()
    return any(
        _is_edge(text[: match.start()][-1:], words[0])
        and _is_edge(text[match.end() :][:1], words[-1])
        for match in found
    )


def _is_edge(outer: str, inner: str) -> bool:
    """Say whether a word may end between a character of it and the one outside."""
    return not outer.strip() or writes_no_spaces(inner) or writes_no_spaces(outer)


def _of_one_width(text: str) -> str:
    """Return a text with full-width Latin and half-width kana as ordinary characters, composed."""
    ordinary = (
        unicodedata.normalize("NFKC", each)
        if unicodedata.decomposition(each).startswith(("<wide>", "<narrow>"))
        else each
        for each in text
    )
    return unicodedata.normalize("NFC", "".join(ordinary))


def is_any(answer: GeneratedAnswer) -> bool:
    """Say whether an answer is the object or one of its aliases.

    Each name is compared with the answer, and with what was said up to the stop string behind as
    many as the name holds itself. An empty answer is none of them.
    """
    texts = {**answer.alias_texts, answer.wanted: answer.longer}
    return any(
        _is_name(said, name)
        for name in (answer.wanted, *answer.aliases)
        for said in (answer.answer, texts.get(name, answer.answer))
    )


def _is_name(said: str, name: str) -> bool:
    """Compare as `is_match`; a name of which that leaves nothing ("A+") as it is written."""
    if normalized(name):
        return is_match(said, name)
    return said.lower().split() == name.lower().split()


def exact_match(answers: Sequence[GeneratedAnswer]) -> Tensor:
    """Say of n answers which are the object, see `is_match`; (n,) bool.

    The reference's rule to the letter: an object that is nothing but articles and ASCII punctuation
    ("A") equals an empty answer.
    """
    return torch.tensor([is_match(each.answer, each.wanted) for each in answers], dtype=torch.bool)


def containment(answers: Sequence[GeneratedAnswer]) -> Tensor:
    """Say of n answers in whose longer text the object stands, see `contains`; (n,) bool."""
    return torch.tensor([contains(each.longer, each.wanted) for each in answers], dtype=torch.bool)


def alias_match(answers: Sequence[GeneratedAnswer]) -> Tensor:
    """Say of n answers which are the object or one of its aliases, see `is_any`; (n,) bool."""
    return torch.tensor([is_any(each) for each in answers], dtype=torch.bool)


def avoids(answers: Sequence[GeneratedAnswer]) -> Tensor:
    """Say of n answers in which the object does not stand, see `contains`; (n,) bool."""
    return ~containment(answers)


def called_right(answers: Sequence[GeneratedAnswer]) -> Tensor:
    """Say which of n judged answers the judge calls right; (n,) bool."""
    return torch.tensor([each.judged is True for each in answers], dtype=torch.bool)


def agreement(answers: Sequence[GeneratedAnswer]) -> Tensor:
    """Say of n judged answers where the judge says what exact match says; (n,) bool."""
    return called_right(answers) == exact_match(answers)


def is_not_judged(answers: Sequence[GeneratedAnswer]) -> Tensor:
    """Say which of n answers have no verdict; (n,) bool."""
    return torch.tensor([each.judged is None for each in answers], dtype=torch.bool)


def same_continuation(answers: Sequence[GeneratedAnswer]) -> Tensor:
    """Say of n continuations which have all token ids that the unedited model wrote; (n,) bool."""
    return torch.tensor([each.ids == each.unedited for each in answers], dtype=torch.bool)


def is_empty(answers: Sequence[GeneratedAnswer]) -> Tensor:
    """Say of n answers in which there is nothing but white space; (n,) bool."""
    return torch.tensor([not each.answer.strip() for each in answers], dtype=torch.bool)


def is_cut_off(answers: Sequence[GeneratedAnswer]) -> Tensor:
    """Say of n answers which were ended by the limit of tokens; (n,) bool."""
    return torch.tensor([each.ended_by == "limit" for each in answers], dtype=torch.bool)
