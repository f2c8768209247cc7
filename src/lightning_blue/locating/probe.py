"""The direct probe: a few facts edited in one layer after the other, measured, and taken back."""

from __future__ import annotations

import copy
import math
import random
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from scipy.stats import spearmanr
from torch import Tensor

from blue_callbacks import ClosedFormUpdate
from blue_callbacks.plans import LayerUpdate
from lightning_blue.data.requests import EditRequest, Probe
from lightning_blue.editing.module import EditModule
from lightning_blue.language_model.chat import markers
from lightning_blue.language_model.scoring import score_targets
from lightning_blue.locating.effects import MOST_LAYERS, Proposal
from lightning_blue.metrics import functional as F
from lightning_blue.studies.bench import Bench
from lightning_blue.studies.results import Estimate
from lightning_blue.support.processes import progress_bar

ROUND = 4  # facts that are edited together; a ranking is looked at from two rounds on
STABLE = 0.8  # rank correlation between halves of the facts, from which no more are edited
SPLITS = 20  # into halves, over which it is averaged
NEIGHBOURS = 4  # of a fact that brings none
SETTINGS = (  # before the prompt of a fact that brings no paraphrase
    "It was a quiet morning in the town.",
    "She put the book back on the shelf.",
)
MEASURES = ("efficacy", "generalization", "specificity")


class LayerScore(NamedTuple):
    """What edits in one layer came to.

    Attributes:
        layer: that was written.
        score: harmonic mean of the shares, with its standard error over facts.
        shares: by measure, the mean share of the two objects' probability that the wanted one has.
        successes: by measure, the fraction of prompts after which the wanted one is more probable.
    """

    layer: int
    score: Estimate
    shares: list[float]
    successes: list[float]


@dataclass(frozen=True)
class ProbeResult:
    """Scores over layers.

    Attributes:
        scores: of each candidate layer, ascending.
        facts: that were edited.
        agreement: mean rank correlation between layers' scores on halves of the facts.
        stable: whether it is high enough.
        proposal: layers, and the rule.
    """

    scores: list[LayerScore]
    facts: int
    agreement: float
    stable: bool
    proposal: Proposal


def candidates(usable: Sequence[int], most: int, peak: int | None) -> list[int]:
    """Return layers to try, evenly over those that can be edited, and the peak of the tracing.

    >>> candidates(range(11), 4, 5), candidates([0, 1, 2], 8, None)
    ([0, 3, 5, 7, 10], [0, 1, 2])
    """
    if len(usable) <= most:
        return list(usable)
    step = (len(usable) - 1) / max(1, most - 1)
    evenly = {usable[round(place * step)] for place in range(most)}
    return sorted(evenly | (set() if peak is None else {peak}))


def probe_requests(
    known: Sequence[EditRequest], others: Sequence[EditRequest], module: EditModule, seed: int
) -> list[EditRequest]:
    """Turn known facts into edits that can be measured.

    What a fact lacks is made: the new object is that of another fact, of the same relation where
    there is one; the paraphrase is its prompt behind an unrelated sentence; neighbours are other
    known facts, of the same relation first.

    Args:
        known: facts that the model knows, ``target_true`` being what it says.
        others: facts that give new objects, these among them.
        module: whose tokenizer is asked for chat templates.
        seed: of the choice.

    Returns:
        Without the facts for which there is no other object, or no neighbour.
    """
    draw = random.Random(seed)
    marks = markers(module.tokenizer)
    made = []
    for fact in known:
        has_new = fact.target_new != fact.target_true
        new = fact.target_new if has_new else _another_object(fact, others, draw)
        if new is None:
            continue
        opening = marks.opening(fact.prompt)
        behind = tuple(
            f"{fact.prompt[:opening]}{said} {fact.prompt[opening:]}".replace("{}", fact.subject, 1)
            for said in SETTINGS
        )
        near = fact.neighborhood or _neighbours(fact, new, known)
        if near:
            made.append(
                replace(
                    fact,
                    target_new=new,
                    paraphrases=fact.paraphrases or behind,
                    neighborhood=near,
                )
            )
    return made


def _another_object(
    fact: EditRequest, others: Sequence[EditRequest], draw: random.Random
) -> str | None:
    """Draw an object that the fact does not have; None where there is none."""
    same = [other for other in others if fact.relation and other.relation == fact.relation]
    for pool in (same, others):
        objects = {other.target_true or other.target_new for other in pool} - {fact.target_true}
        if objects:
            return draw.choice(sorted(filter(None, objects)))
    return None


def _neighbours(fact: EditRequest, new: str, known: Sequence[EditRequest]) -> tuple[Probe, ...]:
    away = [o for o in known if o.subject != fact.subject and o.target_true != new]
    away.sort(key=lambda other: not (fact.relation and other.relation == fact.relation))
    return tuple(Probe(o.text, o.target_true or "", o.target_prefix) for o in away[:NEIGHBOURS])


