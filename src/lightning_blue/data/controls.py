"""Control facts from a source of their own: what a model is asked for before any edit."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

from lightning_blue.data.checks import apply_policy, pick_control_facts
from lightning_blue.data.reading import read_requests
from lightning_blue.data.requests import EditRequest, Probe, Rejected
from lightning_blue.support.errors import InputError

log = logging.getLogger(__name__)

Sorted = tuple[list[EditRequest], list[Rejected]]


def control_facts_of(
    source: str,
    split: str,
    edited: Sequence[EditRequest],
    on_unusable: str,
    readable: Callable[[list[EditRequest]], Sorted],
) -> list[Probe]:
    """Read the facts of a source that may serve as control facts, in order.

    A fact is the prompt of a record with its current object, or with its target in a record that
    names none (zsRE's answers, known facts). Those about edited subjects and repeated prompts are
    left out.

    Args:
        source: as ``data.path``; its format is told by its columns.
        split: of a dataset.
        edited: the requests to edit.
        on_unusable: ``stop`` or ``skip``.
        readable: sorts out what the model cannot read, and joins prompts as the run does.

    Raises:
        InputError: if the source cannot be read, holds unusable records and the policy is to stop,
            or holds no fact that can serve.
    """
    usable, rejected = read_requests(source, "auto", split)
    total = len(usable) + len(rejected)
    usable, faults = readable(usable)
    rejected += faults
    apply_policy(rejected, total, on_unusable)
    if rejected:
        log.warning(
            "%d of %d control facts are left out as unusable, the first: %s",
            len(rejected),
            total,
            rejected[0],
        )
    known = [replace(r, target_true=r.target_true or r.target_new) for r in usable]
    facts = pick_control_facts(known, edited, len(known))
    if not facts:
        raise InputError(
            "no fact can serve as a control fact",
            where=f"data.controls = {source}: "
            + (f"{len(usable)} usable, all about edited subjects" if usable else "none is usable"),
            hint="give facts about other subjects, or a number of facts of the data itself",
        )
    if len(facts) < len(usable):
        log.info(
            "%s: %d facts on edited subjects or repeated prompts are left out",
            source,
            len(usable) - len(facts),
        )
    return facts
