"""The data formats: records, as files hold them, turned into edit requests. Pure functions.

A format is a row of data: where in a record each field of an edit request stands. Prompts and
``target_prefix`` are taken to the letter; of other fields the white space around them is no part.
Fields that are not given may be absent, null or, if optional, blank.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from lightning_blue.data.requests import EditRequest, Probe, Rejected
from lightning_blue.data.subjects import SLOT, find_subject, spelling_hint
from lightning_blue.support.errors import InputError
from lightning_blue.support.text import no_text, shown


@dataclass(frozen=True)
class Format:
    """Where a format keeps the fields of an edit request.

    ``required_columns``: those by which a file of this format is known. ``paths``: field to place
    in the record, dots leading into objects and lists. ``needed``: fields without which a record
    cannot be used. ``otherwise``: where a field stands in a record that lacks it at its place in
    ``paths``. ``absent``: columns that no record of a file may have for it to be known as this.
    ``unused``: columns that the format has and no edit needs.
    ``neighbor_ending`` closes each neighbourhood prompt that does not end with it already.
    """

    name: str
    required_columns: tuple[str, ...]
    paths: Mapping[str, str]
    needed: tuple[str, ...] = ("subject", "prompt", "target_new")
    otherwise: Mapping[str, str] = field(default_factory=dict)
    absent: frozenset[str] = frozenset()
    unused: frozenset[str] = frozenset()
    neighbor_ending: str = ""

    def columns(self) -> set[str]:
        """The top-level columns that the format knows."""
        places = [*self.paths.values(), *self.otherwise.values()]
        return {path.partition(".")[0] for path in places} | self.unused


COUNTERFACT = Format(
    name="counterfact",
    required_columns=("requested_rewrite",),
    paths=MappingProxyType(
        {
            "case_id": "case_id",
            "subject": "requested_rewrite.subject",
            "prompt": "requested_rewrite.prompt",
            "target_new": "requested_rewrite.target_new.str",
            "target_true": "requested_rewrite.target_true.str",
            "relation": "requested_rewrite.relation_id",
            "paraphrases": "paraphrase_prompts",
            "neighborhood_prompts": "neighborhood_prompts",
            "neighborhood_answer": "requested_rewrite.target_true.str",
            "generation_prompts": "generation_prompts",
        }
    ),
    needed=("subject", "prompt", "target_new", "target_true"),
    unused=frozenset({"pararel_idx", "attribute_prompts"}),
)
ZSRE = Format(
    name="zsre",
    required_columns=("subject", "src", "answers"),
    paths=MappingProxyType(
        {
            "case_id": "case_id",
            "subject": "subject",
            "prompt": "src",
            "target_new": "answers.0",
            "paraphrases": "rephrase",
            "neighborhood_prompts": "loc",
            "neighborhood_answer": "loc_ans",
            "aliases": "answers",  # all of them; the first is the target
        }
    ),
    otherwise=MappingProxyType({"target_new": "alt"}),
    unused=frozenset({"pred", "cond"}),
    neighbor_ending="?",
)
# The same files, edited to the counterfactual answer, as MEND and EasyEdit do; ``answers`` is what
# is true. Told by its columns only where a file has no ``answers`` at all.
ZSRE_ALT = Format(
    name="zsre-alt",
    required_columns=("subject", "src", "alt"),
    paths=MappingProxyType(
        {
            **{field: path for field, path in ZSRE.paths.items() if field != "aliases"},
            "target_new": "alt",
            "target_true": "answers.0",
        },
    ),
    absent=frozenset({"answers"}),
    unused=frozenset({"pred", "cond"}),
    neighbor_ending="?",
)
FLAT_COUNTERFACT = Format(
    name="counterfact-flat",
    required_columns=("subject", "prompt", "target_new", "ground_truth"),
    paths=MappingProxyType(
        {
            "case_id": "case_id",
            "subject": "subject",
            "prompt": "prompt",
            "target_new": "target_new",
            "target_true": "ground_truth",
            "paraphrases": "rephrase_prompt",
            "neighborhood_prompts": "locality_prompt",
            "neighborhood_answer": "locality_ground_truth",
        }
    ),
    needed=("subject", "prompt", "target_new", "target_true"),
)
FACTS = Format(
    name="facts",
    required_columns=("subject", "prompt", "target_new"),
    paths=MappingProxyType(
        {
            "case_id": "case_id",
            "subject": "subject",
            "prompt": "prompt",
            "target_new": "target_new",
            "target_true": "target_true",
            "paraphrases": "paraphrases",
            "neighborhood_prompts": "neighborhood_prompts",
            "neighborhood_answer": "target_true",
            "generation_prompts": "generation_prompts",
            "reference_texts": "reference_texts",
            "target_prefix": "target_prefix",
            "aliases": "aliases",
            "portability": "portability",
            "relation": "relation",
        }
    ),
    unused=frozenset({"neighbourhood_prompts"}),  # read as its other spelling
)
FORMATS = MappingProxyType(
    {row.name: row for row in (COUNTERFACT, ZSRE, ZSRE_ALT, FLAT_COUNTERFACT, FACTS)}
)


class Unusable(Exception):
    """One record that cannot become a request; becomes a :class:`Rejected`."""

    def __init__(self, kind: str, reason: str, hint: str) -> None:
        super().__init__(reason)
        self.kind, self.reason, self.hint = kind, reason, hint


def choose_format(name: str, first: Iterable[str], columns: Sequence[str], *, where: str) -> Format:
    """Return the format called ``name``, or for ``auto`` the one that the columns tell.

    ``first`` holds the columns of the first record, ``columns`` those of all records: the first
    record decides, and all together where it lacks something.

    Raises InputError for an unknown name and for columns that fit no format.
    """
    if name == "auto":
        for seen in (set(first), set(columns)):
            for row in FORMATS.values():
                if seen.issuperset(row.required_columns) and row.absent.isdisjoint(columns):
                    return row
        raise _unknown_columns(columns, FACTS, where)
    require_format(name)
    if not set(columns).issuperset(FORMATS[name].required_columns):
        raise _unknown_columns(columns, FORMATS[name], where)
    return FORMATS[name]


def require_format(name: str) -> None:
    """Raise InputError if there is no format of this name, and it is not ``auto``."""
    if name != "auto" and name not in FORMATS:
        raise InputError(
            f"There is no data format {name!r}",
            where="data.format",
            hint=f"choose one of: auto, {', '.join(FORMATS)}",
        )


def _unknown_columns(columns: Sequence[str], wanted: Format, where: str) -> InputError:
    """The error for a file whose columns do not fit the format ``wanted``."""
    has = ", ".join(columns) or "none"
    hints = [
        f"rename {column!r} to {near[0]!r}"
        for column in columns
        if column not in wanted.columns()
        and (near := difflib.get_close_matches(column, wanted.required_columns, n=1, cutoff=0.7))
    ]
    if any(sign in column for column in columns for sign in ";\t"):
        hints.append("separate the columns by commas")
    hints = hints or [f"formats known: {', '.join(FORMATS)}; --data.format forces one"]
    return InputError(
        f"The data has columns {has}; needs {', '.join(wanted.required_columns)}",
        where=where,
        hint="; ".join(hints),
    )


def columns_not_used(columns: Iterable[str], row: Format) -> list[str]:
    """Describe the columns that the format does not read, with the nearest one that it does."""
    notes = []
    for column in columns:
        if column not in row.columns():
            near = difflib.get_close_matches(column, sorted(row.columns()), n=1, cutoff=0.75)
            notes.append(f"{column!r}" + (f" (did you mean {near[0]!r}?)" if near else ""))
    return notes


def parse_record(record: Any, row: Format, *, source: str, index: int) -> EditRequest | Rejected:
    """Turn one record into a request, or say why that is not possible.

    ``source`` says where the record stands, ``index`` is its number from 0 and its case id where
    it has none of its own.
    """
    case_id = str(index)
    try:
        if not isinstance(record, Mapping):
            raise Unusable(
                "wrong type",
                f"the record is {_type_name(record)}, not an object with fields",
                "write each record as an object with fields in braces",
            )
        case_id = _case_id(record, row, index)
        return _request(_unify_spelling(record, row), row, case_id, source)
    except Unusable as error:
        return Rejected(source, case_id, error.kind, error.reason, error.hint)


def _request(record: Mapping[str, Any], row: Format, case_id: str, source: str) -> EditRequest:
    """Build the request; raises Unusable."""
    subject = _needed_text(record, row, "subject")
    prompt = template(_needed_text(record, row, "prompt", exact=True), subject)
    target_new = _needed_text(record, row, "target_new")
    target_true = _text(record, row, "target_true")
    target_prefix = _prefix(record, row)
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
        paraphrases=_texts(record, row, "paraphrases", exact=True),
        neighborhood=_neighborhood(record, row, target_prefix),
        generation_prompts=_texts(record, row, "generation_prompts", exact=True),
        reference_texts=_texts(record, row, "reference_texts"),
        source=source,
        target_prefix=target_prefix,
        aliases=_aliases(record, row, target_new),
        portability=_portability(record, row, target_prefix),
        relation=_name(record, row.paths["relation"]) if "relation" in row.paths else "",
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


def _case_id(record: Mapping[str, Any], row: Format, index: int) -> str:
    """The record's own case id, or its number."""
    return _name(record, row.paths["case_id"]) or str(index)


