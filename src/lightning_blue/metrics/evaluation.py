"""Evaluate an edited model: which prompts each metric reads, and what became of each request."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_blue.data.requests import EditRequest, Probe
from lightning_blue.language_model import generation, scoring
from lightning_blue.language_model.scoring import TargetScore
from lightning_blue.metrics import (
    Consistency,
    ExactMatch,
    Fluency,
    ProbabilitySuccess,
    Score,
    TokenAccuracy,
    numbers,
)
from lightning_blue.metrics import functional as F
from lightning_blue.support.errors import InputError
from lightning_blue.support.processes import distribute

KINDS = ("efficacy", "generalization", "specificity")
PROTOCOLS = ("counterfact", "zsre")

Metrics = dict[str, dict[str, float]]
Shares = dict[str, dict[int, float]]  # by metric and request, from 0 to 1


@dataclass(frozen=True)
class RequestOutcome:
    """What the model makes of one request.

    ``efficacy``, ``generalization`` and ``specificity`` are the protocol's shares of successful
    prompts (zsRE: of right target tokens), the ``_top1`` ones the shares of prompts whose target
    tokens are all most probable; from 0 to 1, None where there is nothing to measure. ``nll`` is
    in nats per target token after the request's prompt, and a probability is ``exp(-nll)``: the
    geometric mean over the target's tokens. ``correct`` flags the new object's tokens that are
    most probable under teacher forcing. ``continuation`` is the model's own greedy one.
    """

    case_id: str
    efficacy: float | None
    generalization: float | None
    specificity: float | None
    efficacy_top1: float | None
    generalization_top1: float | None
    specificity_top1: float | None
    nll_new: float
    nll_true: float | None
    probability_new: float
    probability_true: float | None
    correct: tuple[bool, ...]
    continuation: str


@dataclass(frozen=True)
class Evaluation:
    """Estimates by metric name, and one outcome per request in their order.

    An estimate holds ``value``, ``standard_error`` (where two or more requests allow one),
    ``count`` (of requests) and ``prompts``. A metric that no prompt belongs to is absent.
    """

    metrics: Metrics
    outcomes: list[RequestOutcome]

    def flat(self) -> dict[str, float]:
        """Return the estimates under flat keys, see `flatten`."""
        return flatten(self.metrics)


class Question(NamedTuple):
    """A prompt, the object that it should be followed by, and one that it should not."""

    request: int
    kind: str
    prompt: str
    wanted: str
    other: str | None


class Answer(NamedTuple):
    """How the model rates both objects of a question."""

    request: int
    kind: str
    wanted: TargetScore
    other: TargetScore | None


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[EditRequest],
    *,
    protocol: str = "counterfact",
    generate: bool = True,
    continuation_tokens: int = 12,
    idf_texts: Sequence[str] | None = None,
    seed: int = 0,
    tokens_per_batch: int = 4096,
    progress: bool = False,
) -> Evaluation:
    """Measure what a model says about edit requests, before or after they are applied.

    Several processes share the prompts, and each gets all results; all of them must call it.

    Under ``counterfact`` a prompt counts where the wanted object is more probable than the other
    one (the new one against the true one; on neighbours the neighbour's answer against the new
    one); without a true object only the top-1 metrics remain. Under ``zsre`` the share of target
    tokens that are most probable under teacher forcing counts. Metrics named ``_top1`` demand that
    all target tokens are, which is to say that greedy generation produces them. Percentages go
    from 0 to 100; fluency and consistency are times 100.

    Args:
        model: a causal language model on any device, in any dtype.
        tokenizer: its tokenizer.
        requests: n edit requests.
        protocol: ``counterfact`` or ``zsre``.
        generate: whether to continue the requests' generation prompts, which fluency and
            consistency need and which takes most of the time.
        continuation_tokens: length of each outcome's continuation; 0 leaves it empty.
        idf_texts: texts from which consistency learns how rare words are; the requests' own
            reference texts by default.
        seed: of the sampling of generated texts.
        tokens_per_batch: tokens in one forward pass.
        progress: whether to show progress bars.

    Raises:
        InputError: for an unknown protocol, or a prompt that the model's context cannot hold.
    """
    if protocol not in PROTOCOLS:
        raise InputError(
            f"unknown protocol {protocol!r}", hint=f"choose one of {', '.join(PROTOCOLS)}"
        )
    compare = protocol == "counterfact"
    questions = [q for i, request in enumerate(requests) for q in _ask(i, request, compare)]
    answers = _answer(model, tokenizer, questions, tokens_per_batch, progress)
    shares = _shares(answers, compare)
    shells = _teacher_forced(answers, compare)
    shells["score"] = _score(shares, len(requests))
    if generate:
        texts = _write(model, tokenizer, requests, seed, progress)
        shells["fluency"] = _fluency(texts)
        shells["consistency"] = _consistency(texts, requests, idf_texts)
    continuations = _continue(model, tokenizer, requests, continuation_tokens, progress)
    outcomes = _outcomes(requests, answers, shares, continuations)
    return Evaluation(_compute(shells), outcomes)


def control_recall(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    probes: Sequence[Probe],
    *,
    tokens_per_batch: int = 4096,
    progress: bool = False,
) -> dict[str, float]:
    """Measure top-1 recall of facts that were not edited, in percent.

    Returns:
        ``value``, ``standard_error``, ``count`` and ``prompts``; empty without probes.
    """
    scores = distribute(
        probes,
        lambda some: scoring.score_targets(
            model,
            tokenizer,
            [probe.prompt for probe in some],
            [probe.answer for probe in some],
            tokens_per_batch=tokens_per_batch,
            progress="recall" if progress else None,
        ),
    )
    recall = ExactMatch(sync_on_compute=False)
    recall.update([score.correct for score in scores], torch.arange(len(probes)))
    return _compute({"recall": recall}).get("recall", {})


def flatten(metrics: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Give each number one flat key: ``efficacy``, ``efficacy/standard_error`` and so on."""
    return {
        name if field == "value" else f"{name}/{field}": number
        for name, estimate in metrics.items()
        for field, number in estimate.items()
    }


