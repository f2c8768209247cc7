"""Successive halving: many combinations on a few facts, those that are left on more of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from lightning_blue.tuning.objective import Measured
from lightning_blue.tuning.space import Choice

KEPT = 3  # of so many combinations one goes on
LEAST = 2  # facts of a round


class Trial(NamedTuple):
    """A combination on the facts of a round.

    Attributes:
        round: from 0.
        facts: the first so many of those held back.
        choice: what was tried.
        measured: what came of it.
    """

    round: int
    facts: int
    choice: Choice
    measured: Measured


class Round(NamedTuple):
    """How many combinations are tried on how many facts."""

    trials: int
    facts: int


def rounds(trials: int, facts: int) -> list[Round]:
    """Lay out the rounds: on a quarter of the facts, on half, on all; each time a third goes on.

    What is decided without tuning is in every round, where it is not among the best as one more.

    Args:
        trials: combinations of the first round.
        facts: that are held back.

    >>> rounds(24, 16)
    [Round(trials=24, facts=4), Round(trials=8, facts=8), Round(trials=3, facts=16)]
    >>> rounds(24, 4), rounds(2, 16)
    ([Round(trials=24, facts=2), Round(trials=8, facts=4)], [Round(trials=2, facts=16)])
    """
    sizes = sorted({max(LEAST, math.ceil(facts / part)) for part in (4, 2)} | {facts})
    laid_out: list[Round] = []
    for size in sizes:
        laid_out.append(Round(trials, size))
        if trials <= KEPT:  # a further round could only confirm
            break
        trials = math.ceil(trials / KEPT)
    return [*laid_out[:-1], Round(laid_out[-1].trials, facts)]


def halve(
    choices: Sequence[Choice],
    facts: int,
    run: Callable[[int, int, Choice], Trial],
) -> list[Trial]:
    """Try combinations, keep the best of each round, and try those on more facts.

    Args:
        choices: of the first round; what is decided without tuning comes first.
        facts: that are held back.
        run: tries one in a round, on the first so many facts.

    Returns:
        All trials in their order.
    """
    untuned, place = choices[0], {choice: n for n, choice in enumerate(choices)}
    done: list[Trial] = []
    left = list(choices)
    layout = rounds(len(choices), facts)
    for number, each in enumerate(layout):
        tried = [run(number, each.facts, choice) for choice in left]
        done += tried
        if number + 1 < len(layout):
            best = [trial.choice for trial in ranked(tried)][: layout[number + 1].trials]
            left = sorted({*best, untuned}, key=place.__getitem__)
    return done


def ranked(trials: Sequence[Trial]) -> list[Trial]:
    """Order trials of one round, the best first; what is decided without tuning comes in first.

    Of equal ones those that differ from it in fewer settings are better, then those that come
    before.
    """
    untuned = trials[0].choice

    def order(trial: Trial) -> tuple[float, float, int]:
        differing = sum(own != other for own, other in zip(trial.choice, untuned, strict=True))
        return *trial.measured.rank, -differing

    return sorted(trials, key=order, reverse=True)


def best(trials: Sequence[Trial]) -> Trial:
    """Return the best trial of the last round."""
    last = max(trial.round for trial in trials)
    return ranked([trial for trial in trials if trial.round == last])[0]


def without_tuning(trials: Sequence[Trial]) -> Trial:
    """Return the trial in the last round of what is decided without tuning."""
    last = max(trial.round for trial in trials)
    return next(t for t in trials if t.round == last and t.choice == trials[0].choice)
