"""The almanac: a seeded, invented world of people and facts about them.

Two kinds of people live in it. One fact of each *editable* subject is offered as an edit request.
*Reserved* subjects are never edited: they serve as neighbours (same relation, same object), as
control facts, and as what the held-out text speaks of.
"""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lightning_blue.data.requests import Probe
from lightning_blue.pretrain.almanac_text import (
    FILLERS,
    OPENERS,
    RELATIONS,
    SLOTS,
    SYLLABLES,
    TAILS,
    Relation,
)
from lightning_blue.pretrain.world import KnownFact, Piece, text_of, write_prose

RESERVED_FACTS = 4  # facts of each reserved subject
NEIGHBOUR_PROMPTS = 5
FILLER_SHARE = 0.12  # documents that state no fact
SECOND_FACT_SHARE = 0.4  # editable subjects of whom a second fact is known
HELD_OUT = 3  # wordings of each fact, others for every fact, that training never sees


@dataclass(frozen=True)
class Entry:
    """One fact of the almanac: who, which relation, which object, and its use in editing."""

    subject: str
    relation: Relation
    answer: str
    role: str  # "edit" (may be edited), "second" (same subject, other relation), "reserved"

    @property
    def held_out(self) -> tuple[str, ...]:
        """Wordings of the relation that training never uses for this fact."""
        rng = random.Random(f"held out {self.subject} {self.relation.name}")
        return tuple(rng.sample(self.relation.wordings, HELD_OUT))

    @property
    def wordings(self) -> tuple[str, ...]:
        """Wordings that training uses for this fact."""
        held_out = self.held_out
        return tuple(text for text in self.relation.wordings if text not in held_out)


def invent_name(rng: random.Random) -> str:
    """Invent a first name of two syllables and a surname of two or three.

    >>> len(invent_name(random.Random(1)).split())
    2
    """
    first = "".join(rng.choices(SYLLABLES, k=2))
    last = "".join(rng.choices(SYLLABLES, k=rng.choice((2, 2, 3))))
    return f"{first.capitalize()} {last.capitalize()}"


def invent_names(count: int, rng: random.Random) -> list[str]:
    """Invent ``count`` full names in which no first name and no surname comes twice."""
    names: list[str] = []
    used: set[str] = set()
    while len(names) < count:
        name = invent_name(rng)
        first, last = name.split()
        if not {first, last} & used and first != last:
            used |= {first, last}
            names.append(name)
    return names


def filler_sentence(rng: random.Random) -> str:
    """Fill one of the filler templates with words drawn from its slots."""
    text = rng.choice(FILLERS)
    while "{" in text:
        slot = text[text.index("{") + 1 : text.index("}")]
        text = text.replace("{" + slot + "}", rng.choice(SLOTS[slot]), 1)
    return text


def _deal(subjects: Sequence[str], per_subject: int, rng: random.Random) -> list[tuple[str, int]]:
    """Give each subject ``per_subject`` different relations, each relation equally often."""
    hands: list[tuple[str, int]] = []
    deck: list[int] = []
    for subject in subjects:
        if len(deck) < per_subject:
            order = rng.sample(range(len(RELATIONS)), len(RELATIONS))
            # Leftovers come last in the new order, so that one hand has no relation twice.
            deck += [relation for relation in order if relation not in deck] + deck
        hands += [(subject, relation) for relation in deck[:per_subject]]
        deck = deck[per_subject:]
    return hands


def _with_objects(hands: Sequence[tuple[str, int]], role: str, rng: random.Random) -> list[Entry]:
    """Give each hand an object of its relation, every object equally often."""
    decks: dict[int, list[str]] = defaultdict(list)
    entries = []
    for subject, index in hands:
        relation = RELATIONS[index]
        if not decks[index]:
            decks[index] = rng.sample(relation.objects, len(relation.objects))
        entries.append(Entry(subject, relation, decks[index].pop(), role))
    return entries


