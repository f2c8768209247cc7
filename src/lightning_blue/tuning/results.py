"""What tuning found, as plain values and tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lightning_blue.metrics import table
from lightning_blue.reporting.tables import markdown_table
from lightning_blue.studies.results import Row, csv_text
from lightning_blue.tuning.halving import Trial, best, ranked, without_tuning
from lightning_blue.tuning.objective import ORDINARY_TEXT, Measured
from lightning_blue.tuning.space import Choice, Space

FORMAT = 1
LABELS = {ORDINARY_TEXT: "ordinary text"}


@dataclass(frozen=True)
class Tuned:
    """What was tried and found.

    Attributes:
        model, data, plan: of the run; the first two as they were given.
        space: that was drawn from.
        trials: in their order.
        unedited: the unedited model on all facts held back.
        settings: that are proposed, by dotted key.
        facts: how many were held back.
        first, offset: ``data.offset`` before and behind them.
        left: usable facts behind them.
        controls: control facts that the unedited model answers, and how many it was asked about.
        seed: of the draw.
        seconds: that tuning took this time.
        notes: what should be known.
    """

    model: str
    data: str
    plan: str
    space: Space
    trials: Sequence[Trial]
    unedited: Measured
    settings: dict[str, Any]
    facts: int
    first: int
    offset: int
    left: int
    controls: tuple[int, int]
    seed: int
    seconds: float
    notes: list[str] = field(default_factory=list)

    @property
    def best(self) -> Trial:
        """The one whose settings are proposed."""
        return best(self.trials)

    @property
    def untuned(self) -> Trial:
        """What is decided without tuning, on the same facts."""
        return without_tuning(self.trials)

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain values, for ``tune.json``."""
        return {
            "format": FORMAT,
            "model": self.model,
            "data": self.data,
            "plan": self.plan,
            "layers": list(self.best.choice.layers),
            "settings": self.settings,
            "facts": self.facts,
            "first": self.first,
            "offset": self.offset,
            "left": self.left,
            "controls": {"answered": self.controls[0], "asked": self.controls[1]},
            "seed": self.seed,
            "seconds": round(self.seconds, 1),
            "seconds_of_trials": round(sum(t.measured.seconds for t in self.trials), 1),
            "score": {
                "unedited": _summary(self.unedited),
                "untuned": _summary(self.untuned.measured),
                "tuned": _summary(self.best.measured),
            },
            "space": self.space._asdict(),
            "trials": rows(self.trials),
            "notes": self.notes,
        }


def _summary(measured: Measured) -> dict[str, float]:
    found = {
        "score": measured.score,
        "soft_score": measured.soft_score,
        **measured.components,
        **measured.strict,
    }
    return {name: round(value, 2) for name, value in found.items()}


def rows(trials: Sequence[Trial]) -> list[Row]:
    """Return a row for each trial, all with the same keys."""
    names = _components(trials)
    strict = list(dict.fromkeys(name for t in trials for name in t.measured.strict))
    return [
        {
            "round": trial.round + 1,
            "facts": trial.facts,
            "layers": " ".join(map(str, trial.choice.layers)),
            "first_step": trial.choice.first_step,
            "clamp": trial.choice.clamp,
            "covariance_weight": trial.choice.weight,
            "score": trial.measured.score,
            "soft_score": trial.measured.soft_score,
            **{name: trial.measured.components.get(name) for name in names},
            **{name: trial.measured.strict.get(name) for name in strict},
            "seconds": trial.measured.seconds,
            "failure": trial.measured.failure,
        }
        for trial in trials
    ]


def as_csv(trials: Sequence[Trial]) -> str:
    """Spell the trials as CSV."""
    return csv_text(rows(trials))


def as_table(tuned: Tuned) -> str:
    """Spell the trials as a markdown table, the last round first and in each the best first."""
    names = _components(tuned.trials)
    header = ["facts", "layers", "step", "clamp", "weight", "score", "soft", *map(label, names)]
    body = []
    for number in sorted({trial.round for trial in tuned.trials}, reverse=True):
        for trial in ranked([trial for trial in tuned.trials if trial.round == number]):
            found = trial.measured
            cells = [_percent(found.components.get(name)) for name in names]
            start = [str(trial.facts), *spelled(trial.choice)]
            scores = [found.failure or _percent(found.score), _percent(found.soft_score)]
            body.append([*start, *scores, *cells])
    return markdown_table(body, header)


def spelled(choice: Choice) -> list[str]:
    """Spell the settings of a choice.

    >>> spelled(Choice((4, 5, 6), 0.5, None, 10.0)), spelled(Choice((4, 8), 0.5, 0.75, 1))
    (['4-6', '0.5', 'given', '10'], ['4, 8', '0.5', '0.75', '1'])
    """
    numbers = (choice.first_step, choice.clamp, choice.weight)
    return [spell_layers(choice.layers), *("given" if n is None else f"{n:g}" for n in numbers)]


def spell_layers(layers: Sequence[int]) -> str:
    """Spell layers, three or more consecutive ones as a range."""
    consecutive = list(layers) == list(range(layers[0], layers[-1] + 1))
    if len(layers) > 2 and consecutive:
        return f"{layers[0]}-{layers[-1]}"
    return ", ".join(map(str, layers))


def sentence(measured: Measured) -> str:
    """Say a score and what it is the mean of.

    >>> sentence(Measured({"efficacy": 100.0, "specificity": 50.0}))
    'score 66.7 (efficacy 100, specificity 50)'
    """
    if measured.failure:
        return f"failed: {measured.failure}"
    parts = ", ".join(f"{label(name)} {value:.0f}" for name, value in measured.components.items())
    return f"score {measured.score:.1f} ({parts})"


def label(name: str) -> str:
    """Return what a component is called."""
    return LABELS.get(name) or table.by_name(name).title


def _components(trials: Sequence[Trial]) -> list[str]:
    return list(dict.fromkeys(name for trial in trials for name in trial.measured.components))


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"
