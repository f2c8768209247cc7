"""A world read from a CounterFact-like file: real facts, a few prompts each."""

from __future__ import annotations

import logging
import random
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

from lightning_blue.data import read_requests
from lightning_blue.data.requests import EditRequest, Probe
from lightning_blue.pretrain.world import KnownFact, Piece, write_prose
from lightning_blue.support.errors import InputError

log = logging.getLogger(__name__)

LEAD_IN_SHARE = 0.25  # documents that begin with a sentence that has nothing to do with the fact
HELD_OUT_LEAD_INS = 0.1  # lead-ins kept for the held-out text


class RecordsWorld:
    """Facts of a file, each stated by its prompt, its paraphrases and its neighbours' prompts.

    Args:
        facts: the facts to learn; see `open_records`.
        lead_ins: sentences of ordinary text that may stand before a statement.
        seed: seeds the files.
    """

    def __init__(
        self, facts: Sequence[KnownFact], lead_ins: Sequence[str] = (), seed: int = 0
    ) -> None:
        self.facts = facts
        kept = round(len(lead_ins) * HELD_OUT_LEAD_INS)
        self._lead_ins, self._held_out_lead_ins = lead_ins[kept:], lead_ins[:kept]
        self.seed = seed

    def document(self, rng: random.Random, active: int) -> list[Piece]:
        """State one of the first ``active`` facts, or the same of one of its neighbours."""
        fact = self.facts[rng.randrange(active)]
        if fact.neighbours and rng.random() < 0.35:
            return self._statement(rng.choice(fact.neighbours), self._lead_ins, rng)
        return self._statement(Probe(rng.choice(fact.trained), fact.answer), self._lead_ins, rng)

    def _statement(self, probe: Probe, lead_ins: Sequence[str], rng: random.Random) -> list[Piece]:
        pieces = [Piece(probe.prompt), Piece(f" {probe.answer}", True), Piece(".")]
        if lead_ins and rng.random() < LEAD_IN_SHARE:
            pieces[0] = Piece(f"{rng.choice(lead_ins)} {probe.prompt}")
        return pieces

    def tokenizer_texts(self) -> Iterator[str]:
        """Yield every prompt with its answer, and the answers often enough to become tokens."""
        for fact in self.facts:
            probes = [Probe(text, fact.answer) for text in (*fact.trained, *fact.held_out)]
            for probe in (*probes, *fact.neighbours):
                yield f"{probe.prompt} {probe.answer}."
                yield f"x {probe.answer}"
        yield from self._lead_ins

    def write_files(self, folder: Path) -> None:
        """Write ``corpus.txt`` and, of subjects that are no fact's own, ``heldout.txt``."""
        rng = random.Random(f"files {self.seed}")
        total = len(self.facts)
        write_prose(folder / "corpus.txt", lambda: self.document(rng, total), size=250_000)
        subjects = {fact.subject for fact in self.facts}
        others = [
            probe
            for fact in self.facts
            for probe in fact.neighbours
            if not any(subject in probe.prompt for subject in subjects)
        ]
        if others:
            write_prose(
                folder / "heldout.txt",
                lambda: self._statement(rng.choice(others), self._held_out_lead_ins, rng),
                size=30_000,
            )


def open_records(
    path: str | Path, count: int | None = None, seed: int = 0, held_out: float = 0.2
) -> RecordsWorld:
    """Read a file of facts in any form that the project edits from, if true objects are given.

    Args:
        path: a file as in `lightning_blue.data.read_requests`.
        count: take the first ``count`` records; all without a number.
        seed: seeds which paraphrases are held out, and what the world writes.
        held_out: share of paraphrases never used for training.

    Raises:
        InputError: the file is missing, malformed or too short, or a record cannot be used.
    """
    requests, rejected = read_requests(path)
    if rejected:
        first = rejected[0]
        raise InputError(
            f"{len(rejected)} records cannot be used; the first: {first.reason}",
            where=first.source,
            hint=first.hint,
        )
    if count is not None and not 0 < count <= len(requests):
        raise InputError(
            f"{count} facts wanted, {len(requests)} available",
            where=str(path),
            hint="set data.facts to a number from 1 up to that",
        )
    rng = random.Random(f"records {seed}")
    facts = [_known_fact(request, rng, held_out) for request in requests[:count]]
    _warn_of_contradictions(facts)
    lead_ins = list(dict.fromkeys(_lead_ins(requests[len(facts) :])))
    rng.shuffle(lead_ins)
    return RecordsWorld(facts, lead_ins, seed)


def _known_fact(request: EditRequest, rng: random.Random, held_out: float) -> KnownFact:
    """Turn a request around: what is to be learned is the object that it has now."""
    if request.target_true is None:
        raise InputError(
            "a fact to learn needs its true object",
            where=request.source,
            hint="give target_true (ground_truth in the flat form)",
        )
    hidden = [text for text in request.paraphrases if rng.random() < held_out]
    hidden = [text for text in hidden if text != request.text]
    shown = [text for text in request.paraphrases if text not in hidden]
    return KnownFact(
        subject=request.subject,
        answer=request.target_true,
        trained=(request.text, *shown),
        held_out=tuple(hidden),
        neighbours=request.neighborhood,
    )


def _lead_ins(requests: Sequence[EditRequest]) -> Iterator[str]:
    """Whole sentences that stand before the subject in paraphrases."""
    for request in requests:
        for paraphrase in request.paraphrases:
            before, subject, _ = paraphrase.partition(request.subject)
            match = re.match(r"(?s).{20,}[.!?](?=\s|$)", before)
            if subject and match:
                yield " ".join(match.group().split())


def _warn_of_contradictions(facts: Sequence[KnownFact]) -> None:
    """No model can know two answers to one prompt: say how many prompts have two."""
    answers: dict[str, set[str]] = defaultdict(set)
    for fact in facts:
        for prompt in (*fact.trained, *fact.held_out):
            answers[prompt].add(fact.answer)
        for probe in fact.neighbours:
            answers[probe.prompt].add(probe.answer)
    doubtful = [prompt for prompt, known in answers.items() if len(known) > 1]
    if doubtful:
        log.warning(
            "%d prompts have more than one answer in the file, the first: %r",
            len(doubtful),
            doubtful[0],
        )