def _ask(index: int, request: EditRequest, compare: bool) -> Iterable[Question]:
    """Yield a request's questions; the first is its own prompt."""
    new, true = request.target_new, request.target_true
    yield Question(index, "efficacy", request.text, new, true)
    for prompt in request.paraphrases:
        yield Question(index, "generalization", prompt, new, true if compare else None)
    for probe in request.neighborhood:
        other = new if compare else None
        yield Question(index, "specificity", probe.prompt, probe.answer, other)


def _answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    tokens_per_batch: int,
    progress: bool,
) -> list[Answer]:
    """Score the objects of all questions, each process those of its share in one go."""

    def score(some: Sequence[Question]) -> list[Answer]:
        pairs = [(q.prompt, q.wanted) for q in some]
        pairs += [(q.prompt, q.other) for q in some if q.other is not None]
        scores = iter(
            scoring.score_targets(
                model,
                tokenizer,
                [prompt for prompt, _ in pairs],
                [target for _, target in pairs],
                tokens_per_batch=tokens_per_batch,
                progress="probabilities" if progress else None,
            )
        )
        wanted = [next(scores) for _ in some]
        other = [None if q.other is None else next(scores) for q in some]
        return [
            Answer(q.request, q.kind, w, o) for q, w, o in zip(some, wanted, other, strict=True)
        ]

    return distribute(questions, score)


def _teacher_forced(answers: Sequence[Answer], compare: bool) -> dict[str, Metric]:
    """Fill the metrics that need no generation.

    They are not synchronised: each process has all answers.
    """
    primary: dict[str, Metric] = {}
    top1: dict[str, Metric] = {}
    for kind in KINDS:
        chosen = [a for a in answers if a.kind == kind]
        top1[f"{kind}_top1"] = ExactMatch(sync_on_compute=False)
        top1[f"{kind}_top1"].update([a.wanted.correct for a in chosen], _request(chosen))
        chosen = _measurable(chosen, compare)
        if compare:
            primary[kind] = ProbabilitySuccess(sync_on_compute=False)
            primary[kind].update(*_nll(chosen), _request(chosen))
        else:
            primary[kind] = TokenAccuracy(sync_on_compute=False)
            primary[kind].update([a.wanted.correct for a in chosen], _request(chosen))
    return {**primary, **top1}


def _score(shares: Shares, n: int) -> Metric:
    """Score the requests among ``n`` that have prompts of every kind."""
    complete = [
        [shares[kind][index] for kind in KINDS]
        for index in range(n)
        if all(index in shares[kind] for kind in KINDS)
    ]
    metric = Score(sync_on_compute=False)
    metric.update(torch.tensor(complete, dtype=torch.float64).reshape(-1, len(KINDS)))
    return metric


def _measurable(answers: Sequence[Answer], compare: bool) -> list[Answer]:
    """Keep the answers that the protocol can judge: to compare, there must be another object."""
    return [answer for answer in answers if answer.other is not None or not compare]


