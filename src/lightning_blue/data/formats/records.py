"""One record to one edit request, or several, or to the reason why it cannot be used."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lightning_blue.data.formats.fields import (
    Unusable,
    case_id,
    name_at,
    needed_text,
    prefix,
    text,
    texts,
    type_name,
)
from lightning_blue.data.formats.format import Format
from lightning_blue.data.formats.probes import aliases, neighborhood, portability
from lightning_blue.data.requests import EditRequest, Rejected
from lightning_blue.data.subjects import SLOT, find_subject, spelling_hint
from lightning_blue.support.text import shown


def parse_records(
    record: Any, row: Format, *, source: str, index: int
) -> list[EditRequest | Rejected]:
    """Turn one record into its requests: one, or as many as the record has edits.

    A record with several edits is read as a whole or not at all. Prompts on what follows from all
    of them go with the last, whose premises the others are; case ids then end in the number of the
    edit, from 1.
    """
    edits = record.get(row.edits) if row.edits and isinstance(record, Mapping) else None
    if row.edits is None or not isinstance(edits, list | tuple):
        return [parse_record(record, row, source=source, index=index)]
    shared = {**record, row.edits: None}
    early = {key: value for key, value in shared.items() if key != row.paths["portability"]}
    parts = [{**early, row.edits: edit} for edit in edits[:-1]]
    parts.append({**shared, row.edits: edits[-1] if edits else None})
    parsed = [parse_record(part, row, source=source, index=index) for part in parts]
    refused = next((r for r in parsed if isinstance(r, Rejected)), None)
    if refused or len(parsed) == 1:
        return [refused] if refused else parsed
    requests = [r for r in parsed if isinstance(r, EditRequest)]
    premises = tuple((request.text, request.target_new) for request in requests[:-1])
    requests[-1] = replace(requests[-1], premises=premises)
    return [replace(r, case_id=f"{r.case_id}.{number}") for number, r in enumerate(requests, 1)]


def parse_record(record: Any, row: Format, *, source: str, index: int) -> EditRequest | Rejected:
    """Turn one record with one edit into a request, or say why that is not possible.

    ``source`` says where the record stands, ``index`` is its number from 0 and its case id where
    it has none of its own.
    """
    own_id = str(index)
    try:
        if not isinstance(record, Mapping):
            raise Unusable(
                "wrong type",
                f"the record is {type_name(record)}, not an object with fields",
                "write each record as an object with fields in braces",
            )
        own_id = case_id(record, row, index)
        return _request(row.derive(record) if row.derive else record, row, own_id, source)
    except Unusable as error:
        return Rejected(source, own_id, error.kind, error.reason, error.hint)


def _request(record: Mapping[str, Any], row: Format, case_id: str, source: str) -> EditRequest:
    """Build the request; raises Unusable."""
    subject = needed_text(record, row, "subject")
    prompt = template(needed_text(record, row, "prompt", exact=True), subject)
    target_new = needed_text(record, row, "target_new")
    target_true = text(record, row, "target_true")
    target_prefix = prefix(record, row)
    if target_new == target_true:
        raise Unusable(
            "target is the current object",
            f"the target {shown(target_new)} equals the current object",
            "write another target, or leave the record out",
        )
    return EditRequest(
        case_id=case_id,
        prompt=prompt,
        subject=subject,
        target_new=target_new,
        target_true=target_true,
        paraphrases=texts(record, row, "paraphrases", exact=True),
        neighborhood=neighborhood(record, row, target_prefix),
        generation_prompts=texts(record, row, "generation_prompts", exact=True),
        reference_texts=texts(record, row, "reference_texts"),
        source=source,
        target_prefix=target_prefix,
        aliases=aliases(record, row, target_new),
        portability=portability(record, row, target_prefix),
        relation=name_at(record, row.paths["relation"]) if "relation" in row.paths else "",
    )


def template(prompt: str, subject: str) -> str:
    """Return the prompt with exactly one ``{}``, in the place of its subject.

    The prompt either has it already or names the subject (:func:`find_subject`).
    Raises Unusable if it has several or neither.
    """
    slots = prompt.count(SLOT)
    if slots > 1 or SLOT in subject:
        raise Unusable(
            "several slots",
            f"the prompt {shown(prompt)} with the subject {shown(subject)} has more than one "
            f"{SLOT}",
            f"keep one {SLOT}, in the subject's place",
        )
    if slots == 1:
        return prompt
    start = find_subject(prompt, subject)
    if start is None:
        raise Unusable(
            "subject not in prompt",
            f"the prompt {shown(prompt)} does not hold its subject {shown(subject)}",
            spelling_hint(prompt, subject)
            or f"write {SLOT} in the subject's place, or the subject as the prompt spells it",
        )
    return prompt[:start] + SLOT + prompt[start + len(subject) :]
