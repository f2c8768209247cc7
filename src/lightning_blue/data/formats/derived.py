"""Columns that a record holds in another form than as fields."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from lightning_blue.data.formats.fields import Unusable, at, string
from lightning_blue.data.formats.format import Record
from lightning_blue.support.text import shown


def unify_spelling(record: Record) -> Record:
    """Read people's ``neighbourhood_prompts`` as ``neighborhood_prompts``."""
    british, american = "neighbourhood_prompts", "neighborhood_prompts"
    if not record.get(british):
        return record
    if record.get(american):
        raise Unusable(
            "wrong type",
            f"the record has both {american} and {british}",
            "keep one of the two spellings",
        )
    return {**record, american: record[british]}


# RippleEdits: how the sentence of an edit words its relation (Cohen et al., arXiv 2307.12976). A
# relation that is not here is worded by its name in one of the forms of `_WORDINGS`.
_WORDED = MappingProxyType(
    {
        "AWARD_RECEIVED": "The name of the award {} won is",
        "CAPITAL": "The name of the capital city of {} is",
        "CAPITAL_OF": "The name of the country which {} is the capital of is",
        "CONTINENT": "The name of the continent which {} is part of is",
        "COUNTRY": "The name of the country which {} is associated with is",
        "CURRENCY": "The name of the currency in {} is",
        "ETHNIC_GROUP": "The name of the ethnic group which {} is associated with is",
        "FOLLOWED_BY": "{} is followed by",
        "FOLLOWS": "{} follows",
        "HEADQUARTERS": "The headquarters of {} is located in",
        "LEAGUE": "The name of the league which {} plays in is",
        "LIKELY_ANTHEM": "The name of the anthem that is most likely to be performed in {} is",
        "MEMBER_OF_SPORTS_TEAM": "The name of the sports team which {} is a member of is",
        "NATIVE_LANGUAGE": "The mother tongue of {} is",
        "NUMBER_OF_CHILDREN": "The number of children {} has is",
        "POSITION_HELD": "The name of the position held by {} is",
        "RELIGION": "The name of the religion which {} is associated with is",
        "SEX_OR_GENDER": "The gender of {} is",
    }
)
_WORDINGS = (
    "The name of the {name} of {{}} is",
    "The {name} of {{}} is",
    "The names of the {name}s of {{}} are",
)


class _Parts(NamedTuple):
    """A sentence taken apart: its relation as a prompt with ``{}``, its subject and its object."""

    prompt: str
    subject: str
    object: str


def statement_parts(record: Record) -> Record:
    """Take the sentences of an edit apart: RippleEdits names subject and objects in them alone.

    The sentence that holds before the edit (``original_fact``; the authors' code calls it
    ``previous_fact``) decides where the subject ends, if that can be read in several ways.

    Raises:
        Unusable: if the relation is not worded as its name says, or several subjects are possible.
    """
    edit = at(record, "edit")
    if not isinstance(edit, Mapping):
        raise Unusable("missing field", "the field 'edit' is no object", "add 'edit'")
    new = _readings(edit, "edit")
    before = "original_fact" if edit.get("original_fact") is not None else "previous_fact"
    original = edit.get(before)
    true = _readings(original, f"edit.{before}") if isinstance(original, Mapping) else []
    if true:
        shared = {(each.prompt, each.subject) for each in true}
        new = [each for each in new if (each.prompt, each.subject) in shared]
    if len(new) != 1:
        what = "several subjects are possible" if new else "its sentences have different subjects"
        raise Unusable(
            "subject not in prompt",
            f"in {shown(str(edit['prompt']))} {what}",
            "write the record in the format `facts`, with subject, prompt and target_new",
        )
    [chosen] = new
    objects = [each.object for each in true if each[:2] == chosen[:2]]
    return {
        **record,
        "subject": chosen.subject,
        "prompt": chosen.prompt,
        "target_new": chosen.object,
        "target_true": objects[0] if objects else None,
    }


def _readings(fact: Record, path: str) -> list[_Parts]:
    """Every way to take the sentence of a fact apart; at least one."""
    for name in ("prompt", "relation"):
        if fact.get(name) is None:
            raise Unusable("missing field", f"the field '{path}.{name}' is missing", "add it")
    sentence = string(fact["prompt"], f"{path}.prompt").removesuffix(".")
    relation = string(fact["relation"], f"{path}.relation").upper().replace(" ", "_")
    name = relation.lower().replace("_", " ")
    named = [wording.format(name=name) for wording in _WORDINGS]
    for prompt in [_WORDED[relation]] if relation in _WORDED else named:
        found = _taken_apart(sentence, prompt)
        if found:
            return found
    raise Unusable(
        "subject not in prompt",
        f"{shown(sentence)} does not word the relation {shown(relation)} as RippleEdits does",
        f"word it as {_WORDED.get(relation, named[0])!r}, or write the record in the format "
        "`facts`, with subject, prompt and target_new",
    )


def _taken_apart(sentence: str, prompt: str) -> list[_Parts]:
    """Every reading of a sentence as the prompt with a subject in its slot and an object behind."""
    opening, _, closing = prompt.partition("{}")
    closing += " "
    if not sentence.startswith(opening):
        return []
    rest = sentence[len(opening) :]
    ends = [i for i in range(1, len(rest)) if rest.startswith(closing, i)]
    parts = [_Parts(prompt, rest[:i].strip(), rest[i + len(closing) :].strip()) for i in ends]
    return [each for each in parts if each.subject and each.object]