def probe_layers(
    module: EditModule,
    update: ClosedFormUpdate,
    requests: Sequence[EditRequest],
    layers: Sequence[int],
    usable: Sequence[int],
    *,
    seed: int = 0,
    accelerator: str = "auto",
) -> ProbeResult:
    """Edit facts in one layer at a time, in rounds, until the ranking of layers is stable.

    Each edit is that of a run with this layer alone: targets optimised there, the weight written
    in closed form, and after the measurement put back.

    Args:
        module: with the unedited model.
        update: its solver and settings are used.
        requests: edits, from `probe_requests`; all of them at most.
        layers: candidates.
        usable: layers that may be proposed.
        seed: of the splits.
        accelerator: of the Trainer.
    """
    written = copy.deepcopy(update)
    written.layers = list(layers)
    trainer = {"accelerator": accelerator}
    bench = Bench(module, written, requests, batch_size=ROUND, generate=False, trainer=trainer)
    rounds = [requests[begin : begin + ROUND] for begin in range(0, len(requests), ROUND)]
    values: list[Tensor] = []
    agreement = math.nan
    with progress_bar(len(rounds) * len(layers), "direct probe", "layer") as bar:
        for part in rounds:
            measured = []
            for layer in layers:
                measured.append(_edited(bench, part, layer))
                bar.update()
            values.append(torch.stack(measured))
            agreement = split_half(torch.cat(values, dim=1)[:, :, 0], seed)
            if len(values) > 1 and agreement >= STABLE:
                break
    every = torch.cat(values, dim=1)
    scores = [_score(layer, each) for layer, each in zip(layers, every, strict=True)]
    stable = agreement >= STABLE
    proposal = around_the_best(scores, usable)
    return ProbeResult(scores, every.shape[1], agreement, stable, proposal)


def split_half(values: Tensor, seed: int) -> float:
    """Return how well the rankings of layers by two halves of the facts agree.

    The mean over random splits of the rank correlation (Spearman's) between the layers' scores.

    Args:
        values: a share for each layer, fact and measure, ``(n_layers, n, 3)``.
        seed: of the splits.

    Returns:
        From -1 to 1; NaN for fewer than two facts, or where all layers are alike.
    """
    n = values.shape[1]
    if n < 2:
        return math.nan
    draw = random.Random(seed)
    found = []
    for _ in range(SPLITS):
        order = draw.sample(range(n), n)
        halves = [
            F.harmonic_mean(values[:, part].mean(1).clamp(min=1e-9)).numpy()
            for part in (order[: n // 2], order[n // 2 :])
        ]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of layers that are all alike: NaN
            found.append(float(spearmanr(*halves).statistic))
    return sum(found) / len(found)


def around_the_best(scores: Sequence[LayerScore], usable: Sequence[int]) -> Proposal:
    """Propose the layer with the best score and those beside it that are as good.

    Candidates beside the best one, without a gap, whose score is within one standard error of it,
    and the layers between them; of more than five the five nearest to the best.
    """
    best = max(range(len(scores)), key=lambda place: scores[place].score.mean)
    error = scores[best].score.error
    least = scores[best].score.mean - (0.0 if math.isnan(error) else error)
    low = high = best
    while low > 0 and scores[low - 1].score.mean >= least:
        low -= 1
    while high < len(scores) - 1 and scores[high + 1].score.mean >= least:
        high += 1
    peak = scores[best].layer
    between = [n for n in usable if scores[low].layer <= n <= scores[high].layer]
    nearest = sorted(between, key=lambda layer: (abs(layer - peak), layer))[:MOST_LAYERS]
    rule = (
        "best score of single-layer edits, and layers around it within one standard error, at "
        f"most {MOST_LAYERS}"
    )
    return Proposal(sorted(nearest), peak, rule)


def _edited(bench: Bench, requests: Sequence[EditRequest], layer: int) -> Tensor:
    """Edit facts in a layer, measure, and take it back; ``(n, 2, 3)``, see `measure`."""
    bench.requests = list(requests)
    with bench.edited([LayerUpdate(layer, layer, 1.0)]):
        return measure(bench.module, requests)


@torch.no_grad()
def measure(module: EditModule, requests: Sequence[EditRequest]) -> Tensor:
    """Measure what a model says about edits.

    Returns:
        ``(n, 2, 3)``: shares and successes of efficacy, generalization and specificity. A share is
        the wanted object's probability divided by that of both objects, a mean over prompts; it is
        what success counts from one half on, and says more with few facts.
    """
    asked = [list(_questions(edit)) for edit in requests]
    questions = [question for edit in asked for group in edit for question in group]
    groups = [group for edit in asked for group in edit]

    def nll(objects: list[str]) -> Tensor:
        scores = score_targets(
            module.model,
            module.tokenizer,
            [question.prompt for question in questions],
            objects,
            prefixes=[question.prefix for question in questions],
        )
        return torch.tensor([score.nll for score in scores], dtype=torch.float64)

    wanted, other = nll([q.wanted for q in questions]), nll([q.other for q in questions])
    shares, successes = (other - wanted).sigmoid(), F.probability_success(wanted, other).double()
    places = torch.arange(len(groups)).repeat_interleave(torch.tensor([len(g) for g in groups]))
    measured = [F.mean_by_request(values, places) for values in (shares, successes)]
    return torch.stack(measured, dim=1).view(len(requests), len(MEASURES), 2).transpose(1, 2)


class _Question(NamedTuple):
    """A prompt, both objects, and what stands before them."""

    prompt: str
    wanted: str
    other: str
    prefix: str | None


def _questions(edit: EditRequest) -> Iterator[list[_Question]]:
    """Yield what is asked for each of `MEASURES`."""
    new, true, prefix = edit.target_new, edit.target_true or "", edit.target_prefix
    yield [_Question(edit.text, new, true, prefix)]
    yield [_Question(prompt, new, true, prefix) for prompt in edit.paraphrases]
    yield [
        _Question(near.prompt, near.answer, new, near.target_prefix) for near in edit.neighborhood
    ]


def _score(layer: int, values: Tensor) -> LayerScore:
    """Average a layer's ``(n, 2, 3)`` over facts."""
    shares, successes = values[:, 0], values[:, 1]
    n = torch.tensor(float(len(shares)), dtype=torch.float64)
    mean, error = F.score_estimate(shares.sum(0), shares.T @ shares, n)
    score = Estimate(float(mean), float(error))
    return LayerScore(layer, score, shares.mean(0).tolist(), successes.mean(0).tolist())
