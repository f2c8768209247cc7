"""Prompts that probe an edit, with their answers: neighbours, and what follows from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_blue.data.formats.fields import (
    Unusable,
    at,
    filled,
    is_text,
    items,
    names_in,
    spread,
    text,
    wrong_type,
)
from lightning_blue.data.formats.format import Format, Record
from lightning_blue.data.requests import Probe
from lightning_blue.support.text import shown

KINDS = ("neighborhood_prompts", "portability")
Names = list[str]  # of one object, the first of them is the answer


def neighborhood(record: Record, row: Format, target_prefix: str | None) -> tuple[Probe, ...]:
    """The neighbourhood prompts, each with its answer."""
    path = row.paths.get("neighborhood_prompts")
    found = [] if path is None else items(record, path)
    if path is None or not found:
        return ()
    answer = text(record, row, "neighborhood_answer")
    common = [] if answer is None else [answer]
    exact = not row.neighbor_ending
    probes = [_probe(item, path, row, common, target_prefix, exact=exact) for item in found]
    return tuple(_closed(probe, row.neighbor_ending) for probe in probes if probe)


def portability(record: Record, row: Format, target_prefix: str | None) -> tuple[Probe, ...]:
    """Prompts on what follows from the edit, multi-hop questions too, each with its answer."""
    path = row.paths.get("portability")
    found = [] if path is None else items(record, path)
    if path is None or not found:
        return ()
    common = [
        name
        for field in ("portability_answer", "portability_aliases")
        if field in row.paths
        for name in names_in(at(record, row.paths[field]), row.paths[field])
    ]
    if "portability_answer" not in row.paths and not all(isinstance(i, Mapping) for i in found):
        bad = next(item for item in found if not isinstance(item, Mapping))
        parts = f'{{"{row.probe.prompt}": ..., "{row.probe.answer}": ...}}'
        raise wrong_type(path, bad, f"a list of objects {parts}")
    probes = [_probe(item, path, row, common, target_prefix) for item in found]
    return tuple(probe for probe in probes if probe)


def aliases(record: Record, row: Format, target_new: str) -> tuple[str, ...]:
    """Other names of the target: those in a list that begins with it, or in a list of their own."""
    path = row.paths.get("aliases")
    if path is None:
        return ()
    if path != "aliases":  # the list of all answers, of which the target is the first
        names = [item.strip() for item in items(record, path) if is_text(item)]
        names = names if names[:1] == [target_new] else []
    else:
        names = [filled(item, path) for item in items(record, path)]
    return tuple(name for name in dict.fromkeys(names) if name != target_new)


def unanswered(record: Any, row: Format) -> int:
    """How many prompts of a record are left out because they have no answer."""
    if not row.probe.listed or not isinstance(record, Mapping):
        return 0
    try:
        found = [(p, i) for k in KINDS if (p := row.paths.get(k)) for i in items(record, p)]
        return sum(isinstance(i, Mapping) and not _names(i, path, row) for path, i in found)
    except Unusable:
        return 0  # the record is refused as a whole


def _probe(
    item: Any,
    path: str,
    row: Format,
    common: Names,
    target_prefix: str | None,
    *,
    exact: bool = True,
) -> Probe | None:
    """One prompt: a text with the record's answer, or an object; None where it has no answer."""
    prompt, names = item, common
    if isinstance(item, Mapping):
        prompt, names = at(item, row.probe.prompt), _names(item, path, row)
        if row.probe.listed and not names:
            return None
        path = f"{path}.{row.probe.prompt}"
    prompt = filled(prompt, path, exact=exact)
    if not names:
        raise _without_answer(prompt, path, row)
    others = dict.fromkeys(name for name in names if name != names[0])
    return Probe(prompt, names[0], target_prefix, tuple(others))


def _names(item: Record, path: str, row: Format) -> Names:
    """What a prompt that is an object may be answered with; nothing where it has no answer."""
    places, names = row.probe, Names()
    if places.listed:
        for value in spread(item, places.answer):
            names += names_in(value, f"{path}.{places.answer}")
        return names
    answer = at(item, places.answer)
    if answer is None:
        return []
    further = items(item, places.aliases) if places.aliases else []
    names = [filled(answer, f"{path}.{places.answer}")]
    return names + [filled(alias, f"{path}.{places.aliases}") for alias in further]


def _without_answer(prompt: str, path: str, row: Format) -> Unusable:
    kind = "portability" if path.startswith(row.paths.get("portability", "-")) else "neighborhood"
    called = "neighbourhood" if kind == "neighborhood" else kind
    source = row.paths.get(f"{kind}_answer")
    whole = f'{{"{row.probe.prompt}": ..., "{row.probe.answer}": ...}}'
    return Unusable(
        "missing field",
        f"the {called} prompt {shown(prompt)} has no answer",
        f"give {source!r}, or write it as {whole}" if source else f"write it as {whole}",
    )


def _closed(probe: Probe, ending: str) -> Probe:
    """A neighbourhood prompt with the ending of its format."""
    closing = "" if probe.prompt.endswith(ending) else ending
    return Probe(probe.prompt + closing, probe.answer, probe.target_prefix, probe.aliases)
