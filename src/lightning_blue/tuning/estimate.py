"""How long tuning will take: from a little of its work, and from the trials that were made."""

from __future__ import annotations

from collections.abc import Sequence

from blue_callbacks.plans import layer_updates
from lightning_blue.preflight.timing import Rates
from lightning_blue.tuning.halving import Trial, rounds
from lightning_blue.tuning.space import Choice

ANSWERS = 6  # probabilities of a request: of two objects after three prompts; of a control one
LATER = 0.25  # of a target's time, where lower layers hold the edit: it is mostly reached soon


def seconds(
    choices: Sequence[Choice],
    facts: int,
    controls: int,
    plan: str,
    rates: Rates,
    *,
    tokens: int = 0,
    covariances: int = 0,
) -> float:
    """Estimate the seconds of all trials, and of the covariances that are missing.

    Args:
        choices: of the first round.
        facts: that are held back.
        controls: control facts.
        plan: that is tuned.
        rates: of a run with one of the choices.
        tokens: of ordinary text.
        covariances: layers whose covariance has to be collected.
    """
    updates = layer_updates(plan, list(choices[0].layers))
    written, sites = len(updates), len({each.target_layer for each in updates})
    own = rates.target / sites  # seconds of an edit at one target layer
    total = tokens * rates.covariance_token * covariances / written
    for number, each in enumerate(rounds(len(choices), facts)):
        optimised = len({choice.targets for choice in choices}) if number == 0 else each.trials
        total += each.facts * own * (optimised + LATER * (sites - 1) * each.trials)
        asked = rates.question * (each.facts + controls / ANSWERS)
        total += each.trials * (each.facts * rates.key + asked + written * rates.factor)
    return total


def seconds_left(done: Sequence[Trial], choices: Sequence[Choice], facts: int) -> float:
    """Say how long the trials that are left will take, from those that were made.

    Args:
        done: trials, at least one.
        choices: of the first round.
        facts: that are held back.
    """
    made = [(trial.facts, trial.measured) for trial in done]
    optimised = [(count, each.target_seconds) for count, each in made if each.target_seconds]
    rest = sum(m.seconds - m.target_seconds for _, m in made) / sum(count for count, _ in made)
    own = sum(each for _, each in optimised) / max(1, sum(count for count, _ in optimised))
    left = 0.0
    for number, each in enumerate(rounds(len(choices), facts)):
        trials = max(0, each.trials - sum(trial.round == number for trial in done))
        kinds = trials
        if number == 0:
            known = {trial.choice.targets for trial in done}
            kinds = len({choice.targets for choice in choices} - known)
        left += each.facts * (trials * rest + kinds * own)
    return left
