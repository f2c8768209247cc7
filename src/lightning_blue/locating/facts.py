"""Facts that a model knows, as causal tracing reads them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_blue.data.requests import EditRequest, Probe
from lightning_blue.editing.health import known
from lightning_blue.language_model.tokens import encode_targets, encode_with_span, target_prefixes
from lightning_blue.support.errors import InputError
from lightning_blue.support.processes import progress_bar

ASKED_AT_ONCE = 64

TOKEN_CLASSES = (
    "first subject token",
    "middle subject tokens",
    "last subject token",
    "first subsequent token",
    "further tokens",
    "last token",
)
LAST_SUBJECT = TOKEN_CLASSES.index("last subject token")


class KnownFacts(NamedTuple):
    """What was found out about the facts of a source.

    Attributes:
        facts: those that the model knows, ``target_true`` being what it says.
        asked: how many it was asked.
    """

    facts: list[EditRequest]
    asked: int


class TracedFact(NamedTuple):
    """A known fact as tokens.

    Attributes:
        ids: of the prompt.
        first, last: the subject's tokens among them.
        answer: the first token of the object.
    """

    ids: list[int]
    first: int
    last: int
    answer: int

    @property
    def positions(self) -> range:
        """The tokens at which a restoration can have an effect: those from the subject on."""
        return range(self.first, len(self.ids))


def object_of(request: EditRequest) -> str:
    """Return what the unedited model should say: the current object, or the only one."""
    return request.target_true or request.target_new


def find_known(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[EditRequest],
    wanted: int,
    seed: int,
) -> KnownFacts:
    """Ask for facts in random order until enough of them are known.

    A fact is known if the model's greedy continuation of its prompt begins with the object, token
    by token.

    Args:
        model: a causal language model in eval mode, unedited.
        tokenizer: its tokenizer.
        requests: the facts; the object is ``target_true``, or ``target_new`` where that is None.
        wanted: known facts, at most.
        seed: of the order.

    Raises:
        InputError: if it knows none.
    """
    order = random.Random(seed).sample(list(requests), len(requests))
    found: list[EditRequest] = []
    asked = 0
    with progress_bar(wanted, "known facts") as bar:
        while asked < len(order) and len(found) < wanted:
            part = order[asked : asked + ASKED_AT_ONCE]
            probes = [Probe(r.text, object_of(r), r.target_prefix) for r in part]
            answered = known(model, tokenizer, probes)
            right = [place for place, yes in enumerate(answered) if yes][: wanted - len(found)]
            found += [replace(part[place], target_true=object_of(part[place])) for place in right]
            asked += len(part) if len(found) < wanted else right[-1] + 1
            bar.update(len(right))
    if not found:
        raise InputError(
            f"the model knows none of {asked:,} facts: its greedy continuation never begins with "
            "the object",
            where="--data",
            hint="give facts that it knows, with what it says now as target_true "
            "(or attribute, in the form of known_1000.json)",
        )
    return KnownFacts(found, asked)


def as_tokens(tokenizer: PreTrainedTokenizerBase, facts: Sequence[EditRequest]) -> list[TracedFact]:
    """Tokenise facts from `find_known`."""
    spans = encode_with_span(tokenizer, [f.prompt for f in facts], [f.subject for f in facts])
    prefixes = target_prefixes(tokenizer, [f.text for f in facts], [f.target_prefix for f in facts])
    objects = encode_targets(tokenizer, [object_of(f) for f in facts], prefixes)
    return [TracedFact(*span, ids[0]) for span, ids in zip(spans, objects, strict=True)]


def token_class(fact: TracedFact, position: int) -> int:
    """Return which of `TOKEN_CLASSES` a token at or behind the subject belongs to; just one.

    The only token of a subject is its last one. The prompt's last token is that also where it
    directly follows the subject, and the subject's where the subject ends the prompt.

    >>> fact = TracedFact(list(range(8)), first=1, last=4, answer=0)
    >>> [TOKEN_CLASSES[token_class(fact, position)].split()[0] for position in fact.positions]
    ['first', 'middle', 'middle', 'last', 'first', 'further', 'last']
    """
    if position <= fact.last:
        return LAST_SUBJECT if position == fact.last else int(position > fact.first)
    if position == len(fact.ids) - 1:
        return 5
    return 3 if position == fact.last + 1 else 4