def _name(record: Mapping[str, Any], path: str) -> str:
    """What a record calls something, by a text or a number; empty where it does not."""
    value = _at(record, path)
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise _wrong_type(path, value, "a number or a string")
    try:
        text = str(value)
    except ValueError:  # a number of thousands of digits
        raise _wrong_type(path, value, "a shorter number") from None
    _require_text(text, path)
    return text.strip()


def _unify_spelling(record: Mapping[str, Any], row: Format) -> Mapping[str, Any]:
    """Read people's ``neighbourhood_prompts`` as ``neighborhood_prompts``."""
    british, american = "neighbourhood_prompts", "neighborhood_prompts"
    if row is not FACTS or not record.get(british):
        return record
    if record.get(american):
        raise Unusable(
            "wrong type",
            f"the record has both {american} and {british}",
            "keep one of the two spellings",
        )
    return {**record, american: record[british]}


def _at(record: Any, path: str) -> Any:
    """The value at a dotted path, or None where the path ends early."""
    for part in path.split("."):
        if isinstance(record, Mapping):
            record = record.get(part)
        elif isinstance(record, list) and part.isdigit():
            record = record[int(part)] if int(part) < len(record) else None
        elif record is not None:
            wanted = "a list of strings" if part.isdigit() else f"an object with {part!r}"
            raise _wrong_type(path, record, wanted)
    return record


