"""The protocol ``generation``: the model answers freely, and what it says is compared.

The reference is WILD (Yang et al., arXiv 2502.11177): greedy decoding, at most 50 new tokens, stop
strings, exact match after normalization, locality as unchanged continuations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from blue_callbacks.ranges import COUNT, check_ranges
from lightning_blue.data.requests import EditRequest
from lightning_blue.language_model.answers import Continuation, continue_prompts
from lightning_blue.language_model.chat import Markers, markers, wrap
from lightning_blue.metrics import MeanOverRequests, numbers, table
from lightning_blue.metrics.evaluation import Evaluation, Metrics
from lightning_blue.metrics.matching import GeneratedAnswer
from lightning_blue.metrics.negation import negated_prompts
from lightning_blue.metrics.table import MetricSpec
from lightning_blue.support.errors import InputError, first_line
from lightning_blue.support.processes import distribute

FORMS = ("bare", "qa", "chat")
QUESTION = "Please answer the question:\n\nQ: {}\nA:"  # the reference's, to the letter

Unedited = Mapping[str, tuple[int, ...]]  # by prompt: the tokens that followed before any edit


@dataclass(frozen=True)
class GenerationSettings:
    r"""How answers are generated, and to which prompts.

    Args:
        prompt: what is sent: the prompt as it is (``bare``), behind an instruction to answer a
            question (``qa``), or in the tokenizer's own chat template (``chat``).
        max_new_tokens: tokens after which an answer is cut off.
        stops: an answer ends as soon as its text holds one of these; at an end-of-text token in any
            case.
        prompts_per_kind: of the paraphrases, of the neighbourhood prompts and of the portability
            prompts of a request, how many are asked: the first ones. The reference asks one.
        each_batch: whether answers are generated after each batch too (``batch``, ``cumulative``,
            ``first_batch``), and not only before any edit and at the end.
    """

    prompt: Literal["bare", "qa", "chat"] = "bare"
    max_new_tokens: int = 50
    stops: tuple[str, ...] = (".", "\n")
    prompts_per_kind: int = 1
    each_batch: bool = False

    def __post_init__(self) -> None:
        counts = {"max_new_tokens": COUNT, "prompts_per_kind": COUNT}
        check_ranges("measure.generation", vars(self), **counts)
        if self.prompt not in FORMS:
            raise InputError(
                f"there is no prompt form {self.prompt!r}",
                where="measure.generation.prompt",
                hint=f"choose one of: {', '.join(FORMS)}",
            )
        if not all(self.stops):
            raise InputError(
                "an empty text stops nothing",
                where="measure.generation.stops",
                hint="leave it out of the list",
            )


class _Question(NamedTuple):
    """A prompt as the data has it, and what should follow it."""

    request: int
    prompts: str
    prompt: str
    wanted: str
    aliases: tuple[str, ...] = ()


def with_answers(
    evaluation: Evaluation,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[EditRequest],
    settings: GenerationSettings = GenerationSettings(),
    *,
    unedited: Unedited | None = None,
    negation: str | None = None,
    progress: bool = False,
    sent: Callable[[str], str] = str,
) -> Evaluation:
    """Let a model answer the prompts of requests; add what that gives to an evaluation of them.

    Several processes share the prompts, and each gets all results; all of them must call it.

    Args:
        evaluation: of the same requests.
        model: a causal language model on any device, in any dtype.
        tokenizer: its tokenizer.
        requests: n edit requests.
        settings: how answers are generated, and to which prompts.
        unedited: what the unedited model wrote after neighbourhood prompts, see
            `unedited_continuations`; locality is measured on the prompts among them.
        negation: words that deny a prompt, see `evaluation.evaluate`; None: no negation probes.
        progress: whether to show a progress bar.
        sent: what the model is sent for a prompt in its form, that itself by default.

    Returns:
        The evaluation with the metrics of the protocol ``generation``, their values in its
        outcomes, and all answers.

    Raises:
        InputError: if a prompt cannot be brought into the form that is asked for, or does not fit
            the model's context.
    """
    denied = negated_prompts(tokenizer, requests, negation)
    written = _answer(model, tokenizer, requests, denied, settings, progress, sent)
    known = unedited or {}
    answers = [
        replace(each, unedited=known.get(each.prompt)) if each.prompts == table.NEIGHBOURS else each
        for each in written
    ]
    means = {
        spec.name: _fill(spec, measure.metric(sync_on_compute=False), answers)
        for spec, measure in table.of_protocol(
            "zsre", table.GENERATED_ANSWERS, added=(table.GENERATION,)
        )
    }
    return extended(replace(evaluation, answers=answers), means)


def extended(evaluation: Evaluation, means: Mapping[str, MeanOverRequests]) -> Evaluation:
    """Add filled metrics to an evaluation: their estimates, and their values to its outcomes."""
    estimates = {name: numbers(metric.compute()) for name, metric in means.items()}
    found: Metrics = {name: each for name, each in estimates.items() if each["count"] > 0}
    per_request = {
        name: means[name].by_request
        for name in table.per_request(means, [table.GENERATION])
        if name in means
    }
    outcomes = [
        replace(
            outcome,
            values=outcome.values | {name: of[i] for name, of in per_request.items() if i in of},
        )
        for i, outcome in enumerate(evaluation.outcomes)
    ]
    return replace(evaluation, metrics={**evaluation.metrics, **found}, outcomes=outcomes)


def unedited_continuations(answers: Sequence[GeneratedAnswer]) -> Unedited:
    """Return what an unedited model wrote after each neighbourhood prompt."""
    return {each.prompt: each.ids for each in answers if each.prompts == table.NEIGHBOURS}


def prompt_form(
    tokenizer: PreTrainedTokenizerBase, form: Literal["bare", "qa", "chat"]
) -> Callable[[str], str]:
    """Return what turns a prompt of the data into the text that is sent to the model.

    Raises:
        InputError: at once if there is no chat template to put around prompts; from what is
            returned, for a prompt that already carries one and is to stand in an instruction, or
            that the template refuses or changes.
    """
    known = markers(tokenizer)
    if form == "chat":
        if not getattr(tokenizer, "chat_template", None):
            raise InputError(
                "the tokenizer has no chat template",
                where="measure.generation.prompt = chat",
                hint="choose bare or qa, or take a chat model (chat_template.jinja in its folder)",
            )
        return lambda prompt: _in_chat(tokenizer, prompt, known)
    if form == "qa":
        return lambda prompt: _as_question(prompt, known)
    return lambda prompt: prompt


def _in_chat(tokenizer: PreTrainedTokenizerBase, prompt: str, known: Markers) -> str:
    try:
        return wrap(tokenizer, prompt, None, known)
    except InputError as error:
        raise InputError(
            first_line(error), where="measure.generation.prompt = chat", hint="choose bare or qa"
        ) from error


def _as_question(prompt: str, known: Markers) -> str:
    if known.carried_by(prompt):
        raise InputError(
            f"the prompt {prompt[:60]!r} carries a chat template, and is no question to put "
            "behind an instruction",
            where="measure.generation.prompt = qa",
            hint="choose bare, which sends it as it is, or leave out the template (--data.chat)",
        )
    return QUESTION.replace("{}", prompt)


def _ask(index: int, request: EditRequest, denied: str | None, most: int) -> Iterator[_Question]:
    """Yield what a request is asked; at most so many prompts of each kind."""
    new, aliases = request.target_new, request.aliases
    yield _Question(index, table.OWN_PROMPT, request.text, new, aliases)
    for prompt in request.paraphrases[:most]:
        yield _Question(index, table.PARAPHRASES, prompt, new, aliases)
    for kind, probes in (
        (table.NEIGHBOURS, request.neighborhood),
        (table.PORTABILITY, request.portability),
    ):
        for probe in probes[:most]:
            yield _Question(index, kind, probe.prompt, probe.answer, probe.aliases)
    if denied is not None:
        yield _Question(index, table.NEGATED, denied, new)


def _answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[EditRequest],
    denied: Sequence[str | None],
    settings: GenerationSettings,
    progress: bool,
    sent: Callable[[str], str],
) -> list[GeneratedAnswer]:
    """Let the model answer everything, each process its part in one go."""
    form = prompt_form(tokenizer, settings.prompt)
    most = settings.prompts_per_kind
    questions = [
        each for i, request in enumerate(requests) for each in _ask(i, request, denied[i], most)
    ]

    def write(part: Sequence[_Question]) -> list[GeneratedAnswer]:
        continued = continue_prompts(
            model,
            tokenizer,
            [sent(form(each.prompt)) for each in part],
            [max(_passed_over(each, settings.stops).values()) for each in part],
            stops=settings.stops,
            max_new_tokens=settings.max_new_tokens,
            progress="answers" if progress else None,
        )
        return [
            _cut(each, said, settings.stops) for each, said in zip(part, continued, strict=True)
        ]

    return distribute(questions, write)


def _passed_over(question: _Question, stops: Sequence[str]) -> dict[str, int]:
    """Return how many stop strings an object and each of its aliases hold; a neighbour's, none."""
    names = (question.wanted, *question.aliases)
    neighbour = question.prompts == table.NEIGHBOURS
    return {name: 0 if neighbour else sum(map(name.count, stops)) for name in names}


def _cut(question: _Question, said: Continuation, stops: Sequence[str]) -> GeneratedAnswer:
    """Read on by as many stop strings as the object holds, and for its aliases by their own."""
    counts = _passed_over(question, stops)
    return GeneratedAnswer(
        *question,
        answer=said.answer,
        longer=said.cuts[counts[question.wanted]],
        ids=said.ids,
        ended_by=said.ended_by,
        alias_texts={name: said.cuts[counts[name]] for name in question.aliases if counts[name]},
    )


def _fill(
    spec: MetricSpec, metric: MeanOverRequests, answers: Sequence[GeneratedAnswer]
) -> MeanOverRequests:
    """Give a metric the answers that it reads; each process has all of them."""
    chosen = [each for each in answers if _is_read(spec, each)]
    metric.update(chosen, torch.tensor([each.request for each in chosen], dtype=torch.long))
    return metric


def _is_read(spec: MetricSpec, answer: GeneratedAnswer) -> bool:
    if spec.prompts == table.ANSWERS:
        return answer.compared
    if spec.prompts != answer.prompts or (table.ALIASES in spec.needs and not answer.aliases):
        return False
    return answer.prompts != table.NEIGHBOURS or answer.unedited is not None
