"""In-context editing: facts stand in front of the prompts that they may be about; no weight moves.

Prompts are those of IKE (Zheng et al. 2023, arXiv 2305.12740), without its demonstrations. What
stands before which prompt is decided as a system in use could: from the prompt's text and the
memory of all edits so far, and from nothing that a data set knows besides.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import regex
from transformers import PreTrainedTokenizerBase

from blue_callbacks.ranges import COUNT, check_ranges
from lightning_blue.data.requests import EditRequest
from lightning_blue.language_model.chat import NO_MARKERS, Markers
from lightning_blue.language_model.joining import writes_no_spaces
from lightning_blue.language_model.tokens import target_prefixes
from lightning_blue.support.errors import InputError

SLOT = "{}"
_HANGUL = regex.compile(r"\p{Hangul}")


@dataclass(frozen=True)
class InContext:
    r"""What is put before a prompt, under ``update.solver: in_context``.

    Args:
        most: facts that stand before a prompt, at most.
        fact: how each of them is spelled, with ``{}`` for the prompt and the new object.
        lead: what stands between the facts and the prompt.
    """

    most: int = 4
    fact: str = "New Fact: {}.\n"
    lead: str = "Prompt: "

    def __post_init__(self) -> None:
        check_ranges("model.in_context", vars(self), most=COUNT)
        if self.fact.count(SLOT) != 1:
            raise InputError(
                f"{self.fact!r} has no single {SLOT} for a fact",
                where="model.in_context.fact",
                hint=r'"New Fact: {}.\n" is the default',
            )


@dataclass(frozen=True)
class Fact:
    """What is remembered of an edit.

    Attributes:
        case_id: of its request.
        subject: by which it is found.
        prompt: with the subject in its place; a later fact on the same prompt takes its place.
        statement: the prompt and the new object.
    """

    case_id: str
    subject: str
    prompt: str
    statement: str


def facts_of(tokenizer: PreTrainedTokenizerBase, batch: Sequence[EditRequest]) -> list[Fact]:
    """Return what is remembered of each edit of a batch.

    Args:
        tokenizer: says what stands between a prompt and its object where the request does not.
        batch: the edits.
    """
    given = [request.target_prefix for request in batch]
    prefixes = target_prefixes(tokenizer, [request.shown for request in batch], given)
    return [
        Fact(r.case_id, r.subject, r.shown, f"{r.shown}{prefix}{r.target_new}")
        for r, prefix in zip(batch, prefixes, strict=True)
    ]


class _Entry(NamedTuple):
    """A fact, and what it is looked up by: its subject, folded, and the words of its prompt."""

    fact: Fact
    subject: str
    words: frozenset[str]


class FactMemory:
    r"""All facts that were edited so far, and the prompts that they are put before.

    A fact is put before a prompt that names its subject: as whole words, whatever the capitals, and
    not merely inside the longer name of another fact's subject. Of several such facts those count
    most whose own prompts share the most words with the prompt, and of equal ones the newer; the
    best stands last, next to the prompt. A prompt that names no subject stays as it is.

    Args:
        settings: what is written.
        known: markers of the tokenizer; facts stand inside the user's turn of a chat template.

    >>> memory = FactMemory(InContext(most=1))
    >>> memory.add([Fact("7", "Lyon", "Lyon is a twin city of", "Lyon is a twin city of Rome")])
    >>> memory("The twin city of Lyon is")
    'New Fact: Lyon is a twin city of Rome.\nPrompt: The twin city of Lyon is'
    >>> memory("The twin city of Lyonnais is")
    'The twin city of Lyonnais is'
    """

    def __init__(self, settings: InContext | None = None, known: Markers = NO_MARKERS) -> None:
        self.settings, self.known = settings or InContext(), known
        self._facts: dict[str, _Entry] = {}  # by prompt, the newest last

    @property
    def facts(self) -> list[Fact]:
        """The facts in force, the newest last."""
        return [entry.fact for entry in self._facts.values()]

    def __call__(self, text: str) -> str:
        """Return a prompt with what is retrieved for it in front."""
        place = self.known.opening(text)
        facts = self.recall(text[place:])
        if not facts:
            return text
        lines = "".join(self.settings.fact.replace(SLOT, fact.statement) for fact in facts)
        return f"{text[:place]}{lines}{self.settings.lead}{text[place:]}"

    def add(self, facts: Sequence[Fact]) -> None:
        """Remember facts; an earlier one on the same prompt is forgotten."""
        for fact in facts:
            self._facts.pop(fact.prompt, None)
            words = _words(fact.prompt.replace(fact.subject, " "))
            self._facts[fact.prompt] = _Entry(fact, _folded(fact.subject), words)

    @contextmanager
    def holding(self, facts: Sequence[Fact]) -> Iterator[None]:
        """Remember facts; be as before if the block raises."""
        before = dict(self._facts)
        self.add(facts)
        try:
            yield
        except BaseException:
            self._facts = before
            raise

    def recall(self, text: str) -> list[Fact]:
        """Return the facts that a text is found to be about, the best last."""
        folded = _folded(text)
        found = [(entry, _mentions(folded, entry.subject)) for entry in self._facts.values()]
        every = {span for _, spans in found for span in spans}
        named = [entry for entry, spans in found if any(not _inside(span, every) for span in spans)]
        words = _words(text)
        ranked = sorted(named, key=lambda entry: len(entry.words & words))
        return [entry.fact for entry in ranked[-self.settings.most :]]

    def to_json(self) -> str:
        """Return the facts, and how they are put before prompts, for other programs."""
        content = {"in_context": asdict(self.settings), **self.state_dict()}
        return json.dumps(content, indent=1, ensure_ascii=False) + "\n"

    def state_dict(self) -> dict[str, Any]:
        """Return the facts as plain values."""
        return {"facts": [asdict(fact) for fact in self.facts]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the facts of a checkpoint."""
        self._facts = {}
        self.add([Fact(**fact) for fact in state["facts"]])


Span = tuple[int, int]


def _folded(text: str) -> str:
    return unicodedata.normalize("NFC", text).casefold()


def _words(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"\w+", _folded(text)))


def _mentions(text: str, subject: str) -> list[Span]:
    """Return where a subject stands in a text as whole words; both are folded."""
    found = []
    start = text.find(subject)
    while start >= 0:
        stop = start + len(subject)
        if _is_boundary(text, start) and _is_boundary(text, stop):
            found.append((start, stop))
        start = text.find(subject, start + 1)
    return found


def _is_boundary(text: str, place: int) -> bool:
    """Say whether a word may begin or end at a place.

    Between two letters it may only in scripts that put no space between words, as Chinese and Thai,
    and in Korean, which writes particles behind a name; never within a letter and its marks.
    """
    pair = text[place - 1 : place], text[place : place + 1]
    if not all(each and (each == "_" or unicodedata.category(each)[0] in "LMN") for each in pair):
        return True
    if unicodedata.category(pair[1])[0] == "M":
        return False
    return any(writes_no_spaces(each) or _HANGUL.match(each) for each in pair)


def _inside(span: Span, others: set[Span]) -> bool:
    """Say whether a span lies in a longer one."""
    start, stop = span
    return any(a <= start and stop <= b and b - a > stop - start for a, b in others)
