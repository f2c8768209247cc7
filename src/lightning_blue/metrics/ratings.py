"""How a model rates the objects behind all prompts of requests: probabilities, top-1 tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_blue.data.requests import EditRequest
from lightning_blue.language_model import scoring
from lightning_blue.language_model.scoring import TargetScore
from lightning_blue.metrics import table
from lightning_blue.metrics.negation import negated_prompts
from lightning_blue.support.processes import distribute


class Question(NamedTuple):
    """A prompt, the object that it should be followed by, and one that it should not.

    ``prompts`` says which of a request's prompts it is: its own, a paraphrase, a neighbour's, the
    negated one; ``prefix`` what stands between it and the objects, where that is given.
    """

    request: int
    prompts: str
    prompt: str
    wanted: str
    other: str | None
    prefix: str | None = None


class Answer(NamedTuple):
    """How the model rates both objects of a question."""

    request: int
    prompts: str
    wanted: TargetScore
    other: TargetScore | None


def rate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[EditRequest],
    compare: bool,
    tokens_per_batch: int = 4096,
    progress: bool = False,
    sent: Callable[[str], str] = str,
    negation: str | None = None,
) -> list[Answer]:
    """Return how a model rates the objects of all prompts of requests, in their order.

    Several processes share the prompts, and each gets all results; all of them must call it.

    Args:
        model: a causal language model on any device, in any dtype.
        tokenizer: its tokenizer.
        requests: n edit requests.
        compare: whether paraphrases and neighbours are asked about the other object too.
        tokens_per_batch: tokens in one forward pass.
        progress: whether to show a progress bar.
        sent: what the model is sent for a prompt of the data.
        negation: words that deny a prompt, with ``{}`` in its place; None: no negation probes.
    """
    denied = negated_prompts(tokenizer, requests, negation)
    questions = [
        q for i, request in enumerate(requests) for q in _ask(i, request, compare, denied[i])
    ]
    return _answer(model, tokenizer, questions, tokens_per_batch, progress, sent)


def _ask(index: int, request: EditRequest, compare: bool, denied: str | None) -> Iterable[Question]:
    """Yield a request's questions; the first is its own prompt."""
    new, true, prefix = request.target_new, request.target_true, request.target_prefix
    yield Question(index, table.OWN_PROMPT, request.text, new, true, prefix)
    for prompt in request.paraphrases:
        yield Question(index, table.PARAPHRASES, prompt, new, true if compare else None, prefix)
    for probe in request.neighborhood:
        given, other = probe.target_prefix, new if compare else None
        yield Question(index, table.NEIGHBOURS, probe.prompt, probe.answer, other, given)
    if denied is not None:
        yield Question(index, table.NEGATED, denied, new, true, prefix)


def _answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    tokens_per_batch: int,
    progress: bool,
    sent: Callable[[str], str],
) -> list[Answer]:
    """Score the objects of all questions, each process those of its part in one go."""

    def score(part: Sequence[Question]) -> list[Answer]:
        pairs = [(q.prompt, q.wanted, q.prefix) for q in part]
        pairs += [(q.prompt, q.other, q.prefix) for q in part if q.other is not None]
        scores = iter(
            scoring.score_targets(
                model,
                tokenizer,
                [sent(prompt) for prompt, _, _ in pairs],
                [target for _, target, _ in pairs],
                prefixes=[prefix for _, _, prefix in pairs],
                tokens_per_batch=tokens_per_batch,
                progress="probabilities" if progress else None,
            )
        )
        wanted = [next(scores) for _ in part]
        other = [None if q.other is None else next(scores) for q in part]
        return [
            Answer(q.request, q.prompts, w, o) for q, w, o in zip(part, wanted, other, strict=True)
        ]

    return distribute(questions, score)
