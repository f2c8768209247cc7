"""Which requests a run can use: token counts, duplicates, contradictions, and what to do then."""

from __future__ import annotations

import random
import sys
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from lightning_blue.data.requests import EditRequest, Probe, Rejected
from lightning_blue.language_model.chat import Markers, markers
from lightning_blue.language_model.joining import joint
from lightning_blue.language_model.tokens import (
    Encoded,
    encode_prompts,
    encode_targets,
    encode_with_subject,
)
from lightning_blue.language_model.vocabulary import HINT, Vocabulary
from lightning_blue.support.errors import InputError
from lightning_blue.support.text import counted, shown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NAMED_AT_MOST = 5
DUPLICATE, CONTRADICTION = "duplicate", "contradiction"
POLICIES = ("stop", "skip")
T = TypeVar("T", bound=Hashable)


def check_tokens(
    requests: Sequence[EditRequest],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    contexts_length: int = 0,
    embeddings: int | None = None,
) -> tuple[list[EditRequest], list[Rejected]]:
    """Sort out requests that the model cannot read.

    Those are too long, have an object without tokens, or a token that the model has no embedding
    of. Each prompt of a request (its own with ``contexts_length`` tokens of context before it, the
    paraphrases, neighbours, generation and portability prompts) has to fit into ``max_length``
    positions together with the longest object.

    Args:
        requests: in any order.
        tokenizer: of the model.
        max_length: of the model in tokens; None checks no lengths.
        contexts_length: tokens of the longest context.
        embeddings: rows of the model's embedding; None takes every token for known.
    """
    known = markers(tokenizer)
    objects = _encoded(
        [_objects(request, known) for request in requests],
        lambda pairs: encode_targets(tokenizer, *map(list, zip(*pairs, strict=True))),
    )
    probes = _encoded(
        [_probe_texts(request) for request in requests],
        lambda texts: encode_prompts(tokenizer, texts),
    )
    prompts = _prompts(requests, tokenizer)
    known_tokens = Vocabulary(tokenizer, embeddings or sys.maxsize)
    usable: list[EditRequest] = []
    rejected: list[Rejected] = []
    for request, sizes, texts, prompt in zip(requests, objects, probes, prompts, strict=True):
        if isinstance(prompt, Rejected):
            rejected.append(prompt)
            continue
        texts = {request.text: prompt.ids} | texts
        lengths = {text: len(ids) for text, ids in texts.items()}
        lengths[request.text] += contexts_length
        fault = (
            _no_tokens(request, sizes)
            or _without_embedding(request, [*texts.values(), *sizes.values()], known_tokens)
            or _too_long(request, lengths, max(map(len, sizes.values())), max_length)
        )
        if fault:
            rejected.append(fault)
        else:
            usable.append(request)
    return usable, rejected


def take_distinct(
    requests: Sequence[EditRequest], count: int | None = None, batch_size: int | None = None
) -> tuple[list[EditRequest], list[EditRequest], list[Rejected]]:
    """Take the first ``count`` requests (None: all) that do not clash; of two that do, the later.

    A request that wants another object after the same text as an earlier one replaces the earlier
    edit if it is in a later batch; both are taken. Inside a batch only one can be true: the later
    one takes the place of the earlier. A request that repeats the newest one on its text is left
    out.

    Args:
        requests: in the order of the edits.
        count: how many to take.
        batch_size: requests in a batch; None: all are in one.

    Returns:
        Those taken, the requests after the last of them, and those left out.
    """
    taken: list[EditRequest] = []
    newest: dict[str, int] = {}  # text -> place of the newest request on it
    left_out: list[Rejected] = []
    for position, request in enumerate(requests):
        if count is not None and len(taken) == count:
            return taken, list(requests[position:]), left_out
        place = newest.get(request.text)
        if place is not None and taken[place].target_new == request.target_new:
            left_out.append(_duplicate(request, taken[place]))
        elif place is not None and _same_batch(place, len(taken), batch_size):
            left_out.append(_contradicted(taken[place], request))
            taken[place] = request
        else:
            newest[request.text] = len(taken)
            taken.append(request)
    return taken, [], left_out


