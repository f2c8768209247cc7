"""What a model makes of the facts that are to be edited, before anything is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lightning_blue.data.checks import by_subject, end_with_blank, superseded
from lightning_blue.data.datamodule import SortedOut
from lightning_blue.data.requests import EditRequest, Rejected
from lightning_blue.editing.module import EditModule
from lightning_blue.language_model.chat import markers
from lightning_blue.language_model.joining import joint
from lightning_blue.language_model.tokens import (
    encode_targets,
    encode_with_subject,
    token_texts,
    written_texts,
)
from lightning_blue.metrics.evaluation import evaluate


@dataclass(frozen=True)
class FactSeen:
    """A request as the model reads it.

    Attributes:
        source: where it was read.
        case_id: of the request.
        tokens: the parts that its prompt is cut into.
        lookup: which of them is the subject's last token, where the edit is made.
        prefix: what stands between prompt and object, and
        joined_by: which part of the rule says so.
        target_new, target_true: its objects.
        object_tokens: the parts that the new object is cut into, with the prefix.
        says_now: the model's own greedy continuation.
        probability_new, probability_true: of the objects now, the geometric mean over tokens.
        known_already: whether each token of the new object is the most probable one already.
    """

    source: str
    case_id: str
    tokens: list[str]
    lookup: int
    prefix: str
    joined_by: str
    target_new: str
    target_true: str | None
    object_tokens: list[str]
    says_now: str
    probability_new: float
    probability_true: float | None
    known_already: bool


@dataclass(frozen=True)
class Unusable:
    """A request that cannot be edited.

    Attributes:
        source: where it was read.
        kind: of the reason, e.g. ``contradiction``.
        reason: what is wrong.
        hint: how to mend it.
    """

    source: str
    kind: str
    reason: str
    hint: str


@dataclass(frozen=True)
class Companions:
    """Requests of one batch that are about one subject, which one key cannot tell apart."""

    subject: str
    batch: int
    sources: list[str]


@dataclass(frozen=True)
class Returning:
    """Requests of several batches, on other prompts, that are about one subject."""

    subject: str
    batches: list[int]
    sources: list[str]


@dataclass(frozen=True)
class Requests:
    """What can be said of all requests without running the model.

    Attributes:
        total: records in the source.
        usable: requests that will be edited.
        unusable: those that will not, all of them.
        superseded: where requests were read whose prompt a later batch wants another object after.
        companions: see `Companions`.
        returning: see `Returning`.
        blanks: where requests were read whose prompt ends with a blank.
    """

    total: int
    usable: int
    unusable: list[Unusable]
    superseded: list[str]
    companions: list[Companions]
    returning: list[Returning]
    blanks: list[str]


def sort_requests(found: SortedOut, batch_size: int) -> Requests:
    """Say which requests are unusable, contradict each other or share a subject.

    Args:
        found: from `EditDataModule.sort_out`.
        batch_size: requests that are edited together.
    """
    chosen = found.chosen
    companions = []
    for batch, first in enumerate(range(0, len(chosen), batch_size)):
        part = chosen[first : first + batch_size]
        for subject, places in by_subject(part).items():
            if len(places) > 1:
                companions.append(Companions(subject, batch, [part[i].place for i in places]))
    return Requests(
        total=found.total,
        usable=len(chosen),
        unusable=[_unusable(each) for each in found.rejected],
        superseded=[chosen[place].place for place in superseded(chosen)],
        companions=companions,
        returning=_returning(chosen, batch_size),
        blanks=[request.place for request in end_with_blank(chosen)],
    )


def _returning(chosen: Sequence[EditRequest], batch_size: int) -> list[Returning]:
    """Return the subjects that a later batch edits again on another prompt."""
    found = []
    for subject, places in by_subject(chosen).items():
        batches = sorted({place // batch_size for place in places})
        if len(batches) > 1 and len({chosen[place].text for place in places}) > 1:
            found.append(Returning(subject, batches, [chosen[place].place for place in places]))
    return found


def see(module: EditModule, requests: Sequence[EditRequest], tokens: int) -> list[FactSeen]:
    """Ask the model about requests, and show how it reads them.

    Args:
        module: the model, unedited.
        requests: n usable ones.
        tokens: of the continuation.
    """
    if not requests:
        return []
    model, tokenizer = module.model, module.tokenizer
    known = markers(tokenizer)
    prompts = encode_with_subject(
        tokenizer, [r.prompt for r in requests], [r.subject for r in requests]
    )
    joints = [joint(r.text, r.target_prefix, known) for r in requests]
    objects = encode_targets(
        tokenizer, [r.target_new for r in requests], [each.prefix for each in joints]
    )
    outcomes = evaluate(
        model,
        tokenizer,
        [_alone(request) for request in requests],
        generate=False,
        continuation_tokens=tokens,
    ).outcomes
    return [
        FactSeen(
            source=request.source,
            case_id=request.case_id,
            tokens=token_texts(tokenizer, request.text),
            lookup=prompt.lookup,
            prefix=joined.prefix,
            joined_by=joined.reason,
            target_new=request.target_new,
            target_true=request.target_true,
            object_tokens=written_texts(tokenizer, prompt.ids, ids),
            says_now=outcome.continuation,
            probability_new=outcome.probability_new,
            probability_true=outcome.probability_true,
            known_already=all(outcome.correct),
        )
        for request, prompt, joined, ids, outcome in zip(
            requests, prompts, joints, objects, outcomes, strict=True
        )
    ]


def _alone(request: EditRequest) -> EditRequest:
    """Return a request without the prompts that probe it."""
    return EditRequest(
        request.case_id,
        request.prompt,
        request.subject,
        request.target_new,
        request.target_true,
        target_prefix=request.target_prefix,
    )


def _unusable(rejected: Rejected) -> Unusable:
    return Unusable(rejected.source, rejected.kind, rejected.reason, rejected.hint)
