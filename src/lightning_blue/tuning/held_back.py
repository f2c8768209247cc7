"""The facts that settings are chosen on: the first ones, which the run behind leaves out."""

from __future__ import annotations

from typing import NamedTuple

from lightning_blue.data.checks import CONTRADICTION, DUPLICATE, apply_policy
from lightning_blue.data.datamodule import EditDataModule
from lightning_blue.data.memory import name_of
from lightning_blue.editing.health import known
from lightning_blue.editing.module import EditModule
from lightning_blue.support.errors import InputError
from lightning_blue.tuning.halving import LEAST
from lightning_blue.tuning.workbench import Facts

FACTS = 16  # that are held back where there are twice as many
ASKED = 400  # facts that the unedited model is asked about, to find controls


class HeldBack(NamedTuple):
    """Facts for tuning, and what is left.

    Attributes:
        facts: to tune on.
        offset: at which ``data.offset`` begins behind them.
        left: usable facts behind them.
        asked: how many facts the unedited model was asked about, to find the controls.
    """

    facts: Facts
    offset: int
    left: int
    asked: int


def hold_back(data: EditDataModule, module: EditModule, wanted: int | None) -> HeldBack:
    """Take the first usable facts from ``data.offset`` on, at most half of them, to tune on.

    Controls are facts behind them (of ``data.controls``, where that names a source) that the
    unedited model answers.

    Args:
        data: the facts; nothing was prepared. It is left with those held back.
        module: with the unedited model.
        wanted: how many to hold back; None: `FACTS`, or half where there are fewer than twice that.

    Raises:
        InputError: if there are too few, or facts cannot be used.
    """
    limits = (module.tokenizer, module.max_length, module.contexts_length, module.embeddings)
    first = data.offset
    data.edits = data.batch_size = FACTS if wanted is None else wanted  # all in one batch
    found = data.sort_out(*limits)
    apply_policy(found.rejected, found.total, data.on_unusable)
    usable = len(found.chosen) + len(found.rest)
    if wanted is None and usable < 2 * FACTS:
        data.edits = data.batch_size = max(1, usable // 2)
        found = data.sort_out(*limits)
    _require_enough(data, usable)
    if data.controls_wanted == 0:
        data.controls_wanted = ASKED
    data.prepare(*limits)
    controls = data.controls[:ASKED]
    answered = known(module.model, module.tokenizer, controls)
    kept = [fact for fact, yes in zip(controls, answered, strict=True) if yes]
    doubled = sum(each.kind in (DUPLICATE, CONTRADICTION) for each in found.rejected)
    return HeldBack(
        Facts(data.requests, kept, data.protocol),
        first + len(data.requests) + doubled,
        usable - len(data.requests),
        len(controls),
    )


def _require_enough(data: EditDataModule, usable: int) -> None:
    wanted = data.edits or 0  # never None here
    if wanted < LEAST:
        raise InputError(
            f"{usable} usable facts are too few to tune on: at least {LEAST} are held back, and as "
            "many are left to edit",
            where=f"{name_of(data.path)}, from data.offset = {data.offset} on",
            hint="give more facts, or those of a benchmark that asks alike, and edit yours with "
            "the run file: --data.path=YOURS --data.offset=0",
        )
    if wanted >= usable:
        raise InputError(
            f"of {usable} usable facts {wanted} cannot be held back: none would be left to edit",
            where="--facts",
            hint=f"give fewer, {max(LEAST, usable // 2)} for instance",
        )