def superseded(requests: Sequence[EditRequest]) -> list[int]:
    """Return the places of requests whose text a later one wants another object after."""
    newest = {request.text: place for place, request in enumerate(requests)}
    return [place for place, request in enumerate(requests) if newest[request.text] != place]


def without_unmet_premises(
    requests: Sequence[EditRequest], applied: Sequence[EditRequest]
) -> list[EditRequest]:
    """Return requests without portability prompts that count on an edit which is not in force.

    Args:
        requests: in any order.
        applied: all edits until then, in their order; on a prompt the newest is in force.
    """
    in_force = {request.shown: request.target_new for request in applied}
    return [
        request
        if all(in_force.get(prompt) == target for prompt, target in request.premises)
        else replace(request, portability=())
        for request in requests
    ]


def shuffled(requests: Sequence[EditRequest], seed: int) -> list[EditRequest]:
    """Return the requests in a random order, which ``seed`` decides.

    Requests on the same text keep their places, since of them the last one wins.
    """
    often = Counter(request.text for request in requests)
    free = [place for place, request in enumerate(requests) if often[request.text] == 1]
    order = list(requests)
    for place, other in zip(free, random.Random(seed).sample(free, len(free)), strict=True):
        order[place] = requests[other]
    return order


def end_with_blank(requests: Sequence[EditRequest]) -> list[EditRequest]:
    """Return requests whose prompt ends with a blank, which may be meant or a slip."""
    return [r for r in requests if r.target_prefix is None and r.text.endswith(" ")]


def by_subject(requests: Sequence[EditRequest]) -> dict[str, list[int]]:
    """Return the places of the requests on each subject, in order."""
    places: dict[str, list[int]] = {}
    for place, request in enumerate(requests):
        places.setdefault(request.subject, []).append(place)
    return places


def _same_batch(first: int, second: int, batch_size: int | None) -> bool:
    return batch_size is None or first // batch_size == second // batch_size


def _duplicate(request: EditRequest, earlier: EditRequest) -> Rejected:
    """Say that a request wants what an earlier one wants."""
    wanted = f"{shown(request.text)} -> {shown(request.target_new)}"
    return _rejected(
        request, DUPLICATE, f"{wanted} repeats {earlier.place}", "remove one of the two"
    )


def _contradicted(request: EditRequest, later: EditRequest) -> Rejected:
    """Say that a later request of the same batch wants another object."""
    wanted = f"{shown(request.text)} -> {shown(request.target_new)}"
    return _rejected(
        request,
        CONTRADICTION,
        f"{wanted} is contradicted by {later.place}, which wants {shown(later.target_new)}",
        "keep one of the two, or put them into different batches: the later one then wins",
    )


def apply_policy(rejected: Sequence[Rejected], total: int, on_unusable: str) -> None:
    """Stop at requests that cannot be used, unless the policy is to skip them.

    Raises InputError naming up to five of them, how many there are by kind, and how to go on.
    """
    if on_unusable not in POLICIES:
        raise InputError(
            f"There is no policy {on_unusable!r} for requests that cannot be used",
            where="--data.on_unusable",
            hint=f"choose one of: {', '.join(POLICIES)}",
        )
    if not rejected or on_unusable == "skip":
        return
    kinds = ", ".join(f"{count} {kind}" for kind, count in count_by_kind(rejected).items())
    raise InputError(
        f"{len(rejected)} of {counted(total, 'request')} cannot be used ({kinds})",
        where=_listing([str(fault) for fault in rejected[:NAMED_AT_MOST]], len(rejected)),
        hint="correct them, or go on without them: --data.on_unusable=skip",
    )


def count_by_kind(rejected: Iterable[Rejected]) -> dict[str, int]:
    """How many requests each kind of reason took, the most frequent first."""
    return dict(Counter(fault.kind for fault in rejected).most_common())


def pick_control_facts(
    candidates: Iterable[EditRequest], edited: Iterable[EditRequest], count: int
) -> list[Probe]:
    """Take the first ``count`` known facts about subjects that no edit touches, in order.

    A candidate without ``target_true`` cannot serve, nor one whose prompt was taken already.
    """
    subjects = {request.subject for request in edited}
    picked: dict[str, Probe] = {}
    for request in candidates:
        if len(picked) == count:
            break
        if request.target_true is not None and request.subject not in subjects:
            fact = Probe(request.text, request.target_true, request.target_prefix)
            picked.setdefault(request.text, fact)
    return list(picked.values())


