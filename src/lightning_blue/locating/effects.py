"""Indirect effects averaged over facts, by token class and layer, and the layers they point at."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from scipy.stats import t as student
from torch import Tensor

from lightning_blue.locating.facts import LAST_SUBJECT, TOKEN_CLASSES, TracedFact, token_class
from lightning_blue.locating.modules import KINDS
from lightning_blue.locating.tracing import Trace

CONFIDENCE = 0.95
ENOUGH = 0.5  # of the peak's effect, that a layer around it must have
MOST_LAYERS = 5  # proposed, as by depth


class Band(NamedTuple):
    """A mean over facts, and the ends of its confidence interval (NaN for a single fact)."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Effects:
    """Indirect effects: by how much a restoration raises the answer's probability.

    Attributes:
        mean, low, high: over facts, with the ends of the confidence interval,
            ``(n_kinds, n_classes, n_layers)``; NaN where no fact has a token of the class.
        facts: how many have one, by class.
        total: the total effect, what noise takes from the answer's probability.
    """

    mean: Tensor
    low: Tensor
    high: Tensor
    facts: list[int]
    total: Band

    @property
    def n_layers(self) -> int:
        """How many layers the model has."""
        return self.mean.shape[-1]

    def band(self, kind: str, token_class: int, layer: int) -> Band:
        """Return one effect."""
        place = KINDS.index(kind), token_class, layer
        return Band(*(float(values[place]) for values in (self.mean, self.low, self.high)))

    def ffn_curve(self) -> list[Band]:
        """Return the effect of the FFN's output at the subject's last token, by layer."""
        return [self.band("ffn", LAST_SUBJECT, layer) for layer in range(self.n_layers)]


def average(facts: Sequence[TracedFact], traces: Sequence[Trace]) -> Effects:
    """Average over facts: of each fact first over the tokens of a class, then over facts.

    The interval is Student's, with facts as independent units.
    """
    values = torch.stack([_by_class(*pair) for pair in zip(facts, traces, strict=True)])
    mean, half = _interval(values)
    total = torch.tensor([trace.clean - trace.corrupted for trace in traces]).double()
    whole, around = (float(each) for each in _interval(total))
    counts = (~values[:, 0, :, 0].isnan()).sum(0).tolist()
    return Effects(
        mean, mean - half, mean + half, counts, Band(whole, whole - around, whole + around)
    )


def _by_class(fact: TracedFact, trace: Trace) -> Tensor:
    """Return a fact's indirect effects, ``(n_kinds, n_classes, n_layers)``."""
    effect = trace.restored.double() - trace.corrupted
    classes = torch.tensor([token_class(fact, position) for position in fact.positions])
    return torch.stack(
        [effect[:, :, classes == each].mean(-1) for each in range(len(TOKEN_CLASSES))], dim=1
    )


def _interval(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and half the width of its confidence interval over the first dimension."""
    there = ~values.isnan()
    n = there.sum(0)
    mean = values.nanmean(0)
    squares = torch.where(there, values - mean, 0.0).square().sum(0)
    factor = torch.tensor(student.ppf((1 + CONFIDENCE) / 2, (n - 1).clamp(min=1).numpy()))
    half = factor * (squares / ((n - 1).clamp(min=1) * n)).sqrt()
    return mean, torch.where(n > 1, half, math.nan)


class Proposal(NamedTuple):
    """Critical layers, and why.

    Attributes:
        layers: ascending; empty where nothing could be said.
        peak: the layer that they are around.
        rule: how they were found, or why there are none.
    """

    layers: list[int]
    peak: int | None
    rule: str


def around_the_peak(effects: Effects, usable: Sequence[int]) -> Proposal:
    """Propose the layers around the FFN effect's peak at the subject's last token.

    Those without a gap whose effect is at least half of the peak's, at most five: the peak, and
    step by step the better of the two neighbours. None where the peak's interval reaches 0.

    Args:
        effects: of all facts.
        usable: layers that may be proposed.
    """
    curve = effects.ffn_curve()
    if not usable:
        return Proposal([], None, "no layer can be edited")
    peak = max(usable, key=lambda layer: curve[layer].mean)
    low = curve[peak].low
    if not curve[peak].mean > 0 or low <= 0:
        return Proposal([], peak, "the peak of the FFN's effect is not told from 0")
    layers = [peak]
    allowed = {n for n in usable if curve[n].mean >= ENOUGH * curve[peak].mean}
    while len(layers) < MOST_LAYERS:
        beside = {min(layers) - 1, max(layers) + 1} & allowed
        if not beside:
            break
        layers.append(max(beside, key=lambda layer: curve[layer].mean))
    rule = (
        f"peak of the FFN's effect at the subject's last token, and layers around it with at least "
        f"{ENOUGH:.0%} of it, at most {MOST_LAYERS}"
    )
    return Proposal(sorted(layers), peak, rule)