def _request(answers: Sequence[Answer]) -> Tensor:
    return torch.tensor([answer.request for answer in answers], dtype=torch.long)


def _nll(answers: Sequence[Answer]) -> tuple[Tensor, Tensor]:
    wanted = [answer.wanted.nll for answer in answers]
    other = [answer.other.nll for answer in answers if answer.other is not None]
    return torch.tensor(wanted), torch.tensor(other)


def _shares(answers: Sequence[Answer], compare: bool) -> Shares:
    """Return each metric's share of success for each request that it can judge."""
    shares: Shares = {}
    for kind in KINDS:
        chosen = [answer for answer in answers if answer.kind == kind]
        exact = F.exact_match([answer.wanted.correct for answer in chosen])
        shares[f"{kind}_top1"] = _by_request(exact, chosen)
        chosen = _measurable(chosen, compare)
        if compare:
            values = F.probability_success(*_nll(chosen))
        else:
            values = F.token_accuracy([answer.wanted.correct for answer in chosen])
        shares[kind] = _by_request(values, chosen)
    return shares


def _by_request(values: Tensor, answers: Sequence[Answer]) -> dict[int, float]:
    request = _request(answers)
    means = F.mean_by_request(values, request).tolist()
    return dict(zip(request.unique().tolist(), means, strict=True))


def _write(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[EditRequest],
    seed: int,
    progress: bool,
) -> list[tuple[int, str]]:
    """Continue all generation prompts; return each whole text with its request."""
    prompts = [(i, p) for i, request in enumerate(requests) for p in request.generation_prompts]
    continuations = distribute(
        [prompt for _, prompt in prompts],
        lambda some: generation.generate(
            model, tokenizer, some, seed=seed, progress="texts" if progress else None
        ),
    )
    return [(i, prompt + more) for (i, prompt), more in zip(prompts, continuations, strict=True)]


def _continue(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[EditRequest],
    tokens: int,
    progress: bool,
) -> list[str]:
    """Return the model's greedy continuation of each request's prompt."""
    if not tokens:
        return [""] * len(requests)
    return distribute(
        [request.text for request in requests],
        lambda prompts: generation.generate(
            model,
            tokenizer,
            prompts,
            max_new_tokens=tokens,
            top_k=1,
            stop_at_end=True,
            progress="continuations" if progress else None,
        ),
    )


def _fluency(texts: Sequence[tuple[int, str]]) -> Metric:
    metric = Fluency(sync_on_compute=False)
    request = torch.tensor([index for index, _ in texts], dtype=torch.long)
    metric.update([text for _, text in texts], request)
    return metric


def _consistency(
    texts: Sequence[tuple[int, str]],
    requests: Sequence[EditRequest],
    idf_texts: Sequence[str] | None,
) -> Metric:
    """Compare each request's texts, joined, with its reference texts, joined."""
    written: dict[int, list[str]] = {}
    for index, text in texts:
        if requests[index].reference_texts:
            written.setdefault(index, []).append(text)
    references = [text for request in requests for text in request.reference_texts]
    metric = Consistency(F.fit_tfidf(idf_texts or references), sync_on_compute=False)
    metric.update(
        [" ".join(mine) for mine in written.values()],
        [" ".join(requests[index].reference_texts) for index in written],
        torch.tensor(list(written), dtype=torch.long),
    )
    return metric


def _compute(shells: Mapping[str, Metric]) -> Metrics:
    """Compute the metrics that something was measured for."""
    estimates = {name: numbers(metric.compute()) for name, metric in shells.items()}
    return {name: estimate for name, estimate in estimates.items() if estimate["count"] > 0}


def _outcomes(
    requests: Sequence[EditRequest],
    answers: Sequence[Answer],
    shares: Shares,
    continuations: Sequence[str],
) -> list[RequestOutcome]:
    own = {answer.request: answer for answer in answers if answer.kind == "efficacy"}
    outcomes = []
    for index, request in enumerate(requests):
        new, true = own[index].wanted, own[index].other
        outcomes.append(
            RequestOutcome(
                case_id=request.case_id,
                **{name: share.get(index) for name, share in shares.items()},
                nll_new=new.nll,
                nll_true=None if true is None else true.nll,
                probability_new=math.exp(-new.nll),
                probability_true=None if true is None else math.exp(-true.nll),
                correct=new.correct,
                continuation=continuations[index],
            )
        )
    return outcomes