def _objects(request: EditRequest, known: Markers) -> list[tuple[str, str]]:
    """Every object that is scored for a request, with what stands before it."""
    new, true, given = request.target_new, request.target_true, request.target_prefix
    own = [joint(prompt, given, known).prefix for prompt in (request.text, *request.paraphrases)]
    pairs = [(target, prefix) for prefix in own for target in (new, true) if target]
    for probe in request.neighborhood:
        prefix = joint(probe.prompt, probe.target_prefix, known).prefix
        pairs += [(probe.answer, prefix), (new, prefix)]
    return list(dict.fromkeys(pairs))


def _probe_texts(request: EditRequest) -> list[str]:
    """Every prompt of a request but its own."""
    probes = [probe.prompt for probe in (*request.neighborhood, *request.portability)]
    return [*request.paraphrases, *probes, *request.generation_prompts]


def _encoded(
    groups: Sequence[Sequence[T]], encode: Callable[[list[T]], Sequence[list[int]]]
) -> list[dict[T, list[int]]]:
    """Token ids of each text, group by group; every distinct text is encoded once, in one call."""
    texts = list(dict.fromkeys(text for group in groups for text in group))
    ids = dict(zip(texts, encode(texts) if texts else [], strict=True))
    return [{text: ids[text] for text in group} for group in groups]


def _prompts(
    requests: Sequence[EditRequest], tokenizer: PreTrainedTokenizerBase
) -> list[Encoded | Rejected]:
    """Encode each request's own prompt; one whose subject has no tokens is rejected."""

    def encode(some: Sequence[EditRequest]) -> list[Encoded]:
        return encode_with_subject(tokenizer, [r.prompt for r in some], [r.subject for r in some])

    try:
        return [*encode(requests)]  # in one call, unless one of them cannot be encoded
    except InputError:
        if not tokenizer.is_fast:
            raise  # it can encode none
    prompts: list[Encoded | Rejected] = []
    for request in requests:
        try:
            prompts += encode([request])
        except InputError:
            reason = f"the tokenizer does not encode the subject {shown(request.subject)}"
            hint = "write it in a script that the model's tokenizer knows"
            prompts.append(_rejected(request, "subject without tokens", reason, hint))
    return prompts


def _no_tokens(
    request: EditRequest, objects: Mapping[tuple[str, str], Sequence[int]]
) -> Rejected | None:
    """Reject a request with an object that the tokenizer spells with no token."""
    empty = next((text for (text, _), ids in objects.items() if not ids), None)
    if empty is None:
        return None
    return _rejected(
        request,
        "object without tokens",
        f"the tokenizer does not encode {shown(empty)}",
        "write it in a script that the model's tokenizer knows",
    )


def _without_embedding(
    request: EditRequest, sequences: Iterable[Sequence[int]], known: Vocabulary
) -> Rejected | None:
    """Reject a request with a token that the model has no embedding of."""
    fault = next(filter(None, map(known.fault, sequences)), None)
    return None if fault is None else _rejected(request, "token without embedding", fault, HINT)


def _too_long(
    request: EditRequest, lengths: dict[str, int], target: int, max_length: int | None
) -> Rejected | None:
    """Reject a request with a prompt that does not fit with the longest object, in tokens."""
    text, length = max(lengths.items(), key=lambda item: item[1])
    if max_length is None or length + target <= max_length:
        return None
    return _rejected(
        request,
        "too long",
        f"{text[:60]!r} and its object take {length} + {target} tokens, the model reads "
        f"{max_length}",
        "shorten the prompt or the subject",
    )


def _rejected(request: EditRequest, kind: str, reason: str, hint: str) -> Rejected:
    """Reject a request that was read."""
    return Rejected(request.source, request.case_id, kind, reason, hint)


def _listing(lines: Sequence[str], total: int) -> str:
    """Lines below each other, and how many more there are."""
    more = [f"and {total - len(lines)} more"] if total > len(lines) else []
    return "\n         ".join([*lines, *more])
