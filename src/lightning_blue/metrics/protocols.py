"""Which protocols a run measures: its main one, and those that are added to it."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_blue.metrics.table import GENERATION, MAIN, PROTOCOLS
from lightning_blue.support.errors import InputError


def require_protocols(protocols: Sequence[str] | None) -> None:
    """Refuse names that no protocol has, names that come twice, and an empty list.

    Raises:
        InputError: naming the first of them.
    """
    if protocols is None:
        return
    where = "measure.protocols"
    hint = f"name some of: {', '.join(PROTOCOLS)}; null leaves the choice to the data"
    unknown = [name for name in protocols if name not in PROTOCOLS]
    if unknown:
        raise InputError(f"there is no protocol {unknown[0]!r}", where=where, hint=hint)
    if not protocols or len(set(protocols)) < len(protocols):
        what = "a protocol comes twice" if protocols else "the list is empty"
        raise InputError(what, where=where, hint=hint)


def require_answers(protocols: Sequence[str] | None) -> None:
    """Refuse a judge where no answers are generated.

    Raises:
        InputError: if ``generation`` is not among the protocols.
    """
    if GENERATION not in (protocols or ()):
        raise InputError(
            "a judge reads generated answers, and none are asked for",
            where="measure.judge.url",
            hint="add generation to measure.protocols, or leave out measure.judge",
        )


def choose(
    protocols: Sequence[str] | None, of_data: str, given: bool = False
) -> tuple[str, tuple[str, ...]]:
    """Return the main protocol and those that are added.

    The main one is the data's; where it is not among those asked for, but the other one that
    scores objects is, that one is. Its metrics have the plain names.

    Args:
        protocols: that are asked for; None: the data's alone.
        of_data: ``counterfact`` or ``zsre``.
        given: whether that was set (``data.protocol``), and not found by rule.

    Raises:
        InputError: if ``data.protocol`` was set to one that is not asked for.

    >>> choose(["teacher_forced", "generation"], "counterfact")
    ('zsre', ('generation',))
    >>> choose(["generation"], "counterfact")
    ('counterfact', ('generation',))
    """
    if protocols is None:
        return of_data, ()
    scoring = {MAIN[name]: name for name in PROTOCOLS if name in MAIN and name in protocols}
    main = of_data if of_data in scoring or not scoring else next(iter(scoring))
    if given and main != of_data:
        name = next(name for name, main_name in MAIN.items() if main_name == of_data)
        raise InputError(
            f"data.protocol is {of_data}, which measures {name!r}, and that is not asked for",
            where=f"measure.protocols = {', '.join(protocols)}",
            hint=f"add {name} to them, or leave out --data.protocol",
        )
    return main, tuple(name for name in PROTOCOLS if name in protocols and MAIN.get(name) != main)
