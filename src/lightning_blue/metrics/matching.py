"""When an answer that a model wrote by itself counts as right: functions of texts and token ids."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import regex
import torch
from torch import Tensor

from lightning_blue.language_model.joining import writes_no_spaces
from lightning_blue.metrics.spec import NEGATED, NEIGHBOURS

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLE = regex.compile(r"\b(?:a|an|the)\b")


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


def contains(text: str, wanted: str) -> bool:
    """Say whether the words of an object stand in a text one after the other, once normalized.

    Where the object begins or ends in a script without spaces, it may do so inside a word. An
    object of which nothing is left is contained in nothing.

    >>> contains(" It is English, I think", "English"), contains(" Englishman", "English")
    (True, False)
    """
    inner = normalized(wanted)
    if not inner:
        return False
    before = "" if writes_no_spaces(inner[0]) else r"(?<!\S)"
    behind = "" if writes_no_spaces(inner[-1]) else r"(?!\S)"
    return bool(regex.search(before + regex.escape(inner) + behind, normalized(text)))


def is_any(answer: GeneratedAnswer) -> bool:
    """Say whether an answer, or its longer text, is the object or one of its aliases."""
    names = (answer.wanted, *answer.aliases)
    return any(is_match(said, name) for said in (answer.answer, answer.longer) for name in names)


def exact_match(answers: Sequence[GeneratedAnswer]) -> Tensor:
    """Say of n answers which are the object, see `is_match`; (n,) bool."""
    return torch.tensor([is_match(each.answer, each.wanted) for each in answers], dtype=torch.bool)


def containment(answers: Sequence[GeneratedAnswer]) -> Tensor:
    """Say of n answers in whose longer text the object stands, see `contains`; (n,) bool."""
    return torch.tensor([contains(each.longer, each.wanted) for each in answers], dtype=torch.bool)


def alias_match(answers: Sequence[GeneratedAnswer]) -> Tensor:
    """Say of n answers which are the object or one of its aliases, see `is_match`; (n,) bool.

    An alias that holds a stop string itself is looked for in the longer text as well.
    """
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