def _text(record: Mapping[str, Any], row: Format, field: str) -> str | None:
    """An optional text without the white space around it; blank counts as not given."""
    if field in row.needed:
        return _needed_text(record, row, field)
    path = row.paths.get(field)
    value = _at(record, path) if path else None
    if value is None or path is None:
        return None
    return _string(value, path) or None


def _needed_text(record: Mapping[str, Any], row: Format, field: str, *, exact: bool = False) -> str:
    """A text that has to be there and not blank."""
    path = row.paths[field]
    value = _at(record, path)
    if value is None and field in row.otherwise:
        instead = _at(record, row.otherwise[field])
        path, value = (path, None) if instead is None else (row.otherwise[field], instead)
    if value is None:
        raise Unusable("missing field", f"the field {path!r} is missing", f"add {path!r}")
    text = _string(value, path)
    if not text:
        kind = "empty target" if field == "target_new" else "empty field"
        raise Unusable(kind, f"the field {path!r} is empty", f"write something in {path!r}")
    return str(value) if exact else text


def _prefix(record: Mapping[str, Any], row: Format) -> str | None:
    """What the record says to stand between its prompts and objects, to the letter."""
    path = row.paths.get("target_prefix")
    value = None if path is None else _at(record, path)
    if value is not None and not isinstance(value, str):
        raise _wrong_type(str(path), value, "a string")
    return value


def _texts(
    record: Mapping[str, Any], row: Format, field: str, *, exact: bool = False
) -> tuple[str, ...]:
    """An optional list of texts; a single text counts as a list of one."""
    path = row.paths.get(field)
    items = [] if path is None else _items(record, path)
    return tuple(_filled(item, str(path), exact=exact) for item in items)


def _neighborhood(
    record: Mapping[str, Any], row: Format, target_prefix: str | None
) -> tuple[Probe, ...]:
    """The neighbourhood prompts, each with its answer."""
    path = row.paths["neighborhood_prompts"]
    items = _items(record, path)
    if not items:
        return ()
    answer = _text(record, row, "neighborhood_answer")
    return tuple(_probe(item, answer, row, target_prefix) for item in items)


