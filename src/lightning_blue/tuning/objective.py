"""What is maximised: the harmonic mean of what edits are for and of what they should not cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from lightning_blue.metrics import table
from lightning_blue.metrics.functional import harmonic_mean, mean_by_request
from lightning_blue.metrics.ratings import Answer

AIMS = ("efficacy", "generalization")
PRICES = ("specificity", "retained_knowledge")
ORDINARY_TEXT = "ordinary_text"  # stands in where neither price can be measured
STRICT = tuple(f"{name}_top1" for name in (*AIMS, "specificity"))
PROMPTS = {  # that each is measured on
    "efficacy": table.OWN_PROMPT,
    "generalization": table.PARAPHRASES,
    "specificity": table.NEIGHBOURS,
}


@dataclass(frozen=True)
class Measured:
    """What came of a trial.

    Attributes:
        components: of the score, percent, by name; see `components`.
        soft: what stands for those that count successes, percent, by name; see `soft`.
        strict: what stricter metrics say, percent, by name: the object is what the model says.
        seconds: that the trial took.
        target_seconds: of these, those for targets that other trials have in common with it.
        failure: why nothing could be measured; the score is 0 then.
    """

    components: dict[str, float]
    soft: dict[str, float] = field(default_factory=dict)
    strict: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    target_seconds: float = 0.0
    failure: str = ""

    @property
    def score(self) -> float:
        """The harmonic mean of the components, percent; 0 where one of them is."""
        return _harmonic(self.components)

    @property
    def soft_score(self) -> float:
        """The same of how probable objects are: few facts often have the same successes."""
        return _harmonic({**self.components, **self.soft})

    @property
    def rank(self) -> tuple[float, float]:
        """What trials are ordered by: the score, then the soft one."""
        return self.score, self.soft_score

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Measured:
        """Read what `to_dict` has written.

        Raises:
            TypeError: for other values.
        """
        return cls(**values)


def components(metrics: Mapping[str, Mapping[str, float]], text_cost: float) -> dict[str, float]:
    """Return the components of the score that were measured, percent.

    Args:
        metrics: estimates by name, those of control facts among them.
        text_cost: nats per token that ordinary text costs more than before the edit. It counts,
            as ``100 exp(-cost)``, where neither neighbours nor control facts speak against a model
            that says the new objects and nothing else.
    """
    found = {name: metrics[name].get("value", 0.0) for name in (*AIMS, *PRICES) if name in metrics}
    if not set(PRICES) & set(found):
        cost = text_cost if math.isfinite(text_cost) else math.inf
        found[ORDINARY_TEXT] = 100 * math.exp(-max(0.0, cost))
    return found


def strict(metrics: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Return the top-1 metrics, percent."""
    return {name: metrics[name].get("value", 0.0) for name in STRICT if name in metrics}


def soft(answers: Sequence[Answer]) -> dict[str, float]:
    """Return what stands for efficacy, generalization and specificity by probabilities, percent.

    In place of a success counts the wanted object's share of the probability of both, ``P / (P +
    P')``, or its probability where there is no other; geometric means over an object's tokens.
    Prompts of a request are averaged first.

    Args:
        answers: how the model rates the objects of all prompts.
    """
    found = {}
    for name, prompts in PROMPTS.items():
        chosen = [answer for answer in answers if answer.prompts == prompts]
        if chosen:
            requests = torch.tensor([answer.request for answer in chosen])
            shares = torch.tensor([_share(answer) for answer in chosen], dtype=torch.float64)
            found[name] = 100 * float(mean_by_request(shares, requests).mean())
    return found


def _share(answer: Answer) -> float:
    nll = answer.wanted.nll
    if answer.other is None:
        return math.exp(-nll) if math.isfinite(nll) else 0.0
    margin = answer.other.nll - nll
    return float(torch.tensor(margin).sigmoid()) if not math.isnan(margin) else 0.0


def _harmonic(values: Mapping[str, float]) -> float:
    if not values:
        return 0.0
    return float(harmonic_mean(torch.tensor([*values.values()], dtype=torch.float64)))