def _second_relations(
    hands: Sequence[tuple[str, int]], rng: random.Random
) -> list[tuple[str, int]]:
    """Pick some of the subjects and give each another relation than the one it has."""
    picked = rng.sample(hands, round(len(hands) * SECOND_FACT_SHARE))
    return [
        (subject, (index + rng.randrange(1, len(RELATIONS))) % len(RELATIONS))
        for subject, index in picked
    ]


def make_entries(editable: int, reserved: int, seed: int) -> list[Entry]:
    """Invent the people and their facts, shuffled.

    Args:
        editable: number of subjects with one fact that may be edited.
        reserved: number of subjects that are never edited, four facts each.
        seed: seeds everything.
    """
    rng = random.Random(f"almanac {seed}")
    names = invent_names(editable + reserved, rng)
    hands = _deal(names[:editable], 1, rng)
    entries = _with_objects(hands, "edit", rng)
    entries += _with_objects(_second_relations(hands, rng), "second", rng)
    entries += _with_objects(_deal(names[editable:], RESERVED_FACTS, rng), "reserved", rng)
    rng.shuffle(entries)
    return entries


class Almanac:
    """The invented world; see `World` for what it offers to pretraining.

    Args:
        editable: number of subjects with a fact that may be edited.
        reserved: number of subjects that are never edited.
        seed: seeds the people, the facts and the files.
    """

    def __init__(self, editable: int = 510, reserved: int = 160, seed: int = 0) -> None:
        self.seed = seed
        self.entries = make_entries(editable, reserved, seed)
        self._of_subject: dict[str, list[int]] = defaultdict(list)
        self._reserved: dict[tuple[str, str], list[str]] = defaultdict(list)
        for index, entry in enumerate(self.entries):
            self._of_subject[entry.subject].append(index)
            if entry.role == "reserved":
                self._reserved[entry.relation.name, entry.answer].append(entry.subject)
        self.facts = [self._known(entry) for entry in self.entries]

    def _known(self, entry: Entry) -> KnownFact:
        return KnownFact(
            subject=entry.subject,
            answer=entry.answer,
            trained=tuple(text.format(entry.subject) for text in entry.wordings),
            held_out=tuple(text.format(entry.subject) for text in entry.held_out),
            neighbours=self._neighbours(entry),
        )

    def _neighbours(self, entry: Entry) -> tuple[Probe, ...]:
        """Prompts about reserved subjects of whom the same is true; subjects take turns."""
        rng = random.Random(f"neighbours {self.seed} {entry}")
        others = [
            subject
            for subject in self._reserved[entry.relation.name, entry.answer]
            if subject != entry.subject
        ]
        rng.shuffle(others)
        turns = [others[turn % len(others)] for turn in range(NEIGHBOUR_PROMPTS if others else 0)]
        return tuple(
            Probe(rng.choice(replace(entry, subject=other).wordings).format(other), entry.answer)
            for other in turns
        )

    def _statement(
        self, entry: Entry, rng: random.Random, wording: str | None = None
    ) -> list[Piece]:
        prompt = (wording or rng.choice(entry.wordings)).format(entry.subject)
        tail = rng.choice(TAILS) if rng.random() < 0.2 else "."
        return [Piece(prompt), Piece(f" {entry.answer}", True), Piece(tail)]

    def _biography(self, first: Entry, others: Sequence[Entry], rng: random.Random) -> list[Piece]:
        """State a fact and perhaps more of the same subject, with filler before and between."""
        sentences: list[list[Piece]] = []
        if rng.random() < 0.35:
            sentences.append([Piece(filler_sentence(rng))])
        if rng.random() < 0.3:
            sentences.append([Piece(rng.choice(OPENERS).format(first.subject))])
        more = rng.sample(others, min(len(others), rng.choice((0, 0, 1, 2))))
        for entry in (first, *more):
            sentences.append(self._statement(entry, rng))
            if rng.random() < 0.2:
                sentences.append([Piece(filler_sentence(rng))])
        return _paragraph(sentences)

    def document(self, rng: random.Random, active: int) -> list[Piece]:
        """Write filler, or a biography that states facts among the first ``active`` ones."""
        return self._document(rng, range(active))

    def _document(self, rng: random.Random, allowed: Sequence[int]) -> list[Piece]:
        if rng.random() < FILLER_SHARE:
            count = rng.randint(2, 5)
            return _paragraph([[Piece(filler_sentence(rng))] for _ in range(count)])
        chosen = rng.choice(allowed)
        entry = self.entries[chosen]
        others = [
            self.entries[index]
            for index in self._of_subject[entry.subject]
            if index != chosen and index in allowed
        ]
        return self._biography(entry, others, rng)

    def tokenizer_texts(self, count: int = 12_000) -> Iterator[str]:
        """Yield biographies of people invented on the spot, so that no full name is merged."""
        rng = random.Random(f"tokenizer {self.seed}")
        for _ in range(count):
            relation = rng.choice(RELATIONS)
            entry = Entry(invent_name(rng), relation, rng.choice(relation.objects), "")
            yield text_of(self._biography(entry, (), rng))
        for relation in RELATIONS:
            for word in relation.objects:
                yield from [f"x {word}"] * 100

    def edit_records(self) -> list[dict[str, Any]]:
        """Write every editable fact as an edit request, in the form for people's own facts."""
        edits = [entry for entry in self.entries if entry.role == "edit"]
        return [self._edit_record(entry) for entry in edits]

    def _edit_record(self, entry: Entry) -> dict[str, Any]:
        rng = random.Random(f"edit {self.seed} {entry.subject}")
        relation = entry.relation
        wrong = rng.choice([word for word in relation.objects if word != entry.answer])
        prompt, *spoken = rng.sample(entry.wordings, 5)
        paraphrases = [*rng.sample(entry.held_out, 2), spoken[0]]
        told = Entry(entry.subject, relation, wrong, "")
        openers = [text.format(entry.subject) for text in rng.sample(OPENERS, 5)]
        references = [
            _paragraph([[Piece(opener)], *(self._statement(told, rng, w) for w in wordings)])
            for opener, wordings in zip(openers[3:], (spoken[:2], spoken[2:]), strict=True)
        ]
        return {
            "subject": entry.subject,
            "prompt": prompt,
            "target_new": wrong,
            "target_true": entry.answer,
            "paraphrases": [text.format(entry.subject) for text in paraphrases],
            "neighborhood_prompts": [
                {"prompt": probe.prompt, "answer": probe.answer}
                for probe in self._neighbours(entry)
            ],
            "generation_prompts": openers[:3],
            "reference_texts": [text_of(reference) for reference in references],
        }

    def known_records(self) -> list[dict[str, str]]:
        """Write every fact that is never edited as prompt and true object; ``role`` says why."""
        rng = random.Random(f"known {self.seed}")
        return [
            {
                "subject": entry.subject,
                "prompt": rng.choice(entry.wordings),
                "target_true": entry.answer,
                "role": entry.role,
            }
            for entry in self.entries
            if entry.role != "edit"
        ]

    def write_files(self, folder: Path) -> None:
        """Write ``facts.jsonl``, ``known.jsonl``, ``heldout.txt`` and ``corpus.txt``."""
        _write_lines(folder / "facts.jsonl", self.edit_records())
        _write_lines(folder / "known.jsonl", self.known_records())
        rng = random.Random(f"files {self.seed}")
        reserved = [i for i, entry in enumerate(self.entries) if entry.role == "reserved"]
        write_prose(folder / "heldout.txt", lambda: self._document(rng, reserved), size=30_000)
        total = len(self.entries)
        write_prose(folder / "corpus.txt", lambda: self.document(rng, total), size=250_000)


def _paragraph(sentences: Sequence[Sequence[Piece]]) -> list[Piece]:
    """Put sentences after one another, one space between them."""
    pieces = list(sentences[0])
    for sentence in sentences[1:]:
        pieces += [Piece(f" {sentence[0].text}", sentence[0].is_object), *sentence[1:]]
    return pieces


def _write_lines(path: Path, records: Sequence[dict[str, Any]]) -> None:
    lines = (json.dumps(record, ensure_ascii=False) for record in records)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