def _aliases(record: Mapping[str, Any], row: Format, target_new: str) -> tuple[str, ...]:
    """Other names of the target: those in a list that begins with it, or in a list of their own."""
    path = row.paths.get("aliases")
    if path is None:
        return ()
    if path != "aliases":  # the list of all answers, of which the target is the first
        names = [item.strip() for item in _items(record, path) if _is_text(item)]
        names = names if names[:1] == [target_new] else []
    else:
        names = [_filled(item, path) for item in _items(record, path)]
    return tuple(name for name in dict.fromkeys(names) if name != target_new)


def _is_text(item: Any) -> bool:
    return isinstance(item, str) and bool(item.strip()) and no_text(item) is None


def _portability(
    record: Mapping[str, Any], row: Format, target_prefix: str | None
) -> tuple[Probe, ...]:
    """Prompts on what follows from the edit, each an object with its answer."""
    path = row.paths.get("portability")
    probes = []
    for item in [] if path is None else _items(record, path):
        if not isinstance(item, Mapping) or not {"prompt", "answer"} <= item.keys():
            raise _wrong_type(str(path), item, 'a list of objects {"prompt": ..., "answer": ...}')
        prompt = _filled(item["prompt"], f"{path}.prompt", exact=True)
        probes.append(Probe(prompt, _filled(item["answer"], f"{path}.answer"), target_prefix))
    return tuple(probes)


def _probe(item: Any, answer: str | None, row: Format, target_prefix: str | None) -> Probe:
    """One neighbourhood prompt: a text, or an object with a prompt and an answer."""
    path = row.paths["neighborhood_prompts"]
    prompt = item
    if isinstance(item, Mapping):
        prompt, given = item.get("prompt"), item.get("answer")
        answer = None if given is None else _filled(given, f"{path}.answer")
    prompt = _filled(prompt, path, exact=not row.neighbor_ending)
    if answer is None:
        source = row.paths["neighborhood_answer"]
        raise Unusable(
            "missing field",
            f"the neighbourhood prompt {shown(prompt)} has no answer",
            f'give {source!r}, or write it as {{"prompt": ..., "answer": ...}}',
        )
    ending = "" if prompt.endswith(row.neighbor_ending) else row.neighbor_ending
    return Probe(prompt + ending, answer, target_prefix)


def _items(record: Mapping[str, Any], path: str) -> list[Any]:
    """The list at a path; nothing and blank give an empty one, a single value a list of one."""
    value = _at(record, path)
    if value is None or (isinstance(value, str) and not value.strip()):
        return []
    if isinstance(value, str | Mapping):
        return [value]
    if not isinstance(value, list | tuple):
        raise _wrong_type(path, value, "a list of strings")
    return list(value)


def _filled(value: Any, path: str, *, exact: bool = False) -> str:
    """One item of a list: a text that is not blank."""
    text = _string(value, path)
    if not text:
        raise Unusable("empty field", f"an item of {path!r} is empty", "remove the empty item")
    return str(value) if exact else text


def _string(value: Any, path: str) -> str:
    """A string without the white space around it."""
    if not isinstance(value, str):
        raise _wrong_type(path, value, "a string")
    _require_text(value, path)
    return value.strip()


def _require_text(value: str, path: str) -> None:
    """Raise Unusable for a string that can be neither written nor tokenised."""
    flaw = no_text(value)
    if flaw is not None:
        raise Unusable("not text", f"the field {path!r} {flaw}", "write it without that")


def _wrong_type(path: str, value: Any, wanted: str) -> Unusable:
    """The complaint about a value of another type."""
    return Unusable(
        "wrong type",
        f"the field {path!r} is {_type_name(value)} ({shown(value):.40}), not {wanted}",
        f"write {path!r} as {wanted}",
    )


def _type_name(value: Any) -> str:
    """What JSON calls the type of a value."""
    names = {bool: "a truth value", int: "a number", float: "a number", str: "a string"}
    names |= {list: "a list", tuple: "a list", dict: "an object", type(None): "null"}
    return names.get(type(value), type(value).__name__)
