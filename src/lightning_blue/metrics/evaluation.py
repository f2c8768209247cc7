"""Evaluate an edited model: which prompts each metric reads, and what became of each request."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_blue.data.requests import EditRequest, Probe
from lightning_blue.language_model import scoring
from lightning_blue.metrics import MeanOverRequests, numbers, table
from lightning_blue.metrics import functional as F
from lightning_blue.metrics.matching import GeneratedAnswer
from lightning_blue.metrics.ratings import Answer, rate
from lightning_blue.metrics.table import Measure, MetricSpec
from lightning_blue.metrics.texts import continue_prompts, text_metric, write_texts
from lightning_blue.support.errors import InputError
from lightning_blue.support.processes import distribute

PROTOCOLS = ("counterfact", "zsre")

Metrics = dict[str, dict[str, float]]


@dataclass(frozen=True)
class RequestOutcome:
    """What the model makes of one request.

    ``values`` holds, by metric name, the request's value of each metric that the table of metrics
    marks as per request: the fraction of successful prompts (zsRE: of right target tokens) from 0
    to 1, or a number in the metric's unit. A metric that the request offers nothing for is absent;
    ``edits.jsonl`` writes null for it, so that all its lines have the same keys. ``nll`` is
    in nats per target token after the request's prompt, and a probability is ``exp(-nll)``: the
    geometric mean over the target's tokens. ``correct`` flags the new object's tokens that are
    most probable under teacher forcing. ``continuation`` is the model's own greedy one.
    """

    case_id: str
    values: dict[str, float]
    nll_new: float
    nll_true: float | None
    probability_new: float
    probability_true: float | None
    correct: tuple[bool, ...]
    continuation: str


@dataclass(frozen=True)
class Evaluation:
    """Estimates by metric name, and one outcome per request in their order.

    An estimate holds ``value`` (unless it is not finite), ``standard_error`` (where two or more
    requests allow one), ``count`` (of requests) and ``prompts``. A metric that no prompt belongs
    to is absent. ``answers`` are those that the model wrote freely, where it was asked to.
    """

    metrics: Metrics
    outcomes: list[RequestOutcome]
    answers: list[GeneratedAnswer] = field(default_factory=list)

    def flat(self) -> dict[str, float]:
        """Return the estimates under flat keys, see `flatten`."""
        return flatten(self.metrics)


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[EditRequest],
    *,
    protocol: str = "counterfact",
    added: Collection[str] = (),
    generate: bool = True,
    continuation_tokens: int = 12,
    idf_texts: Sequence[str] | None = None,
    negation: str | None = None,
    seed: int = 0,
    tokens_per_batch: int = 4096,
    progress: bool = False,
    sent: Callable[[str], str] = str,
    rated: Sequence[Answer] | None = None,
) -> Evaluation:
    """Measure what a model says about edit requests, before or after they are applied.

    Several processes share the prompts, and each gets all results; all of them must call it.

    What each metric reads and means is in `lightning_blue.metrics.table`. Under ``counterfact`` a
    prompt counts where the wanted object is more probable than the other one (the new one against
    the true one; on neighbours the neighbour's answer against the new one); without a true object
    only the top-1 metrics remain. Under ``zsre`` the fraction of target tokens that are most
    probable under teacher forcing counts. Metrics named ``_top1`` demand that all target tokens
    are, which is to say that greedy generation produces them. Percentages go from 0 to 100.

    Args:
        model: a causal language model on any device, in any dtype.
        tokenizer: its tokenizer.
        requests: n edit requests.
        protocol: ``counterfact`` or ``zsre``.
        added: of ``probability`` and ``teacher_forced``, the one by which the requests are scored
            besides; its metrics are named by it.
        generate: whether to continue the requests' generation prompts, which fluency and
            consistency need and which takes most of the time.
        continuation_tokens: length of each outcome's continuation; 0 leaves it empty.
        idf_texts: texts from which consistency learns how rare words are; the requests' own
            reference texts by default.
        negation: words that deny the prompt in the place of their ``{}``; None: no negation probes.
        seed: of the sampling of generated texts.
        tokens_per_batch: tokens in one forward pass.
        progress: whether to show progress bars.
        sent: what the model is sent for a prompt of the data, the prompt itself by default.
        rated: what `ratings.rate` says of the same requests, so that the model is not asked again.

    Raises:
        InputError: for an unknown protocol, or a prompt that the model's context cannot hold.
    """
    if protocol not in PROTOCOLS:
        raise InputError(
            f"unknown protocol {protocol!r}", hint=f"choose one of {', '.join(PROTOCOLS)}"
        )
    compare = protocol == "counterfact" or table.PROBABILITY in added
    answers = rated
    if answers is None:
        answers = rate(
            model, tokenizer, requests, compare, tokens_per_batch, progress, sent, negation
        )
    means = {
        spec.name: _judge(spec, measure, answers)
        for spec, measure in table.of_protocol(
            protocol, table.COMPARISON, table.TEACHER_FORCED, added=added
        )
    }
    scores = {
        spec.name: _combine(spec, measure, means, len(requests))
        for spec, measure in table.of_protocol(protocol, table.COMBINATION, added=added)
    }
    if generate:
        texts = write_texts(model, tokenizer, requests, seed, progress, sent)
        for spec, measure in table.of_protocol(protocol, table.GENERATED_TEXT):
            means[spec.name] = text_metric(spec, measure, texts, requests, idf_texts)
    continuations = continue_prompts(
        model, tokenizer, requests, continuation_tokens, progress, sent
    )
    outcomes = _outcomes(requests, answers, means, continuations)
    return Evaluation(_compute({**means, **scores}), outcomes)


def over_requests(
    values: Sequence[Mapping[str, float]], protocol: str, added: Collection[str] = ()
) -> Metrics:
    """Average values that single requests have already, as `evaluate` does those of all.

    Args:
        values: of n requests, those of their outcomes.
        protocol: by which they were measured, ``counterfact`` or ``zsre``.
        added: as in `evaluate`.

    Returns:
        Estimates of metrics that requests have values of, and of what combines them; without the
        number of prompts, which single values do not say.
    """
    means: dict[str, MeanOverRequests] = {}
    for spec, _ in table.of_protocol(protocol, table.COMPARISON, table.TEACHER_FORCED, added=added):
        there = {i: each[spec.name] for i, each in enumerate(values) if spec.name in each}
        scale = 100.0 if spec.unit == table.PERCENT else 1.0
        means[spec.name] = MeanOverRequests(F.as_given, scale, sync_on_compute=False)
        means[spec.name].update(
            torch.tensor([*there.values()], dtype=torch.float64),
            torch.tensor([*there], dtype=torch.long),
        )
    scores = {
        spec.name: _combine(spec, measure, means, len(values))
        for spec, measure in table.of_protocol(protocol, table.COMBINATION, added=added)
    }
    found = _compute({**means, **scores})
    return {name: {k: v for k, v in e.items() if k != "prompts"} for name, e in found.items()}


def evaluate_control_facts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    facts: Sequence[Probe],
    *,
    protocol: str = "counterfact",
    tokens_per_batch: int = 4096,
    progress: bool = False,
    sent: Callable[[str], str] = str,
) -> Metrics:
    """Measure what a model still knows of control facts: known before the run, and not edited.

    Several processes share the prompts, and each gets all results; all of them must call it.

    Args:
        model: a causal language model on any device, in any dtype.
        tokenizer: its tokenizer.
        facts: n control facts.
        protocol: ``counterfact`` or ``zsre``.
        tokens_per_batch: tokens in one forward pass.
        progress: whether to show a progress bar.
        sent: as in `evaluate`.

    Returns:
        An estimate by metric name, ``retained_knowledge``; empty without facts.
    """
    scores = distribute(
        facts,
        lambda part: scoring.score_targets(
            model,
            tokenizer,
            [sent(fact.prompt) for fact in part],
            [fact.answer for fact in part],
            prefixes=[fact.target_prefix for fact in part],
            tokens_per_batch=tokens_per_batch,
            progress="control facts" if progress else None,
        ),
    )
    metrics: dict[str, Metric] = {}
    for spec, measure in table.of_protocol(protocol, table.CONTROL_FACTS):
        metrics[spec.name] = measure.metric(sync_on_compute=False)
        metrics[spec.name].update([score.correct for score in scores], torch.arange(len(facts)))
    return _compute(metrics)


def flatten(metrics: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Give each number one flat key: ``efficacy``, ``efficacy/standard_error`` and so on."""
    return {
        name if field == "value" else f"{name}/{field}": number
        for name, estimate in metrics.items()
        for field, number in estimate.items()
    }


def _judge(spec: MetricSpec, measure: Measure, answers: Sequence[Answer]) -> MeanOverRequests:
    """Fill a metric that reads answers; it is not synchronised: each process has all answers."""
    chosen = [answer for answer in answers if answer.prompts == spec.prompts]
    if measure.protocol == table.COMPARISON:  # there must be another object
        chosen = [answer for answer in chosen if answer.other is not None]
        inputs: tuple[Any, ...] = _nll(chosen)
    else:
        inputs = ([answer.wanted.correct for answer in chosen],)
    metric = measure.metric(sync_on_compute=False)
    metric.update(*inputs, torch.tensor([answer.request for answer in chosen], dtype=torch.long))
    return metric


def _combine(
    spec: MetricSpec, measure: Measure, means: Mapping[str, MeanOverRequests], n: int
) -> Metric:
    """Fill a metric of other metrics with those requests among ``n`` that have a value of each."""
    parts = [means[name].by_request for name in spec.combines]
    complete = [[part[i] for part in parts] for i in range(n) if all(i in part for part in parts)]
    metric = measure.metric(sync_on_compute=False)
    metric.update(torch.tensor(complete, dtype=torch.float64).reshape(-1, len(parts)))
    return metric


def _nll(answers: Sequence[Answer]) -> tuple[Tensor, Tensor]:
    wanted = [answer.wanted.nll for answer in answers]
    other = [answer.other.nll for answer in answers if answer.other is not None]
    return torch.tensor(wanted), torch.tensor(other)


def _compute(metrics: Mapping[str, Metric]) -> Metrics:
    """Compute the metrics that something was measured for."""
    estimates = {name: numbers(metric.compute()) for name, metric in metrics.items()}
    return {name: estimate for name, estimate in estimates.items() if estimate["count"] > 0}


def _outcomes(
    requests: Sequence[EditRequest],
    answers: Sequence[Answer],
    means: Mapping[str, MeanOverRequests],
    continuations: Sequence[str],
) -> list[RequestOutcome]:
    own_answers = {a.request: a for a in answers if a.prompts == table.OWN_PROMPT}
    names = [name for name in table.per_request(means, table.PROTOCOLS) if name in means]
    values = {name: means[name].by_request for name in names}
    outcomes = []
    for index, request in enumerate(requests):
        new, true = own_answers[index].wanted, own_answers[index].other
        outcomes.append(
            RequestOutcome(
                case_id=request.case_id,
                values={name: of[index] for name, of in values.items() if index in of},
                nll_new=new.nll,
                nll_true=None if true is None else true.nll,
                probability_new=math.exp(-new.nll),
                probability_true=None if true is None else math.exp(-true.nll),
                correct=new.correct,
                continuation=continuations[index],
            )
        )
    return outcomes
